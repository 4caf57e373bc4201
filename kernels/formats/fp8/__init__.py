"""Eight-bit floating point, e4m3, with a scale a page."""
