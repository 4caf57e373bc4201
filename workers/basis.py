"""The basis in which a format stores keys and values: rotated, or unchanged.

Hot and sealed pages use the same basis, so attention is not aware of it: queries are
rotated like the keys, and the output is rotated back from the basis of the values. If the
model's weights already include the values' rotation, there is nothing to do for values.
"""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.linear import fixed_linear


class Basis:
    """Rotations of a format's sides, for one head_dim and dtype.

    values_rotated: whether the model's values are rotated, see `ServedModel`
    deterministic: a rotated vector has the same bits in any batch
    values, values_back: of values to how they are stored, and of outputs; None for unchanged
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
        self._keys = Rotation.of(head_dim, dtype, device) if fmt.k.rotated else None
        self.values = self.values_back = None
        # Unquantised values are as good in any basis.
        if fmt.v.width and fmt.v.rotated != values_rotated:
            self.values = Rotation.of(head_dim, dtype, device, back=values_rotated)
            self.values_back = Rotation.of(head_dim, dtype, device, back=not values_rotated)

    @property
    def keeps_keys(self) -> bool:
        """Whether keys are stored unchanged."""
        return self._keys is None

    def enter_values(self, v: torch.Tensor) -> torch.Tensor:
        """v: [tokens, num_kv_heads, head_dim]"""
        return self._rotated(v, self.values)

    def enter(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [tokens, num_heads, head_dim], k and v [tokens, num_kv_heads, head_dim]."""
        return self._rotated(q, self._keys), self._rotated(k, self._keys), self.enter_values(v)

    def leave(self, out: torch.Tensor) -> torch.Tensor:
        """out [tokens, num_heads, head_dim], in the basis of the values."""
        return self._rotated(out, self.values_back)

    def _rotated(self, x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        if rotation is None:
            return x
        if self._deterministic and x.is_cuda:
            return fixed_linear(x, rotation.matrix)
        return rotation(x)
