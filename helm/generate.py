"""Write what follows from the code and from values.yaml: the chart's schema, table and constants.

python helm/generate.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.config_text import json_schema
from kvmesh.cluster.environment import (
    DRAIN_VARIABLE,
    MARGIN_BYTES,
    NODE_DRAIN_MARGIN_S,
    SERVE_VARIABLES,
    SIZE_VARIABLES,
)
from kvmesh.cluster.serve_config import APP_NAME, BUILDER, GRPC_PORT, HTTP_PORT, SERVICER

CHART = Path(__file__).resolve().parent / "kvmesh"
SHAPES = CHART.parent / "values.shapes.yaml"
# What the chart decides itself, and what only `kvmesh serve` can do.
SECTIONS_LEFT_OUT = ("ray", "layout")
SETTINGS_OF_THE_CHART = {
    ("IngressSection", "host"),
    ("MetricsSection", "port"),
    ("AuthSection", "key_file"),
    ("AuthSection", "key_directory"),
}
# Settings that the chart calculates with, which templates cannot do with units.
PLAIN_NUMBERS = {("IngressSection", "max_request_bytes"), ("TimeoutSection", "drain_s")}
_COMMENT = re.compile(r"^ *# (-- )?(.*)$")
_KEY = re.compile(r"^( *)([\w-]+):(.*)$")


def generated() -> str:
    """files/generated.yaml: what templates need to know of the code."""
    defaults = ClusterConfig()
    values = {
        "application": APP_NAME,
        "builder": BUILDER,
        "servicer": SERVICER,
        "grpcPort": GRPC_PORT,
        "httpPort": HTTP_PORT,
        "drainSeconds": defaults.timeouts.drain_s,
        "nodeDrainMarginSeconds": NODE_DRAIN_MARGIN_S,
        "drainVariable": DRAIN_VARIABLE,
        "maxRequestBytes": defaults.ingress.max_request_bytes,
        "marginBytes": MARGIN_BYTES,
        "sizeVariables": list(SIZE_VARIABLES),
        "variables": dict(SERVE_VARIABLES),
    }
    return "# Written by helm/generate.py.\n" + yaml.safe_dump(values, sort_keys=False)


def schema() -> str:
    """values.schema.json: the chart's shapes, and the settings as the code describes them."""
    document: dict[str, Any] = yaml.safe_load(SHAPES.read_text("utf-8"))
    settings = json_schema()
    definitions = settings.pop("$defs")
    settings.pop("$schema")
    for name in SECTIONS_LEFT_OUT:
        settings["properties"].pop(name)
        definitions.pop(f"{name.title()}Section")
    for section, name in SETTINGS_OF_THE_CHART:
        definitions[section]["properties"].pop(name)
    for section, name in PLAIN_NUMBERS:
        field = definitions[section]["properties"][name]
        (number,) = (kind for kind in field.pop("anyOf") if kind["type"] != "string")
        field |= number
    document["$defs"] |= {**definitions, "Settings": settings}
    document["properties"]["config"] = {"$ref": "#/$defs/Settings"}
    return json.dumps(document, indent=2) + "\n"


def table() -> str:
    """The rows of the values, with their comments and defaults."""
    lines = ["| value | default | |", "|---|---|---|"]
    for path, comment in documented():
        default = json.dumps(_value_at(path), separators=(", ", ": "))
        cells = (f"`{'.'.join(path)}`", f"`{default}`", comment)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def documented() -> Iterator[tuple[tuple[str, ...], str]]:
    """The path and the comment of each value that has one, in order."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in (CHART / "values.yaml").read_text("utf-8").splitlines():
        if found := _COMMENT.match(line):
            comment = [found[2]] if found[1] else [*comment, found[2]] if comment else []
        elif found := _KEY.match(line):
            indent = len(found[1])
            path = [(at, name) for at, name in path if at < indent] + [(indent, found[2])]
            if comment:
                yield tuple(name for _, name in path), " ".join(comment)
            comment = []
        else:
            comment = []


def _value_at(path: tuple[str, ...]) -> Any:
    value = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    for name in path:
        value = value[name]
    return value


def page() -> str:
    """README.md: what stands above the table, and the table."""
    text = (CHART / "README.md").read_text("utf-8")
    head, mark, _ = text.partition("<!-- values, by helm/generate.py -->\n")
    return f"{head}{mark}\n{table()}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check: bool = parser.parse_args().check
    stale = []
    for name, fresh in (
        ("files/generated.yaml", generated()),
        ("values.schema.json", schema()),
        ("README.md", page()),
    ):
        path = CHART / name
        if not check:
            path.write_text(fresh, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != fresh:
            stale.append(name)
    if stale:
        print(f"helm/kvmesh: {', '.join(stale)} stale; run `make chart`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
