"""A class name exists once, so that an error message or a search names one thing."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.repo.imports import ROOT, module_files


def class_places() -> dict[str, list[str]]:
    """Where each class name is defined, as file:line; generated stubs left out."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in module_files().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return places


def test_a_class_name_exists_once() -> None:
    shared = {name: found for name, found in class_places().items() if len(found) > 1}
    faults = [f"{name}: {', '.join(found)}" for name, found in sorted(shared.items())]
    assert not faults, "these classes share a name:\n" + "\n".join(faults)
