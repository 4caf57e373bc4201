"""Reports of one model's formats, joined."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.kv_formats import joined
from kvmesh.workers.evaluation.reports import FormatPerplexity, PerplexityReport


def row(name: str, bits: float, perplexity: float = 20.0) -> FormatPerplexity:
    return FormatPerplexity(name, perplexity, 0.0, 0.0, None, bits, bits, bits, 1.0, 0, 0)


def report(*formats: FormatPerplexity, model: str = "a", windows: int = 16) -> PerplexityReport:
    rows = [row("exact", 16.0), *formats]
    return PerplexityReport(model, "r", "float32", "exact", 64, 1024, windows, 100, rows)


def test_parts_of_a_model_are_joined_by_bits() -> None:
    first = report(row("int4", 4.5), row("int8", 8.5))
    parts = [first, report(row("int8", 8.5), model="b"), report(row("k8v4", 6.4))]
    a, b = joined(parts)
    assert [x.kv_format for x in a.formats] == ["exact", "int8", "k8v4", "int4"]
    assert (a.model, b.model, len(b.formats)) == ("a", "b", 2)


def test_parts_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="different ways"):
        joined([report(), report(windows=4)])
    other = replace(report(), formats=[row("exact", 16.0, perplexity=21.0)])
    with pytest.raises(ValueError, match="different texts"):
        joined([report(), other])
