"""Grammars that are tried in threads: whose turn it is, how often, and which plans are kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from kvmesh.cluster.errors import IngressBusyError
from kvmesh.cluster.ingress.answers import planner
from kvmesh.cluster.ingress.answers.model_form import ModelForm
from kvmesh.cluster.ingress.answers.plan import AnswerPlan, AnswerSpec, StructuredSpec
from kvmesh.cluster.ingress.answers.planner import AnswerPlanner
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.workers.constraint import Reasoning
from kvmesh.workers.errors import InvalidFieldError
from tests.cluster.machine import LetterCodec
from tests.cluster.openai.test_front import until

MAX_WAITING = 4


class Grammars:
    """Those that are tried wait in their thread until the gate is open.

    tried: their patterns, in order
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.tried: list[str] = []

    def plan(self, spec: AnswerSpec, model: ModelForm, reasoning: Reasoning | None) -> AnswerPlan:
        assert spec.structured is not None
        self.tried.append(spec.structured.value)
        assert self.gate.wait(60)
        if spec.structured.value == "bad":
            refuse(spec.structured.field, "cannot be enforced")
        return AnswerPlan()


@pytest.fixture
def grammars(monkeypatch: pytest.MonkeyPatch) -> Iterator[Grammars]:
    made = Grammars()
    monkeypatch.setattr(planner, "plan_answer", made.plan)
    yield made
    made.gate.set()


@pytest.fixture
def plans() -> Iterator[AnswerPlanner]:
    made = AnswerPlanner(LetterCodec(), MAX_WAITING)
    yield made
    made.close()


def ask(plans: AnswerPlanner, pattern: str, tenant: str = "t") -> asyncio.Task[AnswerPlan]:
    spec = AnswerSpec(StructuredSpec("regex", pattern))
    return asyncio.create_task(plans.plan(spec, LetterCodec().encode(""), tenant))


async def test_a_tenant_that_leaves_has_one_thread_all_the_same(
    plans: AnswerPlanner, grammars: Grammars
) -> None:
    left = ask(plans, "bad")
    await until(lambda: grammars.tried == ["bad"])
    left.cancel()
    await asyncio.wait([left])
    later, other = ask(plans, "later"), ask(plans, "other", tenant="u")
    await until(lambda: len(grammars.tried) > 1)
    assert grammars.tried == ["bad", "other"]
    grammars.gate.set()
    await asyncio.gather(later, other)
    assert grammars.tried == ["bad", "other", "later"]


async def test_a_grammar_that_many_have_at_once_is_tried_once(
    plans: AnswerPlanner, grammars: Grammars
) -> None:
    many = [ask(plans, "same") for _ in range(MAX_WAITING + 10)]
    await until(lambda: grammars.tried != [])
    many[0].cancel()
    grammars.gate.set()
    _, *found = await asyncio.gather(*many, return_exceptions=True)
    assert all(isinstance(plan, AnswerPlan) for plan in found)
    assert grammars.tried == ["same"]


async def test_too_many_grammars_are_refused_until_others_were_tried(
    plans: AnswerPlanner, grammars: Grammars
) -> None:
    waiting = [ask(plans, "bad"), *(ask(plans, f"{n}") for n in range(MAX_WAITING - 1))]
    await until(lambda: grammars.tried == ["bad"])
    with pytest.raises(IngressBusyError):
        await ask(plans, "one too many")
    grammars.gate.set()
    await ask(plans, "others", tenant="u")
    bad, *_ = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(bad, InvalidFieldError) and bad.field == "structured_output.regex"
    for _ in range(MAX_WAITING + 1):
        with pytest.raises(InvalidFieldError):
            await ask(plans, "bad")


async def test_plans_are_kept_while_they_are_used(
    plans: AnswerPlanner, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "_KEPT", 2)
    grammars.gate.set()
    for pattern in ("a", "b", "a", "c", "a", "b"):
        await ask(plans, pattern)
    assert grammars.tried == ["a", "b", "c", "b"]


async def test_a_plan_is_kept_for_prompts_that_leave_the_model_at_the_same_place(
    grammars: Grammars,
) -> None:
    codec = LetterCodec()
    codec.form = ModelForm(("b", "e"), None, {})
    plans = AnswerPlanner(codec, MAX_WAITING)
    grammars.gate.set()
    for tail in ("x", "y", "xb", "yb", "xe", "y"):
        spec = AnswerSpec(StructuredSpec("regex", "a"), is_chat=True)
        await plans.plan(spec, codec.encode(tail), "t")
    plans.close()
    assert len(grammars.tried) == 3, "before, within and after its thoughts"
