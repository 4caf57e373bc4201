"""KVQuant: non-uniform codes on calibrated levels, separate outliers, keys before RoPE."""
