"""Calibrated int8 codes: the range is known before the first token, a page is codes alone."""
