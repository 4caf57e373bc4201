"""The accuracy cost of KV formats: perplexity, divergence, recall, computed like in serving."""
