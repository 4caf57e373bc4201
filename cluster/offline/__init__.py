"""The engine without a server: the same cluster, in the process that uses it."""
