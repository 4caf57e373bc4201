"""Mutations of valid requests, drawn from the contract's own descriptors.

Whatever field the contract gains is mutated too, without a change here.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from kvmesh.protos import pb

TIMEOUT_S = 4.0
MAX_LEVELS = 3
MAX_LIST = 20_000
MAX_TEXT = 200_000


@dataclass(frozen=True, slots=True)
class Mutant:
    """A call.

    what: how it differs from a valid one
    timeout_s: the request's own limit; None if the mutation took it away
    """

    method: str
    body: bytes
    what: str
    timeout_s: float | None


def _generate(rng: random.Random) -> pb.GenerateRequest:
    """With some parameters set, as a changed one may only matter together with others."""
    params = pb.SamplingParams(max_tokens=rng.randint(1, 3), temperature=rng.choice((0.0, 1.0)))
    for name, value in {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 2}.items():
        if rng.random() < 0.3:
            setattr(params, name, value)
    if rng.random() < 0.3:
        params.logit_bias[7] = 100.0
    request = pb.GenerateRequest(prompt=_prompt(rng), sampling_params=params, timeout_s=TIMEOUT_S)
    if rng.random() < 0.1:
        params.seed = 1
        request.resume.choices.add(token_ids=[5, 6], text_chars=2)
    return request


def _prompt(rng: random.Random) -> pb.Prompt:
    kind = rng.randrange(3)
    if kind == 0:
        return pb.Prompt(text="Once upon a time")
    if kind == 1:
        turn = pb.ChatMessage(role="user", content="Good morning")
        return pb.Prompt(chat=pb.Chat(messages=[turn]))
    return pb.Prompt(token_ids=pb.TokenIds(ids=range(1, 9)))


# Each method with a weight and its valid request.
METHODS: dict[str, tuple[int, Callable[[random.Random], Message]]] = {
    "GenerateStream": (10, _generate),
    "Generate": (10, _generate),
    "Tokenize": (4, lambda rng: pb.TokenizeRequest(prompt=_prompt(rng))),
    "EstimateBudget": (4, lambda rng: pb.EstimateBudgetRequest(prompt=_prompt(rng), max_tokens=8)),
    "Explain": (2, lambda rng: pb.ExplainRequest(request_id="fuzz")),
    "Abort": (2, lambda rng: pb.AbortRequest(request_id="fuzz")),
    "GetModelInfo": (1, lambda rng: pb.GetModelInfoRequest()),
    "GetTenantLoads": (1, lambda rng: pb.GetTenantLoadsRequest()),
}


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    """The same calls for the same seed."""
    rng = random.Random(seed)
    names = list(METHODS)
    weights = [METHODS[name][0] for name in names]
    for _ in range(count):
        method = rng.choices(names, weights)[0]
        request = METHODS[method][1](rng)
        changes = [_change(request, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        body = request.SerializeToString()
        if rng.random() < 0.1:
            body = _broken(body, rng)
            changes.append("broken bytes")
        yield Mutant(method, body, ", ".join(changes), _timeout_s(request, body))


def _timeout_s(request: Message, body: bytes) -> float | None:
    if not isinstance(request, pb.GenerateRequest):
        return TIMEOUT_S
    if body != request.SerializeToString() or not 0 < request.timeout_s <= TIMEOUT_S:
        return None
    return request.timeout_s


def _change(request: Message, rng: random.Random, level: int = 0) -> str:
    """Change one field, however deep; says which. level: of lists and maps above it"""
    message, path = request, ""
    while True:
        fields: list[Any] = list(message.DESCRIPTOR.fields)
        if level == MAX_LEVELS:  # a Struct can have others in it without end
            fields = [field for field in fields if field.type != FieldDescriptor.TYPE_MESSAGE]
        if not fields:
            return "unchanged"
        # A message holds more that can be wrong than a number.
        weights = [4 if field.type == FieldDescriptor.TYPE_MESSAGE else 1 for field in fields]
        field = rng.choices(fields, weights)[0]
        path += f"{'.' if path else ''}{field.name}"
        if _is_map(field):
            return f"{path} = {_fill_map(message, field, rng, level)}"
        if field.is_repeated:
            return f"{path} = {_fill_list(message, field, rng, level)}"
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if rng.random() < 0.1:
                message.ClearField(field.name)
                return f"no {path}"
            child = getattr(message, field.name)
            child.SetInParent()
            message = child
            continue
        if rng.random() < 0.1:
            message.ClearField(field.name)
            return f"no {path}"
        value = _scalar(field, rng)
        setattr(message, field.name, value)
        return f"{path} = {_short(value)}"


def _fill_list(message: Message, field: Any, rng: random.Random, level: int) -> str:
    values = getattr(message, field.name)
    length = _length(rng, (0, 1, 2, 17, 300), MAX_LIST)
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        del values[:]
        for _ in range(min(length, 100 >> 3 * level)):
            _change(values.add(), rng, level + 1)
    else:
        same = rng.random() < 0.5
        value = _scalar(field, rng, long_text=length < 300)
        values[:] = [value if same else _scalar(field, rng, long_text=False) for _ in range(length)]
    return f"{len(values)} values"


def _fill_map(message: Message, field: Any, rng: random.Random, level: int) -> str:
    key, value = (
        field.message_type.fields_by_name["key"],
        field.message_type.fields_by_name["value"],
    )
    entries = getattr(message, field.name)
    for _ in range(_length(rng, (1, 2, 300), MAX_LIST)):
        if value.type == FieldDescriptor.TYPE_MESSAGE:
            if len(entries) < 100 >> 3 * level:
                _change(entries[_scalar(key, rng, long_text=False)], rng, level + 1)
        else:
            entries[_scalar(key, rng)] = _scalar(value, rng)
    return f"{len(entries)} entries"


def _is_map(field: Any) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


def _scalar(field: Any, rng: random.Random, *, long_text: bool = True) -> Any:
    kinds: dict[int, Callable[[], Any]] = {
        FieldDescriptor.TYPE_DOUBLE: lambda: _double(rng),
        FieldDescriptor.TYPE_INT32: lambda: _integer(rng, -(1 << 31), (1 << 31) - 1),
        FieldDescriptor.TYPE_UINT32: lambda: _integer(rng, 0, (1 << 32) - 1),
        FieldDescriptor.TYPE_UINT64: lambda: _integer(rng, 0, (1 << 64) - 1),
        FieldDescriptor.TYPE_BOOL: lambda: rng.random() < 0.5,
        FieldDescriptor.TYPE_STRING: lambda: _text(rng, long_text),
        FieldDescriptor.TYPE_BYTES: lambda: rng.randbytes(_length(rng, (0, 1, 40), MAX_TEXT)),
        FieldDescriptor.TYPE_ENUM: lambda: _integer(rng, 0, 99),
    }
    return kinds[field.type]()


def _double(rng: random.Random) -> float:
    """Special values, values near the usual ranges, and any bits."""
    special = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e-46, 1e-39, 1e-37, 1e-8, 0.5, 2.0, 100.0, -100.0)
    extreme = (3.5e38, -3.5e38, 1e308, float("inf"), float("-inf"), float("nan"))
    drawn = rng.randrange(4)
    if drawn == 0:
        return rng.choice(special)
    if drawn == 1:
        return rng.choice(extreme)
    if drawn == 2:
        return rng.uniform(-2.5, 2.5)
    return float(struct.unpack("<d", rng.randbytes(8))[0])


def _integer(rng: random.Random, low: int, high: int) -> int:
    drawn = rng.randrange(4)
    if drawn == 0:
        return rng.choice((low, high, low + 1, high - 1))
    if drawn == 1:
        return rng.randint(low, high)
    return min(max(rng.choice((-1, 0, 1, 2, 7, 64, 255, 256, 1023, 49_151, 49_152)), low), high)


def _text(rng: random.Random, long: bool) -> str:
    usual = (0, 1, 3, 40)
    length = _length(rng, (*usual, 2000), MAX_TEXT) if long else rng.choice(usual)
    alphabet = rng.choice(
        ("a", " ", "\n", "\x00", "ab 1.", "é漢🙂", "\ud7ff\ue000\U0010ffff", "{}%")
    )
    some = "".join(rng.choices(alphabet, k=min(length, 50)))
    return some * (length // max(len(some), 1))


def _length(rng: random.Random, usual: Sequence[int], large: int) -> int:
    return large if rng.random() < 0.05 else rng.choice(usual)


def _broken(body: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert or repeat."""
    data = bytearray(body or b"\x00")
    position = rng.randrange(len(data))
    drawn = rng.randrange(4)
    if drawn == 0:
        data[position] ^= 1 << rng.randrange(8)
    elif drawn == 1:
        del data[position:]
    elif drawn == 2:
        data[position:position] = rng.randbytes(rng.randint(1, 30))
    else:
        data += data[position:]
    return bytes(data)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:30]}… ({len(text)} characters)"
