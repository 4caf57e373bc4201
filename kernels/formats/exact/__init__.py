"""The side `exact`: sealed pages keep the bytes of the hot page."""
