"""Files of requests in OpenAI's batch format, and of their answers."""
