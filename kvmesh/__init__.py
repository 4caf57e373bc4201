"""kvmesh: million-token contexts on the GPUs you have, over gRPC, on a Ray cluster."""
