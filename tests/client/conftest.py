from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_key_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Isolate the tests from the environment and the key file of the person running them."""
    monkeypatch.delenv("KVMESH_API_KEY", raising=False)
    monkeypatch.delenv("KVMESH_TARGET", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
