"""The wire contract can only change so that clients of the released one continue to work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path(__file__).resolve().parents[2] / "protos"


def generate(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, folder / "generate.py"], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        # The numbers of two fields swapped.
        (
            "optional double temperature = 1;",
            "optional double temperature = 2;",
            "temperature",
        ),
        ("optional int32 top_k = 3;", "optional int64 top_k = 3;", "type"),
        ("optional int32 top_k = 3;", "int32 top_k = 3;", "cardinality"),
        ("  string cache_salt = 8;\n", "", "deleted"),
        ("  rpc Tokenize(", "  rpc Tokenise(", "Tokenize"),
        ("FINISH_REASON_LENGTH = 2;", "FINISH_REASON_LENGTH = 9;", "FinishReason"),
        ("  reserved 7;\n", "", "reserved"),
    ],
    ids=["number", "type", "presence", "deleted", "renamed", "enum", "reserved"],
)
def test_a_change_that_breaks_clients_is_refused(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    folder = shutil.copytree(PROTOS, tmp_path / "protos")
    contract = folder / "kvmesh/v1/kvmesh.proto"
    text = contract.read_text()
    if complaint == "temperature":
        text = text.replace("optional double top_p = 2;", "optional double top_p = 1;", 1)
    assert old in text
    contract.write_text(text.replace(old, new, 1))
    before = (folder / "lock.binpb").read_bytes()
    result = generate(folder)
    assert result.returncode == 1
    assert complaint in result.stdout + result.stderr
    assert (folder / "lock.binpb").read_bytes() == before


def test_an_addition_is_accepted_and_locked(tmp_path: Path) -> None:
    folder = shutil.copytree(PROTOS, tmp_path / "protos")
    contract = folder / "kvmesh/v1/kvmesh.proto"
    old = "  string adapter = 13;\n"
    assert old in contract.read_text()
    contract.write_text(contract.read_text().replace(old, old + "  string added = 99;\n"))
    assert generate(folder).returncode == 0
    contract.write_text(contract.read_text().replace("  string added = 99;\n", ""))
    result = generate(folder)
    assert result.returncode == 1
    assert "added" in result.stdout + result.stderr
