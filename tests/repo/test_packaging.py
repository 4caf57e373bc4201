"""What an installation contains: only the SDK, or everything, from a wheel or in place."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

import pytest

from tests.repo.imports import LAYERS, ROOT

SKIPPED = {
    ".git",
    ".venv",
    "build",
    "dist",
    "tests",
    "benchmarks",
    "dashboards",
    "docs",
    "examples",
    "helm",
}
# The base dependencies and their dependencies, by their names in site-packages.
BASE_MODULES = ("google", "grpc", "typing_extensions")
# Of the extra `cli`, with their dependencies.
CLI_MODULES = (
    "annotated_doc",
    "annotated_types",
    "markdown_it",
    "mdurl",
    "msgspec",
    "prompt_toolkit",
    "pydantic",
    "pydantic_core",
    "pygments",
    "rich",
    "shellingham",
    "typer",
    "typing_inspection",
    "wcwidth",
)
# What a user's type checker must find: the package, its types, the name of every argument.
USE = """
from kvmesh import AsyncClient, Client

client = Client("localhost:1").with_options(model="m")
reveal_type(client.generate("hi", temperature=0.5).usage.queue_s)
reveal_type([delta.text for delta in client.generate_stream("hi")])
reveal_type(next(client.resume(client.chat_stream([]).cursor)))
client.generate("hi", temperature="hot")
client.chat([], tempreature=1.0)

async def use(client: AsyncClient) -> None:
    reveal_type((await client.chat([], max_tokens=5)).text)
"""
FOUND = [
    'use.py:5: note: Revealed type is "float"',
    'use.py:6: note: Revealed type is "list[str]"',
    'use.py:7: note: Revealed type is "kvmesh.client.types.Delta"',
    'use.py:8: error: Argument "temperature" to "generate" of "Generations" has incompatible type '
    '"str"; expected "float | None"  [arg-type]',
    # At run time the error names the argument that was meant.
    'use.py:9: error: Argument "tempreature" to "chat" of "Generations" has incompatible type '
    '"float"; expected "Never"  [arg-type]',
    'use.py:12: note: Revealed type is "str"',
]
TALK = """
import sys
import kvmesh
from kvmesh import Client, FakeTransport
assert Client(transport=FakeTransport(["it works"])).generate("hi").text == "it works"
for heavy in ("torch", "ray", "transformers", "triton", "numpy", "pydantic"):
    assert heavy not in sys.modules, heavy
