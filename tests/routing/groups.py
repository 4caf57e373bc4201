"""Engines, routers and what they say, for the tests of routing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from kvmesh.cluster.routing.accepted_formats import AcceptedFormats
from kvmesh.cluster.routing.config import RouterConfig, RouterTuning
from kvmesh.cluster.routing.ledger import Account
from kvmesh.cluster.routing.live import Lease
from kvmesh.cluster.routing.outcome import Granted, Outcome, Placement
from kvmesh.cluster.routing.pace import Pace
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.router import Router
from kvmesh.workers.lease import AccountUpdate, LeaseEnd, LeaseTerms, LeaseWant
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.sizes import PageGeometry, PageNeed

FAST = Pace(prefill_s_per_token=1e-6, decode_step_s=0.01)
SLOW = Pace(prefill_s_per_token=1e-3, decode_step_s=0.1)
TUNING = {field.name for field in fields(RouterTuning)}


def make_info(
    *,
    hot: int = 64,
    sealed: int = 100,
    epoch: str = "e0",
    max_sequences: int = 16,
    max_model_len: int = 100_000,
    page_size: int = 16,
    kv_format: str = "int4",
) -> EngineInfo:
    return EngineInfo(
        epoch=epoch,
        model="m",
        model_revision="r",
        kv_format=kv_format,
        dtype="bfloat16",
        tp=1,
        geometry=PageGeometry(
            page_size=page_size,
            sink_pages=1,
            recent_pages=2,
            hot_page_bytes=1000,
            sealed_page_bytes=300,
        ),
        capacity=PageNeed(hot, sealed),
        max_model_len=max_model_len,
        vocab_size=100,
        max_num_seqs=max_sequences,
    )


def make_router(**settings: object) -> Router:
    """A router with settings and constants by name."""
    constants = {"pace": FAST} | {name: settings.pop(name) for name in TUNING & settings.keys()}
    tuning = RouterTuning(**constants)  # type: ignore[arg-type]
    return Router(RouterConfig(tuning=tuning, **settings), epoch=1, now=0.0)  # type: ignore[arg-type]


def router_with(*, groups: dict[str, EngineInfo], **settings: object) -> Router:
    """A router whose groups are up."""
    router = make_router(**settings)
    for name, info in groups.items():
        assert router.group_up(name, info, (), 0.0) == []
    return router


def ask(request_id: str, prompt: int = 160, out: int = 160, **rest: object) -> PlaceRequest:
    return PlaceRequest(request_id, prompt, out, **rest)  # type: ignore[arg-type]


def only(*formats: str) -> AcceptedFormats:
    return AcceptedFormats(frozenset(formats))


def granted(outcomes: Iterable[Outcome]) -> Placement:
    """The placement of the first outcome, which must be a grant."""
    first = next(iter(outcomes))
    assert isinstance(first, Granted), first
    return first.placement


def place(
    router: Router, name: str, prompt: int, out: int, now: float, **rest: object
) -> Placement:
    return granted(router.place(ask(name, prompt, out, **rest), now))


# An engine's account


def arrive(router: Router, placement: Placement, now: float) -> list[Outcome]:
    return router.account(placement.group, AccountUpdate(arrived=(placement.lease,)), now)


def emit(router: Router, placement: Placement, now: float) -> list[Outcome]:
    """The first token is out."""
    update = AccountUpdate(first_tokens=(placement.lease.lease_id,))
    return router.account(placement.group, update, now)


def want(
    router: Router, placement: Placement, prompt: int, output: int, now: float
) -> list[Outcome]:
    wanted = LeaseWant(placement.lease.lease_id, prompt, prompt + output)
    return router.account(placement.group, AccountUpdate(wants=(wanted,)), now)


def end(
    router: Router, placement: Placement, now: float, output_tokens: int | None = None
) -> list[Outcome]:
    ended = LeaseEnd(placement.lease.lease_id, output_tokens)
    return router.account(placement.group, AccountUpdate(ended=(ended,)), now)


# A page of the ledger by itself


def make_account(**sizes: int) -> Account:
    """Its blocks have four pages."""
    return Account("g0", make_info(**sizes), 4)  # type: ignore[arg-type]


def grant(
    account: Account,
    need: PageNeed,
    *,
    number: int = 0,
    max_sealed: int | None = None,
    blocks: tuple[bytes, ...] = (),
    sequences: int = 1,
) -> Lease:
    max_need = PageNeed(need.hot, need.sealed if max_sealed is None else max_sealed)
    request = ask("r", sequences=sequences)
    return account.grant((7, number), need, max_need, request, 0.0, blocks)


def foreign(number: int, hot: int, sealed: int, max_sealed: int = 0, **rest: Any) -> LeaseTerms:
    """Terms that another router granted, to request f0, f1, ... of tenant `before`."""
    terms = LeaseTerms(f"3-{number}", 3, hot, sealed, max_sealed, number=number)
    return replace(terms, request_id=f"f{number}", tenant="before", **rest)


def info_like(info: EngineInfo, epoch: str) -> EngineInfo:
    """The next incarnation of an engine."""
    return replace(info, epoch=epoch)
