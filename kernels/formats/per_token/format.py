"""The values of the formats `int8` and `int4`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import KVFormat

META_NUMBERS = 4  # per token: scale and minimum of K, scale and minimum of V
META_BYTES = 2  # each in bf16


@dataclass(frozen=True, slots=True)
class PerTokenFormat(KVFormat):
    """Codes of `k_bits` = `v_bits` with a bf16 scale and minimum per token and head.

    What LMDeploy's ``quant_policy`` 8 and 4 do online, with the minimum stored
    rather than a zero-point and the codes saturated.
    """

    package: ClassVar[str] = "kvmesh.kernels.formats.per_token"

    def __post_init__(self) -> None:
        if self.k_bits != self.v_bits or self.k_bits not in (4, 8):
            raise ValueError(
                f"k_bits, v_bits: expected both 4 or both 8, got {self.k_bits} and {self.v_bits}"
            )

    def page_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        if head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {head_dim}")
        codes = page_size * head_dim * (self.k_bits + self.v_bits) // 8
        return codes + page_size * META_NUMBERS * META_BYTES


INT8 = PerTokenFormat(name="int8", k_bits=8, v_bits=8, aliases=("8",))
INT4 = PerTokenFormat(name="int4", k_bits=4, v_bits=4, aliases=("4",))
