"""What generation_config.json says about sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvmesh.cluster.config import build
from kvmesh.cluster.ingress.validate import Limits, generation_spec
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.generation_defaults import (
    DefaultSampling,
    ignored_generation_settings,
    read_sampling_defaults,
)

# As published with Qwen2.5-7B-Instruct.
QWEN = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


def model_with(directory: Path, **values: Any) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (QWEN, {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"eos_token_id": 2}, {}),
        ({"temperature": None, "top_k": None, "min_p": 0.05}, {"min_p": 0.05}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"temperature": 1}, {"temperature": 1}),
    ],
)
def test_values_of_the_file(
    tmp_path: Path, values: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert read_sampling_defaults(model_with(tmp_path, **values)).given() == expected


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"top_p": 0}, {"top_k": 1.5}, {"temperature": "hot"}, {"min_p": True}],
)
def test_a_wrong_value_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} .*neutral"):
        read_sampling_defaults(model_with(tmp_path, **values))


def test_the_embedded_model_has_defaults_of_its_own(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == DefaultSampling()
    (tmp_path / "kvmesh.json").write_text('{"name": "smollm2-135m-instruct"}')
    assert read_sampling_defaults(tmp_path).given() == {"temperature": 0.2, "top_p": 0.9}


def test_settings_that_are_not_implemented_are_known(tmp_path: Path) -> None:
    values = {"no_repeat_ngram_size": 3, "num_beams": 1, "typical_p": 0.9, "max_length": 99}
    found = ignored_generation_settings(model_with(tmp_path, **values))
    assert found == ("no_repeat_ngram_size", "typical_p")


def test_the_request_comes_before_the_settings_and_those_before_the_model(tmp_path: Path) -> None:
    path = model_with(tmp_path, **QWEN)
    config = build({"generation": {"temperature": 0.3, "min_p": 0.1}})
    defaults = config.generation.defaults(path)
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="a"), sampling_params=pb.SamplingParams(top_p=1.0)
    )
    params = generation_spec(request, Limits(), defaults).params
    assert (params.temperature, params.min_p, params.top_p, params.top_k) == (0.3, 0.1, 1.0, 20)
    assert params.repetition_penalty == 1.05
    neutral = build({"generation": {"source": "neutral", "top_k": 7}})
    assert neutral.generation.defaults(path).given() == {"top_k": 7}
    # Zero is a value.
    request.sampling_params.temperature = 0.0
    assert generation_spec(request, Limits(), defaults).params.greedy
