"""A class name exists once, so that an error message or a search names one thing."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.repo.imports import ROOT, module_files

# How many classes still share a name. Each wants renaming, or merging. None may be added.
KNOWN_DUPLICATES = {
    "Asked": 2,
    "CapacityError": 2,
    "Choice": 3,
    "DrainingError": 2,
    "DuplicateRequestError": 2,
    "Engine": 2,
    "EngineInfo": 2,
    "EngineLoads": 2,
    "Estimate": 2,
    "FinishReason": 2,
    "InvalidRequestError": 2,
    "LatencySummary": 2,
    "LeaseTerms": 2,
    "NeverFitsError": 2,
    "OverCapacityError": 2,
    "PoolLoads": 2,
    "Queued": 2,
    "Router": 2,
    "Tables": 2,
    "TokenLogprobs": 2,
}


def class_places() -> dict[str, list[str]]:
    """Where each class name is defined, as file:line; generated stubs left out."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in module_files().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return places


def test_a_class_name_exists_once() -> None:
    duplicates = {name: found for name, found in class_places().items() if len(found) > 1}
    added = [
        f"{name}: {', '.join(found)}"
        for name, found in sorted(duplicates.items())
        if len(found) > KNOWN_DUPLICATES.get(name, 1)
    ]
    assert not added, "these names are taken:\n" + "\n".join(added)
    counts = {name: len(found) for name, found in duplicates.items()}
    assert counts == KNOWN_DUPLICATES, "some names are unique now: update KNOWN_DUPLICATES"
