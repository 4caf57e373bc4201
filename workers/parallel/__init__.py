"""Tensor parallelism: the ranks' communicator and the linears split over it."""
