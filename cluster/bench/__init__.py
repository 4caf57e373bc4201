"""Load on a running server, and the measurement of its replies."""
