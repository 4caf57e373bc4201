"""Joining a Ray cluster that is already running."""

from __future__ import annotations

import logging
import os

from kvmesh.cluster.errors import StartError
from kvmesh.cluster.keys import use_ray_token


def join_ray(address: str) -> None:
    """Connect this process to the cluster at `address`, or to this host's for `auto`.

    Raises StartError, in one line, also if the cluster asks for a token that is not here.
    """
    use_ray_token(os.environ)
    import ray
    from ray.exceptions import AuthenticationError, RayError

    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except AuthenticationError as error:
        raise StartError(
            f"the Ray cluster at {address} asks for another token: copy the one in its head's "
            "~/.ray/auth_token to the same place here, or set RAY_AUTH_TOKEN_PATH"
        ) from error
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise StartError(f"cannot join the Ray cluster at {address}: {error}") from error
