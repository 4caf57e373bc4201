"""The basis in which a format stores keys and values: rotated, or unchanged.

Hot and sealed pages use the same basis, so attention is not aware of it: queries are
rotated like the keys, and the output is rotated back from the basis of the values. If the
model's weights already include the values' rotation, there is nothing to do for values.
"""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.rotation import rotate, rotation_matrix
from kvmesh.kernels.linear import fixed_linear


class Basis:
    """Rotations of a format's sides, for one head_dim and dtype.

    values_rotated: whether the model's values are rotated, see `ServedModel`
    deterministic: a rotated vector has the same bits in any batch
    """

    def __init__(
        self,
        fmt: KVFormat,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        values_rotated: bool = False,
        deterministic: bool = False,
    ) -> None:
        self._deterministic = deterministic
        self._k = self._v = self._v_back = None
        if fmt.k.rotated:
            self._k = rotation_matrix(head_dim).to(device, dtype)
        # Unquantised values are as good in any basis.
        if fmt.v.width and fmt.v.rotated != values_rotated:
            there = rotation_matrix(head_dim).to(device, dtype)
            back = there.T.contiguous()
            self._v, self._v_back = (back, there) if values_rotated else (there, back)

    @property
    def keeps_keys(self) -> bool:
        """Whether keys are stored unchanged."""
        return self._k is None

    @property
    def keeps_values(self) -> bool:
        """Whether values are stored unchanged."""
        return self._v is None

    def enter_values(self, v: torch.Tensor) -> torch.Tensor:
        """v: [tokens, num_kv_heads, head_dim]"""
        return v if self._v is None else self._rotate(v, self._v)

    def enter(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [tokens, num_heads, head_dim], k and v [tokens, num_kv_heads, head_dim]."""
        if self._k is not None:
            q, k = self._rotate(q, self._k), self._rotate(k, self._k)
        return q, k, self.enter_values(v)

    def leave(self, out: torch.Tensor) -> torch.Tensor:
        """out [tokens, num_heads, head_dim], in the basis of the values."""
        return out if self._v_back is None else self._rotate(out, self._v_back)

    def _rotate(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        if self._deterministic and x.is_cuda:
            return fixed_linear(x, matrix)
        return rotate(x, matrix, deterministic=self._deterministic)
