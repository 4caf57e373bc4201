"""The import graph of the folders, which CONTRIBUTING.md shows: `make graph` draws it there."""

from __future__ import annotations

import argparse
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.repo.imports import LAYERS, ROOT, Import, imports_by_module, layer_of, module_files

PAGE = ROOT / "CONTRIBUTING.md"
BEGIN = "<!-- import graph, drawn by `make graph` -->\n```\n"
END = "```\n<!-- end of the import graph -->\n"
# Layers that are drawn by sub-package, in columns of these widths.
DRAWN_BY_FOLDER = {"cluster", "workers"}
NAME_WIDTH, PAGE_WIDTH = 20, 96

Link = tuple[str, str]


def unit_of(module: str, root: Path = ROOT) -> str | None:
    """What a module of ours belongs to: a sub-package of a layer, or a file directly in one.

    None for a layer itself and for what is not ours.
    """
    parts = module.split(".")
    if parts[0] != "kvmesh" or len(parts) < 3 or parts[1] not in LAYERS:
        return None
    name = "/".join(parts[1:3])
    return name if (root / name).is_dir() else f"{name}.py"


def drawn_unit_of(module: str) -> str | None:
    """The line of the drawing that a module is in: a layer, or a sub-package of a large one."""
    layer = layer_of(module)
    if layer is None:
        return None
    if layer not in DRAWN_BY_FOLDER:
        return layer
    unit = unit_of(module)
    return layer if unit is not None and unit.endswith(".py") else unit


def links_between(
    unit_of: Callable[[str], str | None],
    files: dict[str, Path],
    imports: dict[str, list[Import]],
    *,
    at_load: bool = True,
) -> dict[Link, set[str]]:
    """(importing unit, imported unit) -> the lines that import, as file:line.

    at_load: only what importing the one loads of the other; otherwise all imports, those in
        functions and for type checkers included
    """
    links: dict[Link, set[str]] = defaultdict(set)
    for module, found in imports.items():
        source = unit_of(module)
        for imported in found:
            name = _module_in(imported.module, files)
            target = unit_of(name)
            if source is None or target in (None, source) or (at_load and not imported.at_load):
                continue
            where = f"{files[module].relative_to(ROOT)}:{imported.line}"
            links[source, target].add(f"{where} imports {name}")
    return dict(links)


def _module_in(name: str, files: dict[str, Path]) -> str:
    """The module that an imported name is, or is in: `a.b.Class` -> `a.b`."""
    while name not in files and name.count(".") > 1:
        name = name.rpartition(".")[0]
    return name


def cyclic(links: Iterable[Link]) -> set[Link]:
    """The links that lie on a circle: whose target leads back to their source."""
    links = set(links)
    reached = _reached(links)
    return {(a, b) for a, b in links if a in reached[b]}


def _reached(links: set[Link]) -> dict[str, set[str]]:
    """For each unit, all that its links lead to, directly or through others."""
    targets: dict[str, set[str]] = defaultdict(set)
    for source, target in links:
        targets[source].add(target)
    reached: dict[str, set[str]] = defaultdict(set)
    for start in list(targets):
        waiting = [start]
        while waiting:
            new = targets.get(waiting.pop(), set()) - reached[start]
            reached[start] |= new
            waiting.extend(new)
    return reached


def drawing() -> str:
    """A line a unit, importers first."""
    files = module_files()
    imports = imports_by_module()
    at_load = set(links_between(drawn_unit_of, files, imports))
    later = set(links_between(drawn_unit_of, files, imports, at_load=False)) - at_load
    units = {unit for module in files if (unit := drawn_unit_of(module)) is not None}
    order = _importers_first(units, at_load)
    return "".join(_line(unit, order, at_load, later) for unit in order)


def _importers_first(units: set[str], links: set[Link]) -> list[str]:
    """An order in which units import only later ones, but for circles."""
    reached = _reached(links)
    left, order = set(units), []
    while left:
        importers = {unit: {a for a, b in links if b == unit and a in left} for unit in left}
        ready = [unit for unit in left if importers[unit] <= reached[unit]]
        first = min(ready, key=lambda unit: (len(importers[unit]), unit))
        left.remove(first)
        order.append(first)
    return order


def _line(unit: str, order: list[str], at_load: set[Link], later: set[Link]) -> str:
    def words(links: set[Link], form: str) -> list[str]:
        return [form.format(name) for name in order if (unit, name) in links]

    above = {(unit, name) for name in order[: order.index(unit)]} & at_load
    names = [*words(at_load - above, "{}"), *words(above, "↑{}"), *words(later, "({})")]
    return (
        textwrap.fill(
            ", ".join(names) or "–",
            PAGE_WIDTH,
            initial_indent=unit.ljust(NAME_WIDTH),
            subsequent_indent=" " * NAME_WIDTH,
            break_on_hyphens=False,
        )
        + "\n"
    )


def page_with(graph: str, page: str) -> str:
    """The page with this graph in its place."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no place for the graph: {BEGIN!r} to {END!r}")
    return f"{before}{BEGIN}{graph}{END}{after}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page_with(drawing(), PAGE.read_text("utf-8")), "utf-8")
    print(f"{PAGE.name} shows the imports as they are now.")


if __name__ == "__main__":
    main()
