"""What Serve's controller asks about deployments that the router scales; imports nothing else."""

from __future__ import annotations

from typing import Any


def keep(context: Any) -> tuple[int, dict[str, Any]]:
    """As many replicas as there are to be already. context: Serve's AutoscalingContext"""
    return context.target_num_replicas, {}
