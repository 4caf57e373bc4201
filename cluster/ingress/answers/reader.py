"""Reads one choice's answer as it comes: reasoning, then text and tool calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from kvmesh.cluster.ingress.answers.pieces import Pieces
from kvmesh.cluster.ingress.answers.reasoning import ReasoningSplit
from kvmesh.cluster.ingress.answers.scanner import CallScanner
from kvmesh.cluster.ingress.answers.syntaxes import ToolSyntax
from kvmesh.workers.constraint import Reasoning


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What answers to a request consist of, besides text.

    reasoning: None if all is the answer
    syntax: of tool calls; None if they are not looked for
    tools: names of those that may be called
    parallel: whether there may be several calls; otherwise the first one ends the answer
    markers: special tokens' texts by id, of those that the above are written with
    """

    reasoning: Reasoning | None = None
    syntax: ToolSyntax | None = None
    tools: Collection[str] = ()
    parallel: bool = True
    markers: Mapping[int, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.reasoning is not None or self.syntax is not None


PLAIN = AnswerForm()


class AnswerReader:
    """Text in, pieces out. In total they depend only on the whole text."""

    def __init__(self, form: AnswerForm) -> None:
        self._reasoning = None if form.reasoning is None else ReasoningSplit(form.reasoning)
        self._calls: CallScanner | None = None
        self._parallel = form.parallel
        if (syntax := form.syntax) is not None:
            self._calls = CallScanner(lambda scanner: syntax.read(scanner, form.tools))

    def push(self, text: str) -> Pieces:
        reasoning = ""
        if self._reasoning is not None:
            reasoning, text = self._reasoning.push(text)
        return self._answer(reasoning, text)

    def finish(self) -> Pieces:
        """The rest, at the end of the text."""
        reasoning, text = "", ""
        if self._reasoning is not None:
            reasoning, text = self._reasoning.finish()
        pieces = self._answer(reasoning, text)
        if self._calls is not None:
            pieces.add(self._calls.finish())
        return pieces

    def has_enough(self) -> bool:
        """Whether there is the one call that there may be."""
        return not self._parallel and self._calls is not None and self._calls.complete_calls > 0

    @property
    def ends_in_calls(self) -> bool:
        """Whether there are tool calls, and all are complete."""
        return self._calls is not None and self._calls.all_complete

    def _answer(self, reasoning: str, text: str) -> Pieces:
        if self._calls is None or self.has_enough():
            return Pieces(reasoning, "" if self.has_enough() else text)
        pieces = Pieces(reasoning)
        for character in text if not self._parallel else [text]:
            pieces.add(self._calls.push(character))
            if self.has_enough():
                break
        return pieces
