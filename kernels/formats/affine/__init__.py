"""Affine codes: a scale and an offset for each run of channels or of tokens."""
