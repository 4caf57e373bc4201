"""The wire contract follows its conventions, and its stubs are current."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from packaging.requirements import Requirement

from kvmesh.protos import admin, pb
from kvmesh.v1 import kvmesh_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = {
    FieldDescriptor.TYPE_DOUBLE,
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_UINT32,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_BOOL,
}


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, folder / "generate.py", "--check"], capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_stubs_are_current() -> None:
    result = check(ROOT / "protos")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_check_finds_stale_stubs(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "protos", tmp_path / "protos")
    stubs = folder / "kvmesh/v1"
    contract = stubs / "kvmesh.proto"
    contract.write_text(contract.read_text() + "\nmessage Added {}\n")
    (folder / "kvmesh/v1alpha/admin_pb2.pyi").write_text("# edited\n")
    (folder / "kvmesh/v1alpha/admin_pb2.py").unlink()
    (stubs / "forgotten_pb2.py").touch()
    result = check(folder)
    assert result.returncode == 1
    names = ("v1/kvmesh_pb2.py", "v1alpha/admin_pb2.pyi", "v1alpha/admin_pb2.py")
    for name in (*names, "v1/forgotten_pb2.py"):
        assert f"kvmesh/{name}," in result.stderr.replace(";", ",")
    subprocess.run([sys.executable, folder / "generate.py"], check=True, capture_output=True)
    assert check(folder).returncode == 0


def test_declared_versions_match_what_the_stubs_require() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {}
    for line in project["dependencies"]:
        requirement = Requirement(line)
        (floor,) = (s.version for s in requirement.specifier if s.operator == ">=")
        floors[requirement.name] = floor
    stub = (ROOT / "protos/kvmesh/v1/kvmesh_pb2.py").read_text()
    found = re.search(r"^# Protobuf Python Version: (\S+)$", stub, re.MULTILINE)
    assert found is not None
    del floors["googleapis-common-protos"]
    assert floors == {
        "protobuf": found[1],
        "grpcio": kvmesh_pb2_grpc.GRPC_GENERATED_VERSION,
    }


def messages() -> Iterator[Descriptor]:
    for file in (pb.DESCRIPTOR, admin.DESCRIPTOR):
        yield from file.message_types_by_name.values()


def test_enums_begin_with_unspecified() -> None:
    for name, enum in pb.DESCRIPTOR.enum_types_by_name.items():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)


@pytest.mark.parametrize("name", ["SamplingParams", "GenerateRequest"])
def test_numbers_of_requests_can_be_unset(name: str) -> None:
    for field in pb.DESCRIPTOR.message_types_by_name[name].fields:
        if field.type in NUMBERS and not field.is_repeated:
            assert field.has_presence, field.full_name


def test_names_carry_their_units() -> None:
    times = re.compile(r"(time|timeout|wait|delay|after)(_|$)")
    for message in messages():
        for field in message.fields:
            if field.type == FieldDescriptor.TYPE_DOUBLE and times.search(field.name):
                assert field.name.endswith("_s"), field.full_name


def test_the_service_has_exactly_these_methods() -> None:
    service = pb.DESCRIPTOR.services_by_name["KVMesh"]
    assert service.full_name == "kvmesh.v1.KVMesh"
    assert {method.name for method in service.methods} == {
        "Generate",
        "GenerateStream",
        "Tokenize",
        "Detokenize",
        "Abort",
        "EstimateBudget",
        "Explain",
        "GetModelInfo",
        "GetTenantLoads",
    }
    assert [method.name for method in service.methods if method.server_streaming] == [
        "GenerateStream"
    ]


def test_a_million_token_ids_are_packed() -> None:
    ids = pb.TokenIds(ids=[100_000] * 2**20)
    assert ids.ByteSize() < 3 * 2**20 + 16
