"""The calls without generation: models, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import msgspec

from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.openai.body import Ignored, RequestBody
from kvmesh.cluster.openai.messages import ChatTool, ChatTurn, chat_of
from kvmesh.v1 import kvmesh_pb2 as pb


class TokenizeBody(RequestBody):
    """What POST /tokenize takes: a prompt, or a chat. As in vLLM."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatTurn] | None = None
    tools: list[ChatTool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: Ignored = None

    def to_contract(self) -> pb.TokenizeRequest:
        """Raises InvalidFieldError."""
        if (self.prompt is None) == (self.messages is None):
            refuse("prompt", "must be set, or messages, and not both")
        if self.add_special_tokens is False and self.prompt is not None:
            refuse("add_special_tokens", "must be true: a prompt is tokenised with them")
        if self.add_generation_prompt is False and not self.continue_final_message:
            refuse("add_generation_prompt", "must be true, unless continue_final_message is set")
        prompt = pb.Prompt()
        if self.messages is None:
            prompt.text = self.prompt or ""
        else:
            prompt.chat.CopyFrom(
                chat_of(
                    [turn.to_contract(f"messages[{i}]") for i, turn in enumerate(self.messages)],
                    [tool.function for tool in self.tools or []],
                    self.chat_template_kwargs,
                    bool(self.continue_final_message),
                )
            )
        return pb.TokenizeRequest(model=self.model or "", prompt=prompt)


class Tokenized(msgspec.Struct):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeBody(RequestBody):
    """What POST /detokenize takes. As in vLLM."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None

    def to_contract(self) -> pb.DetokenizeRequest:
        """Raises InvalidFieldError."""
        try:
            return pb.DetokenizeRequest(
                token_ids=self.tokens,
                model=self.model or "",
                skip_special_tokens=self.skip_special_tokens,
            )
        except ValueError:
            refuse("tokens", "must have token ids from 0 to 2^31 - 1")


class Detokenized(msgspec.Struct):
    prompt: str


class ModelCard(msgspec.Struct):
    """A model, as OpenAI lists it. created: when the server that answers was started"""

    id: str
    created: int
    root: str
    max_model_len: int
    kv_formats: list[str]
    object: str = "model"
    owned_by: str = "kvmesh"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"


class ServerVersion(msgspec.Struct):
    version: str


class ServerHealth(msgspec.Struct):
    status: str


def model_card(info: pb.GetModelInfoResponse, created: int) -> ModelCard:
    formats = sorted({group.kv_format for group in info.groups})
    return ModelCard(info.model, created, info.model_revision, info.max_model_len, formats)
