"""What an answer consists of: reasoning, text, tool calls. See docs/structured_output.md."""
