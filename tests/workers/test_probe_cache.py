"""Results of probes on disk: loaded for the same inputs, measured again otherwise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.rank import Rank
from kvmesh.workers.rope_override import RopeOverride
from kvmesh.workers.scoring import probe_cache
from kvmesh.workers.scoring.probe_cache import ProbeCache
from tests.model.small import make_small_model, make_small_tokenizer

INPUTS = ("revision", ["int8", "int4"])


def test_results_are_found_by_their_inputs(tmp_path: Path) -> None:
    ProbeCache(INPUTS, tmp_path / "probes").store([0.1, math.nan])
    found = ProbeCache(INPUTS, tmp_path / "probes").load()
    assert found is not None and found[0] == 0.1 and math.isnan(found[1])
    assert ProbeCache(("revision", ["int8"]), tmp_path / "probes").load() is None


@pytest.mark.parametrize("content", [b"", b"{", b"3", b'["much"]', b"\xff"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: bytes) -> None:
    cache = ProbeCache(INPUTS, tmp_path)
    cache.store([0.1, 0.2])
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert cache.load() is None


def test_a_directory_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    cache = ProbeCache(INPUTS, file / "probes")
    cache.store([0.1, 0.2])
    assert cache.load() is None


def test_a_rank_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    vocab_size = make_small_tokenizer(model)
    make_small_model("LlamaForCausalLM", model, vocab_size=vocab_size, max_position_embeddings=256)
    monkeypatch.setattr(probe_cache, "cache_directory", lambda: tmp_path / "cache")
    config = EngineConfig(model=str(model), page_size=16, device="cpu", threads_per_rank=1)
    rank = Rank(config, 0, Communicator.single())
    measured = rank.divergences(["int4"])
    (file,) = (tmp_path / "cache/probes").iterdir()
    assert ProbeCache(rank._probe_inputs(["int4"])).load() == measured
    file.write_text("[7.5]")
    assert Rank(config, 0, Communicator.single()).divergences(["int4"]) == [7.5]
    for changed in (
        config.replace(page_size=32),
        config.replace(sink_pages=1),
        config.replace(weight_format="int8"),
        config.replace(dtype="bfloat16"),
        config.replace(max_model_len=128),
        config.replace(rope=RopeOverride(type="linear", factor=2)),
    ):
        assert Rank(changed, 0, Communicator.single()).divergences(["int4"]) != [7.5]
