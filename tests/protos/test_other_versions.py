"""Clients and servers of other versions: what one has that the other does not know.

`before_the_lock.binpb` has the contract before its first lock; today's must serve its clients.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from kvmesh.client import Client, FakeTransport
from kvmesh.protos import pb

RECORDED = Path(__file__).parent / "before_the_lock.binpb"
PROTOS = Path(__file__).resolve().parents[2] / "protos"


def old(name: str) -> Any:
    """A message class of the recorded contract."""
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(RECORDED.read_bytes()).file:
        pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(f"kvmesh.v1.{name}"))


def unknown(message: Message) -> Iterator[str]:
    fields: Any = UnknownFieldSet(message)
    yield from (f"{message.DESCRIPTOR.name}.{field.field_number}" for field in fields)
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for part in value if field.is_repeated else (value,):
            yield from unknown(part)


def test_a_request_without_new_options_is_one_that_old_servers_know() -> None:
    fake = FakeTransport()
    client = Client(transport=fake)
    client.generate("hi", temperature=0.5, stop=["x"], logprobs=2, timeout_s=5, priority=1)
    client.chat([{"role": "user", "content": "hi"}], max_tokens=4)
    client.estimate([1, 2, 3], max_tokens=4)
    for sent, name in zip(
        fake.server.requests,
        ("GenerateRequest", "GenerateRequest", "EstimateBudgetRequest"),
        strict=True,
    ):
        received = old(name).FromString(sent.SerializeToString())
        assert not list(unknown(received))
        assert received.SerializeToString() == sent.SerializeToString()


@pytest.mark.parametrize(
    ("option", "unknown_there"),
    [
        ({"allowed_kv_formats": ["int8"]}, "GenerateRequest.10"),
        ({"max_kv_divergence_nats": 0.5}, "GenerateRequest.11"),
        ({"continue_final_message": True}, "Chat.4"),
    ],
)
def test_new_options_are_visible_as_unknown_fields(option: Any, unknown_there: str) -> None:
    """Servers since the lock refuse them, see ingress/unknown_fields.py."""
    fake = FakeTransport()
    Client(transport=fake).chat([{"role": "assistant", "content": "hi"}], **option)
    sent = fake.server.requests[0].SerializeToString()
    assert list(unknown(old("GenerateRequest").FromString(sent))) == [unknown_there]


def test_requests_of_old_clients_mean_the_same_today() -> None:
    request = old("GenerateRequest")(
        request_id="r",
        prompt={"chat": {"messages": [{"role": "user", "content": "hi"}]}},
        sampling_params={"temperature": 0.0, "max_tokens": 3, "stop": ["x"], "logit_bias": {1: 2}},
        timeout_s=9,
        resume={"choices": [{"token_ids": [1, 2]}], "model_revision": "m"},
    )
    today = pb.GenerateRequest.FromString(request.SerializeToString())
    assert not list(unknown(today))
    for field, value in request.ListFields():
        assert str(getattr(today, field.name)) == str(value)


def test_replies_of_today_are_read_by_old_clients() -> None:
    event = pb.GenerateStreamResponse(
        delta=pb.Delta(text="hi", token_ids=[1], token_offset=4, logprobs=pb.Logprobs(chosen=[-1]))
    )
    read = old("GenerateStreamResponse").FromString(event.SerializeToString())
    assert (read.delta.text, list(read.delta.token_ids), read.delta.token_offset) == ("hi", [1], 4)
    assert not read.delta.logprobs
    usage = pb.Usage(prompt_tokens=3, cached_tokens_by_tier={"device": 2}, group="g0")
    read = old("Usage").FromString(usage.SerializeToString())
    assert (read.prompt_tokens, read.group) == (3, "g0")


def test_stubs_made_from_the_files_fit_those_of_the_sdk(tmp_path: Path) -> None:
    """A second descriptor of a file is accepted only if it has the same name and content."""
    names = ("kvmesh/v1/kvmesh.proto", "kvmesh/v1alpha/admin.proto")
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"]
    subprocess.run([*protoc, f"--python_out={tmp_path}", *names], check=True)
    stubs = sorted(tmp_path.rglob("*_pb2.py"))
    assert len(stubs) == len(names)
    for stub in stubs:
        exec(stub.read_text(), {"__name__": "stubs_of_a_user"})


def test_the_recorded_contract_is_the_one_before() -> None:
    (file,) = FileDescriptorSet.FromString(RECORDED.read_bytes()).file
    assert isinstance(file, FileDescriptorProto)
    assert file.name == "kvmesh/protos/kvmesh/v1/kvmesh.proto"
