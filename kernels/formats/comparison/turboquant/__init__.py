"""TurboQuant: Lloyd-Max levels for rotated numbers, and a sign of what is left."""
