"""kvmesh: million-token contexts on the GPUs you have, over gRPC, on a Ray cluster.

    from kvmesh import Client

    with Client() as client:
        print(client.generate("The capital of France is", max_tokens=8).text)

All names of the SDK are here. They are imported at their first use, and load neither torch
nor Ray. So is the engine for programs that need no server, which does load torch:

    from kvmesh import LLM, SamplingParams
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmesh.client import *  # noqa: F403
    from kvmesh.client import __all__ as __all__
    from kvmesh.cluster.offline.batch import BatchError as BatchError
    from kvmesh.cluster.offline.llm import LLM as LLM
    from kvmesh.cluster.offline.score import Score as Score
    from kvmesh.workers.errors import ConfigError as ConfigError
else:
    # Not in __all__: `from kvmesh import *` works without them.
    _OFFLINE = {
        "LLM": "kvmesh.cluster.offline.llm",
        "BatchError": "kvmesh.cluster.offline.batch",
        "ConfigError": "kvmesh.workers.errors",
        "Score": "kvmesh.cluster.offline.score",
    }

    def __getattr__(name: str) -> object:
        # Python looks up names such as __path__ here; of those, the SDK has only __all__.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        if name in _OFFLINE:
            return _offline(name)
        client = import_module("kvmesh.client")
        if name != "__all__" and name not in client.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(client, name)

    def _offline(name: str) -> object:
        try:
            return getattr(import_module(_OFFLINE[name]), name)
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.partition(".")[0] == __name__:
                raise
            raise ImportError(
                f"kvmesh.{name} needs packages that are not here ({error.name}): "
                "pip install 'kvmesh[serve]'"
            ) from None

    def __dir__() -> list[str]:
        client = import_module("kvmesh.client")
        here = _OFFLINE if find_spec("torch") else ()
        return sorted({*globals(), *client.__all__, *here})
