"""What the path costs without a model: `python -m benchmarks.control_plane`."""
