"""A CPU's ranks without Triton. Torch-free until it is asked."""

from __future__ import annotations

import sys


def leave_out_triton(device: str) -> None:
    """Let this process, whose rank is to compute on `device`, find no Triton if that is a CPU.

    torch's compiler imports it, if it is installed, and transformers' models import that compiler:
    67 MB of memory for what only GPUs use. Call it before transformers' models are imported.

    device: as in the settings
    """
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        # To Python, a module that is not there; one that has been imported already stays.
        sys.modules.setdefault("triton", None)  # type: ignore[arg-type]
