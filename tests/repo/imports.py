"""The imports of each module of the checkout, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("client", "cluster", "kernels", "protos", "workers")
# Under which names the stubs of the wire contract are imported.
CONTRACTS = ("v1", "v1alpha")


def layer_of(module: str) -> str | None:
    """The layer that a module of ours belongs to; None for the package and for others."""
    parts = module.split(".")
    if parts[0] != "kvmesh" or len(parts) < 2:
        return None
    if parts[1] in CONTRACTS:
        return "protos"
    return parts[1] if parts[1] in LAYERS else None


@dataclass(frozen=True)
class Import:
    """One imported module.

    at_load: whether it is imported together with the importing module, rather than in a
        function or only for type checkers
    """

    module: str
    line: int
    at_load: bool


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """The importable modules of the checkout by full name, without generated stubs."""
    files = {"kvmesh": root / "kvmesh/__init__.py"}
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            if path.stem.endswith(("_pb2", "_pb2_grpc")):
                continue
            parts = path.relative_to(root).with_suffix("").parts
            if parts[:2] == ("protos", "kvmesh"):
                parts = parts[2:]
            name = ".".join(("kvmesh", *parts)).removesuffix(".__init__")
            files[name] = path
    return files


@cache
def imports_by_module() -> dict[str, list[Import]]:
    """What each module of the checkout imports, by its full name."""
    return {
        name: imports_of(path.read_text("utf-8"), name, path.name == "__init__.py")
        for name, path in module_files().items()
    }


def imports_of(source: str, module: str, is_package: bool) -> list[Import]:
    """All imports in a module's source, with relative ones resolved."""
    package = module if is_package else module.rpartition(".")[0]
    return list(_imports(ast.parse(source), package, at_load=True))


def _imports(node: ast.AST, package: str, at_load: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_load)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *([base] if base else [])])
        yield Import(base, node.lineno, at_load)
        # A name may be a submodule: `from kvmesh.workers import request`.
        for alias in node.names:
            yield Import(f"{base}.{alias.name}", node.lineno, at_load)
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for part in node.body:
            yield from _imports(part, package, at_load=False)
        for part in node.orelse:
            yield from _imports(part, package, at_load)
    else:
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr):  # in which nothing is imported
                yield from _imports(child, package, at_load and not inside)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"
