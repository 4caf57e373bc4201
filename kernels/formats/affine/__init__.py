"""Affine codes: a scale and an offset for a run of channels of a token, or of tokens of a channel."""
