"""Statistics of a model that some KV formats need: measured on a text, stored in a file."""
