"""How many engines a request may lose, and whom the last loss is blamed on."""

from __future__ import annotations

import pytest

from kvmesh.cluster.errors import EngineLostError, RequestFaultError
from kvmesh.cluster.ingress.failovers import MAX_FAILOVERS, Failovers, Loss


def lost(*losses: Loss, tokens: int = 0) -> Failovers:
    found = Failovers()
    for number, loss in enumerate(losses):
        found.note(f"e{number}", loss, tokens)
    return found


def test_what_was_lost_is_counted() -> None:
    found = lost(Loss.REFUSED, Loss.CLEARED, Loss.SUSPECT, Loss.SUSPECT)
    assert found.engines == {"e0", "e1", "e2", "e3"}
    assert (found.total, found.suspicion, found.in_vain) == (4, 2, 3)
    found.note("e3", Loss.CLEARED, 0)
    assert found.engines == {"e0", "e1", "e2", "e3"}
    assert found.total == 5


@pytest.mark.parametrize(
    ("before", "last", "suspect"),
    [
        ([Loss.REFUSED] * MAX_FAILOVERS, Loss.REFUSED, 0),
        ([Loss.REFUSED] * MAX_FAILOVERS, Loss.SUSPECT, 1),
        ([Loss.SUSPECT] * MAX_FAILOVERS, Loss.REFUSED, 3),
        ([Loss.SUSPECT, Loss.REFUSED, Loss.REFUSED], Loss.REFUSED, 1),
        ([Loss.SUSPECT, Loss.CLEARED, Loss.REFUSED, Loss.REFUSED], Loss.REFUSED, 1),
        ([Loss.CLEARED] + [Loss.REFUSED] * MAX_FAILOVERS, Loss.REFUSED, 0),
    ],
)
def test_one_loss_in_vain_too_many_ends_the_request(
    before: list[Loss], last: Loss, suspect: int
) -> None:
    """A request that may have made one of the engines fail is not to be sent again."""
    found = lost(*before)
    with pytest.raises((RequestFaultError, EngineLostError)) as caught:
        found.note("last", last, 0)
    fault = RequestFaultError(f"4 engines in a row were lost, {suspect} of them while they had it")
    error = fault if suspect else EngineLostError()
    assert (type(caught.value), caught.value.args) == (type(error), error.args)


def test_no_request_is_at_fault_for_engines_that_did_not_have_it() -> None:
    """It was suspected once, but has had tokens since, and now a restart refuses it."""
    found = lost(Loss.SUSPECT)
    found.note("e1", Loss.REFUSED, 5)
    for number in range(2, 4):
        found.note(f"e{number}", Loss.REFUSED, 5)
    with pytest.raises(EngineLostError):
        found.note("e4", Loss.REFUSED, 5)
    assert found.suspicion == 1


def test_engines_that_failed_for_another_reason_do_not_count() -> None:
    assert lost(*[Loss.CLEARED] * 10).in_vain == 0


def test_new_tokens_make_earlier_losses_worth_it_but_not_less_suspicious() -> None:
    found = lost(*[Loss.SUSPECT] * MAX_FAILOVERS, tokens=1)
    found.note("e3", Loss.SUSPECT, 2)
    assert (found.in_vain, found.suspicion) == (1, 4)
    found.note("e4", Loss.SUSPECT, 2)
    assert (found.in_vain, found.suspicion) == (2, 5)
