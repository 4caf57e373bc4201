"""What a KV format is: a frozen value that knows its sizes and its codec.

This module is free of torch, so that the router and the planner can do the
arithmetic of pages without it; `encode` and `decode` import the format's
`reference` module on first use.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How a sealed page stores keys and values.

    name: the registry's name, e.g. ``int4``
    k_bits, v_bits: width of one code, without metadata
    sink_pages, recent_pages: default windows whose pages are read exactly:
        key j is read from its hot page if its page is among the first
        `sink_pages` or at most `recent_pages` before the query's page
    aliases: other names users know it by (LMDeploy's ``quant_policy``, ...)
    """

    name: str
    k_bits: int
    v_bits: int
    sink_pages: int = 0
    recent_pages: int = 0
    needs_calibration: bool = False
    aliases: tuple[str, ...] = ()

    package: ClassVar[str] = ""

    def page_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        """Bytes of one sealed page of one layer and one KV head, keys and values.

        dtype_bytes: size of the compute dtype; only formats that store it
        (``exact``, scales kept in it) depend on it.
        """
        raise NotImplementedError