print(kvmesh.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    # pip treats packages on PYTHONPATH as installed, and a cluster of an earlier test sets it.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that building leaves nothing behind in the real one."""
    folder = tmp_path_factory.mktemp("packaging") / "a check out"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name in SKIPPED or path.name.endswith(".egg-info"):
            continue
        if path.is_dir():
            shutil.copytree(
                path,
                folder / path.name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            shutil.copy2(path, folder)
    (folder / "README.md").touch()
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
        "--no-index", "--wheel-dir", "dist", ".", cwd=checkout,
    )  # fmt: skip
    (built,) = (checkout / "dist").glob("*.whl")
    return built


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A fresh environment with only the base dependencies."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (site,) = (tmp_path / "venv/lib").glob("python3.*/site-packages")
    add_modules(BASE_MODULES, site)
    return tmp_path / "venv/bin/python"


def add_modules(names: Iterable[str], site: Path) -> None:
    """Link modules that are installed here into another environment."""
    for name in names:
        module = importlib.import_module(name)
        source = Path(module.__file__ or next(iter(module.__path__)))
        source = source.parent if source.name == "__init__.py" else source
        (site / source.name).symlink_to(source)


def fails(*command: str | Path, cwd: Path) -> str:
    """What a command that does not succeed says on stderr; no traceback."""
    result = subprocess.run([str(x) for x in command], capture_output=True, text=True, cwd=cwd)
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr
    return result.stderr


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    run(
        sys.executable, "-m", "pip", "--python", python, "install",
        "--no-deps", "--no-index", "--no-build-isolation", *what, cwd=cwd,
    )  # fmt: skip


def editable(checkout: Path) -> Path:
    """Built like `pip install -e` does, which would need setuptools in the environment."""
    build = "from setuptools.build_meta import build_editable; print(build_editable('.'))"
    return checkout / run(sys.executable, "-c", build, cwd=checkout).splitlines()[-1]


def type_check(python: Path, cwd: Path) -> list[str]:
    """What `mypy --strict` says about a user's file, which is not in a checkout."""
    (cwd / "use.py").write_text(USE)
    command = [sys.executable, "-m", "mypy", "--strict", f"--python-executable={python}", "use.py"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=cwd).stdout
    lines = [line for line in said.splitlines() if line.startswith("use.py")]
    return [line for line in lines if " defined in " not in line]


@pytest.mark.slow
def test_the_wheel_contains_only_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(
            next(archive.read(n).decode() for n in names if n.endswith("/METADATA"))
        )
        entry_points = next(archive.read(n).decode() for n in names if "entry_points" in n)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kvmesh"}
    for name in (
        "kvmesh/py.typed",
        "kvmesh/client/sync_client.py",
        "kvmesh/kernels/formats/base.py",
        "kvmesh/v1/kvmesh.proto",
        "kvmesh/v1/kvmesh_pb2.pyi",
        "kvmesh/v1alpha/admin.proto",
        "kvmesh/workers/scoring/probe.txt",
        "kvmesh/workers/sizes.py",
    ):
        assert name in names
    sources = {
        f"kvmesh/{path.relative_to(ROOT).as_posix().removeprefix('protos/kvmesh/')}"
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*.py")
    }
    assert sources <= names
    base = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert {line.split(">")[0].split("<")[0] for line in base} == {
        "googleapis-common-protos",
        "grpcio",
        "protobuf",
    }
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "kvmesh = kvmesh.cluster.cli:main" in entry_points


@pytest.mark.slow
def test_a_base_install_is_the_sdk(wheel: Path, bare_python: Path, tmp_path: Path) -> None:
    install(bare_python, wheel, cwd=tmp_path)
    where = run(bare_python, "-I", "-c", TALK, cwd=tmp_path)
    assert Path(where).is_relative_to(tmp_path)
    missing = subprocess.run(
        [bare_python, "-I", "-c", "import torch"], capture_output=True, cwd=tmp_path
    )
    assert missing.returncode != 0, "the environment must not have the other dependencies"
    said = fails(bare_python.with_name("kvmesh"), "serve", cwd=tmp_path)
    assert "pip install 'kvmesh[serve]'" in said and "kvmesh[cli]" in said
    program = (
        "import kvmesh\nfrom kvmesh import *\nassert 'LLM' not in dir(kvmesh)\n"
        "try:\n    from kvmesh import LLM\nexcept ImportError as error:\n    print(error)"
    )
    said = run(bare_python, "-I", "-c", program, cwd=tmp_path)
    assert re.fullmatch(r"kvmesh\.LLM needs .*: pip install 'kvmesh\[serve\]'", said)


@pytest.mark.slow
def test_the_extra_cli_asks_servers_and_starts_none(
    wheel: Path, bare_python: Path, tmp_path: Path
) -> None:
    install(bare_python, wheel, cwd=tmp_path)
    (site,) = (tmp_path / "venv/lib").glob("python3.*/site-packages")
    add_modules(CLI_MODULES, site)
    kvmesh = bare_python.with_name("kvmesh")
    assert "generate" in run(kvmesh, "--help", cwd=tmp_path)
    said = fails(kvmesh, "status", "--target", "127.0.0.1:1", cwd=tmp_path)
    assert "is `kvmesh serve` running there?" in said
    said = fails(kvmesh, "serve", cwd=tmp_path)
    assert "needs packages that are not here (yaml): pip install 'kvmesh[serve]'" in said


@pytest.mark.slow
def test_an_editable_install_uses_the_checkout(
    checkout: Path, bare_python: Path, tmp_path: Path
) -> None:
    install(bare_python, editable(checkout), cwd=tmp_path)
    where = run(bare_python, "-I", "-c", TALK, cwd=tmp_path)
    assert Path(where).resolve() == checkout / "kvmesh/__init__.py"
    added = checkout / "client/added_afterwards.py"
    added.write_text("ANSWER = 42\n")
    try:
        script = "import kvmesh.client.added_afterwards as a; print(a.ANSWER)"
        assert run(bare_python, "-I", "-c", script, cwd=tmp_path) == "42"
    finally:
        added.unlink()
    hidden = subprocess.run(
        [bare_python, "-I", "-c", "import kernels"], capture_output=True, cwd=tmp_path
    )
    assert hidden.returncode != 0, "the top-level folders are not importable on their own"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_a_users_code_is_type_checked(
    how: str, checkout: Path, wheel: Path, bare_python: Path, tmp_path: Path
) -> None:
    install(bare_python, wheel if how == "wheel" else editable(checkout), cwd=tmp_path)
    assert type_check(bare_python, tmp_path) == FOUND


def test_importing_the_sdk_here_loads_nothing_heavy() -> None:
    assert run(sys.executable, "-c", TALK, cwd=ROOT)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    for line in wanted:
        name = line.split(";")[0].split("[")[0].split(">")[0].strip()
        assert name in pins or name == project["name"], f"constraints.txt does not pin {name}"


def test_the_image_has_what_serving_and_tracing_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def expanded(lines: list[str]) -> Iterable[str]:
        """The requirements, with those of an extra of kvmesh itself in place of its name."""
        for line in lines:
            own = re.fullmatch(rf"{project['name']}\[(\w+)\]", line)
            yield from expanded(extras[own[1]]) if own else (line,)

    file = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", "")
    script = re.search(r"python -c '([^']+)' > requirements.txt", file)
    assert script is not None
    printed = run(sys.executable, "-c", script[1], cwd=ROOT).splitlines()
    wanted = expanded([*project["dependencies"], *extras["serve"], *extras["traces"]])
    assert sorted(printed) == sorted(wanted)
