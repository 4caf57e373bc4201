"""Non-uniform codes on calibrated levels, outliers kept apart, keys as before RoPE: KVQuant."""
