"""The example with Ray Data, as users run it, on a Ray of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.offline.tiny_llm import tiny_llm
from tests.repo.imports import ROOT
from tests.workers.structured.tiny import model_path

pytestmark = pytest.mark.ray

DATA = Path(sys.prefix) / "data"  # where `make venv` installs what Ray Data needs


def test_a_data_set_is_continued_on_ray(tmp_path: Path) -> None:
    prompts = [f"prompt {n}" for n in range(8)]
    source = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt} for prompt in [*prompts, "z" * 3000]]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    program = [sys.executable, str(ROOT / "examples/ray_data_batch.py")]
    subprocess.run(
        [*program, str(source), str(tmp_path / "out"), str(model_path())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(DATA)])},
        check=True,
        timeout=500,
    )
    lines = [line for file in (tmp_path / "out").iterdir() for line in file.open()]
    found = {row["prompt"]: row for row in map(json.loads, lines)}
    assert len(found) == len(lines) == 9
    with tiny_llm(kv_format="k4v4", page_size=64) as llm:
        expected = llm.generate(prompts, temperature=0.0, max_tokens=32)
    for prompt, completion in zip(prompts, expected, strict=True):
        assert found[prompt]["completion"] == completion.text
        assert not found[prompt]["error"]
    assert "the context holds 1024" in found["z" * 3000]["error"]
