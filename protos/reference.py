"""Write docs/grpc.md from the comments in the wire contract, or check that it is current.

python protos/reference.py [--check]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs/grpc.md"
HEAD = """# gRPC reference

Generated from the comments in `protos/` by `make protos`; edit those. For Python there is
[an SDK](sdk.md).

Clients in other languages are generated from `protos/kvmesh/v1/kvmesh.proto`, whose path and
package are conventional:

```
protoc -Iprotos --go_out=out --go-grpc_out=out kvmesh/v1/kvmesh.proto     # Go
protoc -Iprotos --es_out=target=ts:out kvmesh/v1/kvmesh.proto             # TypeScript
```

A running server describes itself by gRPC reflection, to callers with a key:

```
grpcurl -plaintext -H "authorization: Bearer $KEY" 127.0.0.1:9000 describe kvmesh.v1.KVMesh
```
"""
# Field numbers within descriptor.proto, of which paths to comments consist.
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS, METHODS, VALUES, SYNTAX = 2, 2, 2, 12

Place = tuple[int, ...]


def page(files: FileDescriptorSet) -> str:
    """files: with their comments"""
    ours = [file for file in files.file if file.package.startswith("kvmesh.")]
    return "\n".join([HEAD, *(line for file in ours for line in _file(file))]) + "\n"


def _file(file: FileDescriptorProto) -> Iterator[str]:
    comments = {
        tuple(place.path): place.leading_comments for place in file.source_code_info.location
    }
    opening = next(
        (
            comment
            for place in file.source_code_info.location
            if tuple(place.path) == (SYNTAX,)
            for comment in (*place.leading_detached_comments, place.leading_comments)
            if comment
        ),
        "",
    )
    yield f"## {file.package}\n"
    yield f"```text\n{_unindented(opening)}\n```\n"
    for index, service in enumerate(file.service):
        yield from _service(service, (SERVICES, index), comments)
    for index, message in enumerate(file.message_type):
        yield from _message(message, (MESSAGES, index), comments)
    for index, enum in enumerate(file.enum_type):
        yield from _enum(enum, (ENUMS, index), comments)


def _service(
    service: ServiceDescriptorProto, path: Place, comments: dict[Place, str]
) -> Iterator[str]:
    yield f"### Service {service.name}\n"
    for index, method in enumerate(service.method):
        stream = "stream " if method.server_streaming else ""
        types = f"`{_short(method.input_type)}` → {stream}`{_short(method.output_type)}`"
        about = _one_line(comments.get((*path, METHODS, index), ""))
        yield f"- **{method.name}**: {types}. {about}".rstrip()
    yield ""


def _message(message: DescriptorProto, path: Place, comments: dict[Place, str]) -> Iterator[str]:
    yield f"### {message.name}\n"
    if about := _one_line(comments.get(path, "")):
        yield f"{about}\n"
    if message.field:
        yield from _table(
            ("number", "field", "type", ""),
            [
                (
                    str(field.number),
                    f"`{field.name}`",
                    _type(field, message),
                    _one_line(comments.get((*path, FIELDS, index), "")),
                )
                for index, field in enumerate(message.field)
            ],
        )
        yield ""


def _enum(enum: EnumDescriptorProto, path: Place, comments: dict[Place, str]) -> Iterator[str]:
    yield f"### {enum.name}\n"
    yield from _table(
        ("number", "value", ""),
        [
            (
                str(value.number),
                f"`{value.name}`",
                _one_line(comments.get((*path, VALUES, index), "")),
            )
            for index, value in enumerate(enum.value)
        ],
    )
    yield ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    entries = {entry.name: entry for entry in message.nested_type if entry.options.map_entry}
    name = _short(field.type_name) if field.type_name else _scalar(field)
    if name in entries:
        key, value = entries[name].field
        return f"map<{_scalar(key)}, {_short(value.type_name) or _scalar(value)}>"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return name


def _scalar(field: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _one_line(comment: str) -> str:
    return " ".join(comment.split())


def _unindented(comment: str) -> str:
    return "\n".join(line.removeprefix(" ") for line in comment.rstrip().splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check: bool = parser.parse_args().check
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    built = subprocess.run([buf, "build", HERE, "-o", "-"], check=True, stdout=subprocess.PIPE)
    fresh = page(FileDescriptorSet.FromString(built.stdout))
    if not check:
        PAGE.write_text(fresh)
    elif fresh != PAGE.read_text():
        print("docs/grpc.md is stale; run `make protos`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
