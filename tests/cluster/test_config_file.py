"""YAML files of settings: strict, with one line for each problem."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvmesh.cluster.config_file import MAX_FILE_BYTES, SettingsFile, parse_value, read_file
from kvmesh.workers.errors import ConfigError


def read(tmp_path: Path, text: str) -> SettingsFile:
    path = tmp_path / "kvmesh.yaml"
    path.write_text(text, encoding="utf-8")
    return read_file(path)


@pytest.mark.parametrize("text", ["", "# nothing set\n", "null", "---\n", "{}"])
def test_a_file_may_set_nothing(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text).values == {}


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = """
    numbers: [1, -1, 010, 0x1F, 0o17, 1.5, .5, 1e9, -1.5e-3, .inf]
    switches: [true, False, TRUE]
    nothing: [null, ~, ]
    text: [off, on, yes, no, 1:30, 1_000, 2024-01-01, "1", 'true', int8]
    empty:
    """
    values = read(tmp_path, text).values
    assert values == {
        "numbers": [1, -1, 10, 31, 15, 1.5, 0.5, 1e9, -1.5e-3, math.inf],
        "switches": [True, False, True],
        "nothing": [None, None],
        "text": ["off", "on", "yes", "no", "1:30", "1_000", "2024-01-01", "1", "true", "int8"],
        "empty": None,
    }
    assert [type(x) for x in values["numbers"][:5]] == [int] * 5
    assert read(tmp_path, "a: " + "9" * 5000).values == {"a": math.inf}


def test_a_key_that_occurs_twice_is_reported_with_both_lines(tmp_path: Path) -> None:
    text = "engine:\n  tp: 1\ngroups:\n- {tp: 1, tp: 2}\nengine:\n  tp: 2\nengine: {}\n"
    file = read(tmp_path, text)
    assert file.values == {"engine": {"tp": 1}, "groups": [{"tp": 1}]}
    name = tmp_path / "kvmesh.yaml"
    assert list(map(str, file.problems)) == [
        f"groups.0.tp: is set twice in {name}, on line 4 and on line 4",
        f"engine: is set twice in {name}, on line 1 and on line 5",
        f"engine: is set twice in {name}, on line 1 and on line 7",
    ]


def test_the_lines_of_values_are_kept(tmp_path: Path) -> None:
    file = read(tmp_path, "model: m\nengine:\n\n  tp: 2\ngroups:\n- tp: 1\n-\n  tp: 2\n")
    assert file.lines[("model",)] == 1
    assert file.lines[("engine", "tp")] == 4
    assert file.lines[("groups", "0", "tp")] == 6
    assert file.lines[("groups", "1", "tp")] == 8


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = """
groups:
- &small {kv_format: int8, max_num_seqs: 4}
- <<: *small
  kv_format: k4v4
- <<: [{max_num_seqs: 2}, *small]
- *small
- <<: {tp: 2, max_num_seqs: 8}
  <<: *small
"""
    file = read(tmp_path, text)
    assert file.values["groups"] == [
        {"kv_format": "int8", "max_num_seqs": 4},
        {"kv_format": "k4v4", "max_num_seqs": 4},
        {"kv_format": "int8", "max_num_seqs": 2},
        {"kv_format": "int8", "max_num_seqs": 4},
        {"kv_format": "int8", "max_num_seqs": 8, "tp": 2},
    ]
    assert not file.problems
    assert file.lines[("groups", "1", "kv_format")] == 5
    assert file.lines[("groups", "1", "max_num_seqs")] == 3


BOMB = "a0: &a0 [1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- 1\n- 2\n", "must contain a mapping of settings, got a list"),
        ("just text", "must contain a mapping of settings, got a single value"),
        ("a: [", "line 1, column 5: .* expected the node content"),
        ("a: 1\n\t- tab", "line 2, column 1: .* cannot start any token"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: expected a single document"),
        ("a: *nowhere", "line 1, column 4: found undefined alias"),
        ("a: &x [1, *x]", "line 1, column 4: an alias is within what it repeats"),
        ("a: &x {<<: *x}", "an alias is within what it repeats"),
        (BOMB, "aliases repeat too much"),
        ("[" * 1000, "nested too deeply"),
        ("<<: 3", "line 1, column 5: << merges mappings only"),
        ("[a]: 1", "line 1, column 1: a key must be a single word"),
        ("a: !!python/object/apply:os.system [ls]", "the tag .*os.system is not known"),
        ("a: !include other.yaml", "line 1, column 4: the tag !include is not known"),
        ("a: !!set {x}", "the tag .*set is not known"),
        ("a: !!int many", "'many' does not fit the tag"),
        ("a: \x07", "special characters are not allowed"),
    ],
)
def test_a_file_that_is_not_settings_is_refused_in_one_line(
    tmp_path: Path, text: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        read(tmp_path, text)
    assert caught.value.field == "config"
    assert str(tmp_path / "kvmesh.yaml") in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: No such file"):
        read_file(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_file(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes("groups: 1\nmodel: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="line 2 is not UTF-8"):
        read_file(path)
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="is larger than"):
        read_file(path)
    path.write_bytes("\ufeffgroups: 2".encode())  # as some editors begin files
    assert read_file(path).values == {"groups": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8Gi", "8Gi"),
        ("2", "2"),
        ("true", "true"),
        ("a: b # c", "a: b # c"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'null'", "null"),
        ('"a b"', "a b"),
        ("[{kv_format: int8}, {tp: 2}]", [{"kv_format": "int8"}, {"tp": 2}]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_values_of_the_environment_and_the_command_line(text: str, value: object) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["[1", "{a: 1, a: 2}", "{a: &x [*x]}", "'", "[a] b"])
def test_a_value_that_is_not_yaml_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not valid YAML|is set twice") as caught:
        parse_value(text)
    assert "\n" not in str(caught.value)
