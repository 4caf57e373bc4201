"""`make dashboards`: writes what follows from the table of metrics; --check compares instead."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from dashboards.alerts import rules
from dashboards.grafana import to_json
from dashboards.panels import DASHBOARDS
from dashboards.reference import page

ROOT = Path(__file__).resolve().parents[1]
FILES = Path("helm/kvmesh/files")


def made() -> dict[Path, str]:
    """The text of each file, by its path in the repository."""
    alerts = yaml.safe_dump(rules(), sort_keys=False, width=10_000)
    return {
        Path("docs/metrics.md"): page(),
        FILES / "alerts/kvmesh.yaml": alerts,
        **{
            FILES / f"dashboards/kvmesh-{x.name}.json": json.dumps(to_json(x), indent=2) + "\n"
            for x in DASHBOARDS
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a file is not current")
    check = parser.parse_args().check
    stale = []
    for name, text in made().items():
        path = ROOT / name
        if path.exists() and path.read_text("utf-8") == text:
            continue
        stale.append(str(name))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    if check and stale:
        print(f"not current; run `make dashboards`: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
