"""OpenAI's HTTP API as a translation of the wire contract; front.py says how a call passes."""
