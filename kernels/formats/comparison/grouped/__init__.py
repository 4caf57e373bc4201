"""Uniform grids for runs of a token's channels, or of a channel's tokens: KIVI, Quanto, HQQ."""
