"""Eight-bit floating point, e4m3, with one scale per page."""
