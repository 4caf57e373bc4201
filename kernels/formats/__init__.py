"""KV formats: how a sealed page stores keys and values."""
