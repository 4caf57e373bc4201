"""What a cluster tells its operators: metrics, logs and traces."""
