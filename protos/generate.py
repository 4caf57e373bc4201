"""Generate what follows from the wire contract, or check that it is current.

    python protos/generate.py [--check]

    kvmesh/*/*_pb2*     the Python stubs, checked in so that installing needs no compiler
    lock.binpb          the contract as it was; a change that would break clients is refused

The stubs depend on the versions of grpcio-tools and mypy-protobuf, which constraints.txt pins.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = Path(sysconfig.get_path("scripts"))  # whether or not the environment is activated
LOCK = "lock.binpb"


def proto_names() -> list[str]:
    """Paths of the .proto files, relative to this folder."""
    return sorted(path.relative_to(HERE).as_posix() for path in HERE.rglob("*.proto"))


def generate(out: Path) -> dict[str, bytes]:
    """Run the compilers into `out`; returns all files by path relative to this folder."""
    names = proto_names()
    services = [name for name in names if "\nservice " in (HERE / name).read_text("utf-8")]
    _compile(names, "python", "mypy", out)
    _compile(services, "grpc_python", "mypy_grpc", out)
    found = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*_pb2*.py*"))
    }
    _buf("build", str(HERE), "-o", str(out / LOCK), "--exclude-source-info")
    return {**found, LOCK: (out / LOCK).read_bytes()}


def _compile(names: list[str], code: str, types: str, out: Path) -> None:
    from grpc_tools import protoc

    arguments = [
        "protoc",
        f"-I{HERE}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-{types}={SCRIPTS / f'protoc-gen-{types}'}",
        f"--{code}_out={out}",
        f"--{types}_out=quiet:{out}",
        *names,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("generate: the proto compiler failed; see its message above")


def _buf(*arguments: str) -> None:
    if subprocess.run([SCRIPTS / "buf", *arguments]).returncode:
        raise SystemExit(f"generate: buf {arguments[0]} failed; see its message above")


def check_contract() -> None:
    """Exit unless the contract is well-formed and compatible with the lock."""
    _buf("lint", str(HERE))
    if (HERE / LOCK).exists():
        _buf("breaking", str(HERE), "--against", str(HERE / LOCK))


def stale_files(fresh: dict[str, bytes]) -> list[str]:
    """Files that are missing, that differ, or that no longer have a .proto."""
    present = {
        path.relative_to(HERE).as_posix(): path.read_bytes()
        for path in HERE.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    if (HERE / LOCK).exists():
        present[LOCK] = (HERE / LOCK).read_bytes()
    return sorted(
        name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check: bool = parser.parse_args().check
    check_contract()
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
    stale = stale_files(fresh)
    if not check:
        for name in stale:
            if name in fresh:
                (HERE / name).write_bytes(fresh[name])
                print(f"wrote protos/{name}")
            else:
                (HERE / name).unlink()
                print(f"removed protos/{name}")
        return 0
    if stale:
        print(
            f"stale: {', '.join(stale)}; run `python protos/generate.py` "
            f"(installed: grpcio-tools {version('grpcio-tools')}, "
            f"mypy-protobuf {version('mypy-protobuf')}; constraints.txt has the pins)",
            file=sys.stderr,
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
