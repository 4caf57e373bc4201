"""Models: where they come from, what is known of them, and how a rank runs one."""
