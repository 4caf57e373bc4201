"""Codebook codes: levels made for Gaussian numbers, times one scale a token."""
