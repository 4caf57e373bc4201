"""Linears and norms whose weights are split over the ranks of a group.

With a weight W [out, in] and R ranks:

    column-parallel   rank r has rows [r·out/R, (r+1)·out/R) and computes that part of the outputs
    row-parallel      rank r has those columns, for its part of the inputs; the ranks' partial
                      outputs are summed, and the bias is added once, after the sum

(Shoeybi et al., Megatron-LM, arXiv 1909.08053.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvmesh.kernels.linear import (
    GroupedWeight,
    PackedWeight,
    fixed_linear,
    grouped_linear,
    linear,
    prepare,
)
from kvmesh.workers.parallel.comm import Communicator

# A weight as it is stored: in the compute dtype, for CPUs in 4 to 32 bits, for GPUs in 4 or 8.
Stored = Tensor | PackedWeight | GroupedWeight


@dataclass(frozen=True, slots=True)
class WeightParts:
    """The weights of joined linears that are not stored in the same way, one after the other."""

    parts: tuple[Tensor | GroupedWeight, ...]

    @property
    def shape(self) -> torch.Size:
        """[out, in]"""
        rows = sum(part.shape[0] for part in self.parts)
        return torch.Size((rows, self.parts[0].shape[1]))

    @property
    def device(self) -> torch.device:
        """As of a tensor, which models of transformers may ask for."""
        return self.parts[0].device


def project(
    x: Tensor,
    weight: Stored | WeightParts,
    bias: Tensor | None = None,
    *,
    deterministic: bool = False,
) -> Tensor:
    """x W^T + b.

    x: [..., in]; weight: [out, in]; bias: [out] or None; returns [..., out]
    deterministic: a row's result has the same bits in any batch; with packed weights it always has
    """
    if isinstance(weight, PackedWeight):
        return linear(x, weight, bias)
    if isinstance(weight, GroupedWeight):
        return grouped_linear(x, weight, bias, deterministic=deterministic)
    if isinstance(weight, WeightParts):
        parts = [project(x, part, deterministic=deterministic) for part in weight.parts]
        out = torch.cat(parts, dim=-1)
        return out if bias is None else out.add_(bias)
    if deterministic:
        return fixed_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def ready(weight: Stored) -> nn.Parameter | PackedWeight | GroupedWeight:
    """As an attribute of a module, to be multiplied with."""
    if isinstance(weight, Tensor):
        return nn.Parameter(weight, requires_grad=False)
    if isinstance(weight, PackedWeight):
        prepare(weight)
    return weight


def add_product(target: Tensor, x: Tensor, weight: Tensor) -> None:
    """target += x W^T, in place. target: [T, out]; x: [T, in]; weight: [out, in]"""
    target.addmm_(x, weight.t())


class ColumnLinear(nn.Module):
    """A rank's rows of a linear.

    weight: [out_local, in]; bias: [out_local] or None
    deterministic: as in `project`; so for all linears here
    """

    deterministic = False

    def __init__(self, weight: Stored | WeightParts, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, WeightParts) else ready(weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out_local]"""
        return project(x, self.weight, self.bias, deterministic=self.deterministic)

    @staticmethod
    def joined(parts: list[ColumnLinear]) -> ColumnLinear:
        """One linear that computes the outputs of all `parts`, concatenated."""
        biases = [part.bias.data for part in parts if part.bias is not None]
        assert len(biases) in (0, len(parts)), "parts with and without a bias cannot be joined"
        bias = torch.cat(biases) if biases else None
        return ColumnLinear(_joined([part.weight for part in parts]), bias)


def _joined(
    weights: list[nn.Parameter | PackedWeight | GroupedWeight | WeightParts],
) -> Stored | WeightParts:
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    if packed:
        return PackedWeight.joined(packed)
    plain = [weight.data for weight in weights if isinstance(weight, nn.Parameter)]
    if len(plain) == len(weights):
        return torch.cat(plain)
    grouped = [weight for weight in weights if isinstance(weight, GroupedWeight)]
    joined = GroupedWeight.joined(grouped) if len(grouped) == len(weights) else None
    if joined is not None:
        return joined
    parts: list[Tensor | GroupedWeight] = []
    for weight in weights:
        assert not isinstance(weight, PackedWeight), "a rank has them on CPUs alone, everywhere"
        some = weight.parts if isinstance(weight, WeightParts) else (weight,)
        parts += [one.data if isinstance(one, nn.Parameter) else one for one in some]
    return WeightParts(tuple(parts))


class RowLinear(nn.Module):
    """A rank's columns of a linear, summed over the ranks.

    weight: [out, in_local]; bias: [out] or None, the same on every rank
    """

    deterministic = False

    def __init__(self, weight: Stored, bias: Tensor | None, comm: Communicator) -> None:
        super().__init__()
        self.weight = ready(weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._comm = comm

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_local] -> [..., out]"""
        if self._comm.size == 1:
            return project(x, self.weight, self.bias, deterministic=self.deterministic)
        out = self._comm.all_reduce(project(x, self.weight, deterministic=self.deterministic))
        return out if self.bias is None else out.add_(self.bias)

    @property
    def is_split(self) -> bool:
        """Whether there are other ranks to sum with."""
        return self._comm.size > 1

    def onto(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """Add the output to `residual`, [T, out], in the product itself; with weights in few bits,
        on several ranks and where it is deterministic return the output instead. x: [T, in_local]
        """
        weight = self.weight
        if self._comm.size > 1 or self.deterministic or not isinstance(weight, nn.Parameter):
            return self(x)  # type: ignore[no-any-return]
        add_product(residual, x, weight)
        if self.bias is not None:
            residual += self.bias
        return None


class VocabHead(nn.Module):
    """The output projection, with its vocabulary split over the ranks.

    weight: [rows, hidden], this rank's rows; ceil(vocab_size / size) on every rank,
        with zeros for rows beyond the vocabulary
    """

    deterministic = False

    def __init__(self, weight: Stored, vocab_size: int, comm: Communicator) -> None:
        super().__init__()
        self.weight = ready(weight)
        self._vocab_size = vocab_size
        self._comm = comm

    def forward(self, x: Tensor) -> Tensor | None:
        """x: [n, hidden] -> [n, vocab_size] on rank 0, None on the others"""
        part = project(x, self.weight, deterministic=self.deterministic)
        logits = self._comm.gather_logits(part)
        return None if logits is None else logits[..., : self._vocab_size]

    @staticmethod
    def rows_of(rank: int, size: int, vocab_size: int) -> tuple[int, int, int]:
        """(first, end, padded count) of the rows of `rank`."""
        count = -(-vocab_size // size)
        first = min(rank * count, vocab_size)
        return first, min(first + count, vocab_size), count


class SplitRMSNorm(nn.Module):
    """RMS norm over a dimension that is split over the ranks (OLMo 2's queries and keys).

    weight: [dim_local]; dim: over all ranks, counted as often as there are ranks that have it
    """

    def __init__(self, weight: Tensor, dim: int, eps: float, comm: Communicator) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._dim = dim
        self._eps = eps
        self._comm = comm

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim_local] -> like x"""
        exact = x.float()
        squares = self._comm.all_reduce(exact.square().sum(-1, keepdim=True))
        scaled = exact * torch.rsqrt(squares / self._dim + self._eps)
        return (self.weight.float() * scaled).to(x.dtype)
