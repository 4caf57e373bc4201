"""How a model writes its answers, as its chat template and its tokens show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, get_args

from kvmesh.cluster.config import ReasoningParser, ToolParser
from kvmesh.cluster.ingress.answers.syntaxes import SYNTAXES, ToolSyntax, detect
from kvmesh.workers.constraint import Reasoning
from kvmesh.workers.structured.grammar import literal

assert set(get_args(ToolParser)) == {"auto", "none", *SYNTAXES}

THINK = ("<think>", "</think>")
TAIL_TOKENS = 16  # of a prompt, in which a template's start marker would be


@dataclass(frozen=True, slots=True)
class ModelForm:
    """think: the markers of reasoning, None for a model that does not reason
    syntax: of tool calls, None for a model that calls no tools
    special_tokens: text -> id
    """

    think: tuple[str, str] | None
    syntax: ToolSyntax | None
    special_tokens: Mapping[str, int]

    @classmethod
    def of(
        cls,
        template: str | None,
        special_tokens: Mapping[str, int],
        tool_parser: ToolParser = "auto",
        reasoning_parser: ReasoningParser = "auto",
    ) -> Self:
        """template: None for a model without one"""
        source = template or ""
        syntax = SYNTAXES.get(tool_parser)
        if tool_parser == "auto" and template is not None:
            syntax = detect(source, special_tokens)
        thinks = reasoning_parser == "think" or (
            reasoning_parser == "auto" and any(x in source or x in special_tokens for x in THINK)
        )
        return cls(THINK if thinks else None, syntax, special_tokens)

    def reasoning(self, prompt_tail: str, continued: str | None) -> Reasoning | None:
        """For an answer to a prompt that ends so.

        continued: the last message, if the answer continues it
        """
        if self.think is None:
            return None
        start, end = self.think
        tail = prompt_tail if continued is None else continued
        if continued is None:
            tail = tail.rstrip()
            if tail.endswith(end):
                return None  # the template has answered that there is none
            return Reasoning(start, end, started=tail.endswith(start))
        if end in tail or (tail.strip() and start not in tail):
            return None
        return Reasoning(start, end, started=start in tail)

    def marker(self, text: str) -> str:
        """The text as a grammar writes it."""
        token_id = self.special_tokens.get(text)
        return literal(text) if token_id is None else f"<[{token_id}]>"

    def markers(self, reasoning: Reasoning | None, syntax: ToolSyntax | None) -> dict[int, str]:
        """Special tokens that have to be read as text, by id."""
        texts = [] if reasoning is None else [reasoning.start, reasoning.end]
        texts += [] if syntax is None else syntax.markers
        return {self.special_tokens[text]: text for text in texts if text in self.special_tokens}
