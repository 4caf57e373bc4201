"""What KV formats cost several models: one table of results, and a plot with a panel per model.

    kvmesh eval perplexity --model M --kv-format F,F --text FILE --windows 16 --json > part.json
    python -m benchmarks.kv_formats part.json ...

Reports of the same model on the same windows are joined, so that an evaluation may be done in
parts; models come in the order of their first report. They replace `perplexity` in the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from benchmarks.control_plane.__main__ import HERE
from kvmesh.cluster.cli.eval_plot import plot_perplexity
from kvmesh.workers.evaluation.reports import FormatPerplexity, PerplexityReport

RESULTS = HERE / "benchmarks" / "results" / "kv_formats.json"
PLOT = HERE / "docs" / "images" / "kv-formats.png"


def joined(reports: Iterable[PerplexityReport]) -> list[PerplexityReport]:
    """One report per model, with the formats of all of its parts.

    Raises ValueError for parts of a model that were not measured alike: by their conditions, and
    by the perplexity of exact KV, which tells texts apart.
    """
    found: dict[str, PerplexityReport] = {}
    for report in reports:
        first = found.setdefault(report.model, report)
        if replace(first, formats=[]) != replace(report, formats=[]):
            raise ValueError(f"the parts of {report.model} were measured in different ways")
        if first.formats[0] != report.formats[0]:
            raise ValueError(f"the parts of {report.model} were measured on different texts")
        found[report.model] = replace(first, formats=_merged(first.formats, report.formats))
    return list(found.values())


def _merged(
    formats: list[FormatPerplexity], more: list[FormatPerplexity]
) -> list[FormatPerplexity]:
    """By bits, `exact` first."""
    rows = {row.kv_format: row for row in (*formats, *more)}
    return sorted(rows.values(), key=lambda row: -row.sealed_bits)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    arguments = parser.parse_args()
    models = joined(
        msgspec.json.decode(path.read_bytes(), type=PerplexityReport) for path in arguments.reports
    )
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    results = {**kept, "perplexity": [asdict(model) for model in models]}
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    plot_perplexity(models, arguments.plot)


if __name__ == "__main__":
    main()
