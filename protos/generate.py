"""Generate the Python stubs of the wire contract, or check that they are current.

    python protos/generate.py [--check]

The stubs are checked in so that installing needs no compiler. Their text depends
on the versions of grpcio-tools and mypy-protobuf, which constraints.txt pins.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The path by which the stubs import each other and descriptors name their files.
VIRTUAL_ROOT = "kvmesh/protos"


def proto_names() -> list[str]:
    """Paths of the .proto files, relative to this folder."""
    return sorted(path.relative_to(HERE).as_posix() for path in HERE.rglob("*.proto"))


def generate(out: Path) -> dict[str, bytes]:
    """Run the compiler into `out`; returns the stubs by path relative to this folder."""
    names = proto_names()
    services = [name for name in names if "\nservice " in (HERE / name).read_text("utf-8")]
    _compile(names, "python", "mypy", out)
    _compile(services, "grpc_python", "mypy_grpc", out)
    root = out / VIRTUAL_ROOT
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*_pb2*.py*"))
    }


def _compile(names: list[str], code: str, types: str, out: Path) -> None:
    from grpc_tools import protoc

    # Next to this interpreter, whether or not its environment is activated.
    plugin = Path(sysconfig.get_path("scripts")) / f"protoc-gen-{types}"

    arguments = [
        "protoc",
        f"-I{VIRTUAL_ROOT}={HERE}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-{types}={plugin}",
        f"--{code}_out={out}",
        f"--{types}_out=quiet:{out}",
        *(f"{VIRTUAL_ROOT}/{name}" for name in names),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("generate: the proto compiler failed; see its message above")


def stale_stubs(fresh: dict[str, bytes]) -> list[str]:
    """Stubs that are missing, that differ, or whose .proto no longer exists."""
    present = {
        path.relative_to(HERE).as_posix(): path.read_bytes()
        for path in HERE.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    return sorted(
        name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
    stale = stale_stubs(fresh)
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
            f"stale stubs: {', '.join(stale)}; run `python protos/generate.py` "
            f"(installed: grpcio-tools {version('grpcio-tools')}, "
            f"mypy-protobuf {version('mypy-protobuf')}; constraints.txt has the pins)",
            file=sys.stderr,
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
