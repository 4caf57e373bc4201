"""Which layer may import which, read from the sources.

kernels  <-  workers  <-  cluster  ->  client  ->  protos
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.repo.graph import cyclic, links_between, unit_of
from tests.repo.imports import (
    CONTRACTS,
    LAYERS,
    ROOT,
    Import,
    imports_by_module,
    imports_of,
    layer_of,
    module_files,
)

MAY_IMPORT = {
    "client": {"client", "protos"},
    "cluster": {"client", "cluster", "protos", "workers"},
    "kernels": {"kernels"},
    "protos": {"protos"},
    "workers": {"kernels", "workers"},
}
# Formats' names, sizes and order of accuracy, attention's bytes: plain arithmetic, free of torch.
SHARED_FORMATS = {
    "kvmesh.kernels.formats.base",
    "kvmesh.kernels.formats.registry",
    "kvmesh.kernels.workspace",
}
# Third parties, for the layers that may use only a few.
THIRD_PARTIES = {
    "client": {"google", "grpc"},
    "kernels": {"flashinfer", "llvmlite", "numba", "numpy", "torch", "triton"},
    "protos": {"google", "grpc", "grpc_tools"},
}
RAY_MODULES = {"kvmesh.workers.actor"}
HEAVY = {"accelerate", "numba", "ray", "torch", "transformers", "triton"}
TORCH_FREE = {
    "kvmesh.kernels.formats.base",
    "kvmesh.kernels.formats.registry",
    "kvmesh.kernels.workspace",
    "kvmesh.workers.config",
    "kvmesh.workers.errors",
    "kvmesh.workers.prefix_cache",
    "kvmesh.workers.evaluation.footprint",
    "kvmesh.workers.scoring.gate",
    "kvmesh.workers.evaluation.reports",
    "kvmesh.workers.quantities",
    "kvmesh.workers.request",
    "kvmesh.workers.sampling_params",
    "kvmesh.workers.settings",
    "kvmesh.workers.sizes",
    "kvmesh.workers.model.sizes",
    "kvmesh.cluster.planner.plan",
}

FILES = module_files()


def modules_of(*layers: str) -> list[str]:
    return [name for name in FILES if layer_of(name) in layers]


def may_import(layer: str, module: str) -> bool:
    if layer == "cluster" and any(f"{module}.".startswith(f"{m}.") for m in SHARED_FORMATS):
        return True
    return layer_of(module) in {None, *MAY_IMPORT[layer]}


def where(module: str, imported: Import) -> str:
    return f"{FILES[module].relative_to(ROOT)}:{imported.line} imports {imported.module}"


def test_all_modules_are_found() -> None:
    assert {layer_of(name) for name in FILES} >= {"client", "protos", "workers"}
    assert "kvmesh.client.sync_client" in FILES


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_lower_layers(layer: str) -> None:
    faults = [
        where(module, imported)
        for module in modules_of(layer)
        for imported in imports_by_module()[module]
        if not may_import(layer, imported.module)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("layer", LAYERS)
def test_our_folders_are_imported_by_their_full_names(layer: str) -> None:
    faults = [
        where(module, imported)
        for module in FILES
        for imported in imports_by_module()[module]
        if imported.module.split(".")[0] == layer
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("layer", THIRD_PARTIES)
def test_the_base_layers_import_few_third_parties(layer: str) -> None:
    allowed = THIRD_PARTIES[layer] | {"kvmesh"} | sys.stdlib_module_names
    faults = [
        where(module, imported)
        for module in modules_of(layer)
        for imported in imports_by_module()[module]
        if imported.module.split(".")[0] not in allowed
    ]
    assert not faults, "\n".join(faults)


def test_folders_do_not_import_each_other() -> None:
    """Nor a folder and a file next to it, and not in a circle of several either."""
    links = links_between(unit_of, FILES, imports_by_module())
    faults = [line for link in sorted(cyclic(links)) for line in sorted(links[link])]
    assert not faults, "these imports close a circle:\n" + "\n".join(faults)


def test_ray_stays_at_the_edge() -> None:
    faults = [
        where(module, imported)
        for module in FILES
        if layer_of(module) != "cluster" and module not in RAY_MODULES
        for imported in imports_by_module()[module]
        if imported.module.split(".")[0] == "ray"
    ]
    assert not faults, "\n".join(faults)


def loaded_with(module: str) -> dict[str, str]:
    """Everything that importing `module` loads, with the chain of imports."""
    chains = {module: module}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        parents = [current.rsplit(".", n)[0] for n in range(1, current.count(".") + 1)]
        loads = parents + [i.module for i in imports_by_module().get(current, ()) if i.at_load]
        for name in loads:
            if name not in chains:
                chains[name] = f"{chains[current]} -> {name}"
                waiting.append(name)
    return chains


def heavy_loads(module: str, heavy: set[str]) -> list[str]:
    return [chain for name, chain in loaded_with(module).items() if name.split(".")[0] in heavy]


@pytest.mark.parametrize("module", sorted(TORCH_FREE))
def test_the_shared_arithmetic_is_free_of_torch(module: str) -> None:
    assert module in FILES, "if the module moved, change the list"
    assert not heavy_loads(module, HEAVY)


def test_the_control_plane_loads_no_torch() -> None:
    faults = [
        chain for module in modules_of("cluster") for chain in heavy_loads(module, HEAVY - {"ray"})
    ]
    assert not faults, "\n".join(faults)


def test_the_sdk_loads_neither_torch_nor_ray() -> None:
    faults = [c for m in ["kvmesh", *modules_of("client")] for c in heavy_loads(m, HEAVY)]
    assert not faults, "\n".join(faults)


def test_kernels_is_not_a_package_of_its_own() -> None:
    """With an __init__.py transformers would take it for the PyPI package `kernels`."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_package_folder_contains_only_links() -> None:
    links = {path.name: path for path in (ROOT / "kvmesh").iterdir() if path.is_symlink()}
    assert links.keys() == {*LAYERS, *CONTRACTS}
    for name, link in links.items():
        folder = f"protos/kvmesh/{name}" if name in CONTRACTS else name
        assert link.readlink() == Path("..") / folder
    others = {path.name for path in (ROOT / "kvmesh").iterdir()} - links.keys()
    assert others - {"__pycache__"} == {"__init__.py", "py.typed"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", [("torch", True)]),
        ("def f():\n  import torch", [("torch", False)]),
        ("class A:\n  import torch", [("torch", True)]),
        ("try:\n  import torch\nexcept ImportError: pass", [("torch", True)]),
        ("if TYPE_CHECKING:\n  import torch\nelse:\n  import os", [("torch", False), ("os", True)]),
        ("from . import b", [("kvmesh.x", True), ("kvmesh.x.b", True)]),
        ("from ..y import b", [("kvmesh.y", True), ("kvmesh.y.b", True)]),
    ],
)
def test_imports_are_found(source: str, expected: list[tuple[str, bool]]) -> None:
    found = imports_of(source, "kvmesh.x.a", is_package=False)
    assert [(i.module, i.at_load) for i in found] == expected
