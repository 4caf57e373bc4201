"""Models: finding them, reading their facts, and running them on a rank."""
