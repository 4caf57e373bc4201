"""The embedded model without most of its layers, for tests in which many tokens are computed.

A step takes a fifth of the time. What it writes makes no sense, but hardly repeats itself: a token
that is lost or comes twice is noticed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.model.store import ModelStore, default_root

KEPT = (0, 9, 19, 29)
LAYERS = len(KEPT)
KEY = f"smollm2-of-{LAYERS}-layers-1"
COPIED = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
MAX_BYTES = 200 << 20


def shallow_path() -> Path:
    """Where the model is once it is made."""
    return default_root() / KEY


def make_shallow() -> None:
    """Make it, if no run of the tests has done so before."""
    whole = resolve_model("smollm2-135m-instruct").path
    ModelStore(default_root()).make(KEY, KEY, lambda directory: _fill(whole, directory), MAX_BYTES)


def _fill(whole: Path, directory: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    for file_name in COPIED:
        shutil.copy(whole / file_name, directory)
    config = json.loads((whole / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    kept = {}
    for path in whole.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for stored in file.keys():  # noqa: SIM118 - it is no mapping
                if (name := _renumbered(stored)) is not None:
                    kept[name] = file.get_tensor(stored)
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def _renumbered(stored: str) -> str | None:
    """The name of a tensor of the whole model in this one; None if its layer is left out."""
    if not stored.startswith("model.layers."):
        return stored
    _, _, number, rest = stored.split(".", 3)
    return f"model.layers.{KEPT.index(int(number))}.{rest}" if int(number) in KEPT else None
