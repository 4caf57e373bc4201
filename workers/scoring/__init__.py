"""Scoring given text with a rank, and the probe of KV formats at load that is made of it."""
