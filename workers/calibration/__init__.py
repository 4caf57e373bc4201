"""What some KV formats have to know of a model beforehand: measured on a text, kept in a file."""
