"""`kvmesh eval` and `kvmesh formats`: their output, and their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvmesh.cluster.cli.eval_plot import plot_perplexity
from kvmesh.cluster.cli.formats_command import describe
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.workers.evaluation.reports import FormatPerplexity, PerplexityReport
from tests.in_process import run_kvmesh
from tests.model.small import make_small_model, make_small_tokenizer
from tests.repo.imports import ROOT

TEXT = str(ROOT / "LICENSE")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("evaluated")
    vocab_size = make_small_tokenizer(folder)
    make_small_model(
        "LlamaForCausalLM", folder, vocab_size=vocab_size, max_position_embeddings=1024
    )
    return str(folder)


def run(*arguments: str) -> Result:
    return run_kvmesh(arguments, env={"COLUMNS": "80", "TERM": "dumb"})


def evaluate(command: str, model: str, *arguments: str) -> Result:
    common = ("--model", model, "--text", TEXT, "--page-size", "16", "--kv-format", "int8,4")
    return run("eval", command, *common, *arguments)


def printed(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
def test_perplexity_as_json_and_as_a_plot(model: str, tmp_path: Path) -> None:
    plot = tmp_path / "bits.png"
    arguments = ("--context", "200", "--windows", "2", "--json", "--plot", str(plot))
    report = printed(evaluate("perplexity", model, *arguments))
    assert (report["context"], report["windows"], report["predictions"]) == (200, 2, 398)
    exact, int8, int4 = report["formats"]
    assert [row["kv_format"] for row in report["formats"]] == ["exact", "int8", "int4"]
    assert exact["loss"] == exact["kl_nats"] == 0.0
    assert 0.0 < int8["kl_nats"] < int4["kl_nats"]
    assert 0.0 < int8["kl_error_nats"] < int8["kl_nats"]
    assert 16.0 == exact["bits"] > int8["bits"] > int8["sealed_bits"]
    assert plot.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_recall_as_json(model: str) -> None:
    report = printed(
        evaluate("recall", model, "--lengths", "500,300,300", "--passages", "1", "--json")
    )
    assert report["passages"] == {"300": 1, "500": 1}
    assert [(row["length"], row["kv_format"]) for row in report["figures"]] == [
        (length, name) for length in (300, 500) for name in ("exact", "int8", "int4")
    ]


@pytest.mark.slow
def test_passkey_as_json(model: str) -> None:
    arguments = ("--lengths", "600", "--depths", "2", "--seeds", "1", "--json")
    report = printed(evaluate("passkey", model, *arguments))
    for row in report["figures"]:
        assert row["asked"] == 2 == row["found"] + len(row["missed_depths"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments", "shown"),
    [
        ("perplexity", ("--context", "200", "--windows", "1"), "at 200"),
        ("recall", ("--lengths", "300", "--passages", "1"), "accuracy"),
        ("passkey", ("--lengths", "500", "--depths", "1"), "of 1"),
    ],
)
def test_tables_fit_eighty_columns(
    model: str, command: str, arguments: tuple[str, ...], shown: str
) -> None:
    result = evaluate(command, model, *arguments)
    assert result.exit_code == 0, result.output
    assert shown in result.stdout
    assert all(name in result.stdout for name in ("exact", "int8", "int4"))
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("perplexity", "--kv-format", "int9"), "--kv-format"),
        (("perplexity", "--context", "2000"), "--context"),
        (("perplexity", "--context", "1"), "--context"),
        (("perplexity", "--text", "no/such/file"), "--text"),
        (("perplexity", "--context", "200", "--text", "{short}"), "--text"),
        (("perplexity", "--text", "{latin}"), "--text"),
        (("perplexity", "--page-size", "17"), "--page-size"),
        (("perplexity", "--dtype", "float8"), "--dtype"),
        (("perplexity", "--model", "no such model"), "--model"),
        (("perplexity", "--plot", "no/such/folder/a.png"), "--plot"),
        (("perplexity", "--windows", "0"), "--windows"),
        (("recall", "--lengths", "many"), "--lengths"),
        (("recall", "--lengths", "100"), "--lengths"),
        (("recall", "--lengths", "1024"), "--lengths"),
        (("passkey", "--lengths", "60"), "--lengths"),
        (("passkey", "--lengths", "4096"), "--lengths"),
    ],
)
def test_an_invalid_value_is_refused_by_its_option(
    model: str, tmp_path: Path, arguments: tuple[str, ...], option: str
) -> None:
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("Too little.", encoding="utf-8")
    latin.write_bytes("é".encode("latin-1"))
    places = {"{short}": str(short), "{latin}": str(latin)}
    command, *rest = (places.get(argument, argument) for argument in arguments)
    result = evaluate(command, model, *rest)
    assert result.exit_code == 2
    assert option in result.stderr
    assert "Traceback" not in result.output and not result.stdout


def test_every_format_is_listed() -> None:
    lines = json.loads(run("formats", "--head-dim", "64", "--page-size", "32", "--json").stdout)
    assert [line["name"] for line in lines] == list(format_names())
    by_name = {line["name"]: line for line in lines}
    int4 = by_name["int4"]
    assert (int4["k_bits"], int4["v_bits"], int4["bits"]) == (4.5, 4.5, 4.5)
    assert int4["capacity"] == pytest.approx(16 / 4.5)
    assert "4" in int4["aliases"] and not int4["needs_calibration"]
    slow = [line["name"] for line in lines if line["comparison"]]
    assert "nuq3" in slow and "int4" not in slow
    for line in lines:
        assert line["bits"] == get_format(line["name"]).bits_per_element(32, 64)
        assert (line["k_bits"] + line["v_bits"]) / 2 == pytest.approx(line["bits"])
    result = run("formats")
    assert all(name in result.stdout for name in format_names())
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_a_format_that_does_not_support_a_head_size_has_no_bits() -> None:
    line = describe(get_format("int4"), 7, 64)
    assert (line.k_bits, line.v_bits, line.bits, line.capacity) == (None, None, None, None)
    assert "–" in run("formats", "--head-dim", "7").stdout


def test_formats_refuses_an_unsupported_page_size() -> None:
    result = run("formats", "--page-size", "48")
    assert result.exit_code == 2 and "--page-size" in result.stderr


LOSSES = [[], [-0.001], [0.0001, 0.02, 0.02, 30.0]]


@pytest.mark.parametrize("reports", [*([losses] for losses in LOSSES), LOSSES])
def test_any_losses_can_be_plotted(reports: list[list[float]], tmp_path: Path) -> None:
    """A list of losses for each report."""
    rows = [
        [
            FormatPerplexity(f"f{i}", 20.0, loss, 0.0, None, 4.0, 4.0 + i % 2, 4.0, 1000.0, 0, 0)
            for i, loss in enumerate([0.0, *losses])
        ]
        for losses in reports
    ]
    made = [PerplexityReport("m", "r", "float32", "exact", 64, 2048, 1, 2047, x) for x in rows]
    plot_perplexity(made, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
