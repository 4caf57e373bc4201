"""Stubs for Go and TypeScript can be generated from the contract's files as they are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmesh.protos import pb

PROTOS = Path(__file__).resolve().parents[2] / "protos"
NAMES = ("kvmesh/v1/kvmesh.proto", "kvmesh/v1alpha/admin.proto")
PACKAGES = ("@bufbuild/protoc-gen-es@2.17.0", "@bufbuild/protobuf@2.17.0")
READ = """
import { readFileSync, writeFileSync } from "node:fs";
import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { GenerateRequestSchema } from "./kvmesh/v1/kvmesh_pb.js";
import { Admin } from "./kvmesh/v1alpha/admin_pb.js";
const request = fromBinary(GenerateRequestSchema, readFileSync("request"));
if (Admin === undefined || request.prompt.kind.value !== "hi") throw new Error("not read");
request.samplingParams.maxTokens = 7;
writeFileSync("reply", toBinary(GenerateRequestSchema, request));
"""


def protoc(*arguments: str | Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *arguments, *NAMES], check=True
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_typescript(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"type": "module", "private": true}')
    npm = ["npm", "install", "--no-audit", "--no-fund", "--silent", *PACKAGES]
    subprocess.run(npm, cwd=tmp_path, check=True, timeout=300)
    plugin = tmp_path / "node_modules/.bin/protoc-gen-es"
    for target in ("js", "dts"):
        protoc(f"--plugin=protoc-gen-es={plugin}", f"--es_out=target={target}:{tmp_path}")
    assert "maxTokens?: number" in (tmp_path / "kvmesh/v1/kvmesh_pb.d.ts").read_text()
    request = pb.GenerateRequest(prompt=pb.Prompt(text="hi"))
    request.sampling_params.seed = 2**64 - 1
    (tmp_path / "request").write_bytes(request.SerializeToString())
    (tmp_path / "read.js").write_text(READ)
    subprocess.run(["node", "read.js"], cwd=tmp_path, check=True, timeout=300)
    request.sampling_params.max_tokens = 7
    assert pb.GenerateRequest.FromString((tmp_path / "reply").read_bytes()) == request


@pytest.mark.skipif(shutil.which("protoc-gen-go") is None, reason="needs protoc-gen-go")
def test_go(tmp_path: Path) -> None:
    protoc(f"--go_out={tmp_path}", "--go_opt=module=github.com/kvmesh/kvmesh")
    stub = (tmp_path / "protos/kvmesh/v1/kvmesh.pb.go").read_text()
    assert "package kvmeshv1" in stub
    assert "MaxTokens *int32" in " ".join(stub.split())
