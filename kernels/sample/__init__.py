"""Sampling one token from each row of logits."""

from kvmesh.kernels.sample.op import SampleParams, sample_tokens

__all__ = ["SampleParams", "sample_tokens"]
