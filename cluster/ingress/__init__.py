"""From a call on the wire to sequences on an engine, and back: free of Ray."""
