"""What a KV format costs a model: perplexity, divergence, recall, through the engine's own path."""
