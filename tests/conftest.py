"""For all tests, before anything imports torch or Triton for the first time.

Threads that wait sleep, so that a shared machine does not slow them tenfold. Without a GPU the
Triton kernels run in its interpreter, which must be asked for before Triton's first import,
wherever in the suite that is.
"""

from __future__ import annotations

import os

from kvmesh.workers.threads import wait_passively

wait_passively(os.environ)

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
