"""How a rank's CPU threads wait for one another. Torch-free: it must come before torch.

OpenMP's threads spin while they wait. On a machine that does anything else (an
ingress, a proxy, another rank) the spinning keeps the thread that is waited for
from running: decode was seen to fall from 20 tokens a second to less than one.
"""

from __future__ import annotations

from collections.abc import MutableMapping


def wait_passively(environ: MutableMapping[str, str]) -> None:
    """Let OpenMP threads sleep while they wait, unless the user has decided otherwise.

    Read when the library is loaded: call it before torch is imported, in the environment of
    the process that will."""
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
