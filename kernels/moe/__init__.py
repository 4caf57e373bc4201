"""Mixtures of experts: each token's MLP is a weighted sum of a few of many."""

from kvmesh.kernels.moe.glu import SWIGLU, GatedUnit
from kvmesh.kernels.moe.op import ExpertWeights, expert_mlp

__all__ = ["SWIGLU", "ExpertWeights", "GatedUnit", "expert_mlp"]
