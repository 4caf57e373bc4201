"""What every kind of generation takes, and its translation to the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.openai.body import Ignored, RequestBody
from kvmesh.cluster.openai.structured import StructuredOutputs
from kvmesh.v1 import kvmesh_pb2 as pb

# Fields that have the same name and meaning in the contract.
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "max_reasoning_tokens",
    "n",
)
# Headers, for clients that cannot add fields to a body; a field counts more than its header.
HEADER_FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "x-kvmesh-cache-salt": ("cache_salt", str),
    "x-kvmesh-priority": ("priority", int),
    "x-kvmesh-timeout-s": ("timeout_s", float),
    "x-kvmesh-pin-s": ("pin_s", float),
    "x-kvmesh-max-kv-divergence-nats": ("max_kv_divergence_nats", float),
    "x-kvmesh-allowed-kv-formats": (
        "allowed_kv_formats",
        lambda text: [name.strip() for name in text.split(",") if name.strip()],
    ),
}


class StreamOptions(RequestBody):
    """include_usage: a last chunk with the usage; continuous_usage_stats: in every chunk"""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


class GenerationBody(RequestBody):
    """OpenAI's sampling parameters, those that vLLM has added to them, and kvmesh's own."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # As in vLLM.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None
    cache_salt: str | None = None
    # kvmesh's own, as in its contract.
    max_reasoning_tokens: int | None = None
    timeout_s: float | None = None
    allowed_kv_formats: list[str] | None = None
    max_kv_divergence_nats: float | None = None
    pin_s: float | None = None

    user: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_everywhere(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def base_request(self, headers: Mapping[str, str], request_id: str) -> pb.GenerateRequest:
        """A request without prompt, max_tokens and logprobs. Raises InvalidFieldError.

        headers: of the call, with lower-case names
        """
        if self.stream_options is not None and not self.stream:
            refuse("stream_options", "must only be set together with stream")
        request = pb.GenerateRequest(request_id=request_id, model=self.model or "")
        params = request.sampling_params
        for name in SAMPLING:
            put(params, name, getattr(self, name))
        if self.seed is not None:
            if not -(1 << 63) <= self.seed < 1 << 64:
                refuse("seed", f"must have at most 64 bits, got {self.seed}")
            params.seed = self.seed % (1 << 64)  # of negative ones, as two's complement
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        params.stop.extend(stops)
        for token_id in self.stop_token_ids or []:
            params.stop_token_ids.append(token_id_of("stop_token_ids", token_id))
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit()):
                refuse("logit_bias", f"must have token ids as keys, got {key!r}")
            params.logit_bias[token_id_of("logit_bias", int(key))] = bias
        if self.structured_outputs is not None:
            request.structured_output.CopyFrom(self.structured_outputs.to_contract())
        self._add_own(request, headers)
        return request

    def _add_own(self, request: pb.GenerateRequest, headers: Mapping[str, str]) -> None:
        """kvmesh's own fields, from the body or from headers."""
        values = {name: getattr(self, name) for name, _ in HEADER_FIELDS.values()}
        for header, (name, read) in HEADER_FIELDS.items():
            if values[name] is None and header in headers:
                try:
                    values[name] = read(headers[header])
                except ValueError:
                    refuse(header, f"must be a number, got {headers[header]!r}")
        request.allowed_kv_formats.extend(values.pop("allowed_kv_formats") or [])
        for name, value in values.items():
            put(request, name, value)


def put(message: pb.GenerateRequest | pb.SamplingParams, name: str, value: Any) -> None:
    """Set a field unless the value is None. Raises InvalidFieldError if it cannot hold it."""
    if value is None:
        return
    try:
        setattr(message, name, value)
    except ValueError:
        refuse(name, f"must fit in 32 bits, got {value}")


def token_id_of(field: str, value: int) -> int:
    if not 0 <= value < 1 << 31:
        refuse(field, f"{value} is not a valid token id")
    return value
