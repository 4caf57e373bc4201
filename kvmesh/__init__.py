"""kvmesh: million-token contexts on the GPUs you have, over gRPC, on a Ray cluster.

    from kvmesh import Client

    with Client() as client:
        print(client.generate("The capital of France is", max_tokens=8).text)

All names of the SDK are here. They are imported at their first use, and load neither torch
nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmesh.client import *  # noqa: F403
    from kvmesh.client import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        # Python looks up names such as __path__ here; of those, the SDK has only __all__.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        client = import_module("kvmesh.client")
        if name != "__all__" and name not in client.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(client, name)

    def __dir__() -> list[str]:
        client = import_module("kvmesh.client")
        return sorted({*globals(), *client.__all__})
