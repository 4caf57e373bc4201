"""Codebook codes: levels for Gaussian numbers, times one scale per token."""
