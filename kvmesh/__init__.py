"""kvmesh: million-token contexts on the GPUs you have, over gRPC, on a Ray cluster.

    from kvmesh import Client

    with Client() as client:
        print(client.generate("The capital of France is", max_tokens=8).text)

All names of the SDK are here; importing them loads neither torch nor Ray.
"""

from kvmesh.client import *  # noqa: F403
from kvmesh.client import __all__ as __all__
