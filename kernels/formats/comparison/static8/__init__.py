"""Calibrated int8 codes: the range is known in advance, so a page holds only codes."""
