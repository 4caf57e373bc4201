"""How a rank's CPU threads wait for each other. Torch-free: must run before torch is imported.

OpenMP's threads spin while they wait. On a machine that runs anything else (an ingress, a
proxy, another rank), spinning threads take the CPU from the thread they are waiting for:
decode was measured to drop from 20 tokens per second to less than one.
"""

from __future__ import annotations

from collections.abc import MutableMapping


def wait_passively(environ: MutableMapping[str, str]) -> None:
    """Let OpenMP threads sleep while they wait, unless the user has configured otherwise.

    OpenMP reads this when its library is loaded: call it before torch is imported, with the
    environment of the process that imports it."""
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
