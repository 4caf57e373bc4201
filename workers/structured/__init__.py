"""Output that must match a grammar, and reasoning that must end: see docs/structured_output.md."""
