"""How fast a group works, as far as the router can tell."""

from __future__ import annotations

from dataclasses import dataclass, field

OVERRUN_SHARE = 0.1
SMOOTHING = 0.05  # weight of the newest observation
CORRECTION_RANGE = (0.1, 20.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """Service times of one group.

    prefill_s_per_token: projections and MLP, for each prompt token computed
    prefill_s_per_pair: attention, for each (query, key) pair of tokens
    decode_step_s: one output token of a sequence in a typical batch
    """

    prefill_s_per_token: float = 1e-6
    prefill_s_per_pair: float = 0.0
    decode_step_s: float = 0.01

    def prefill_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        """Seconds to compute `new_tokens` of a prompt that follow `cached_tokens`."""
        pairs = new_tokens * (cached_tokens + 0.5 * new_tokens)
        return self.prefill_s_per_token * new_tokens + self.prefill_s_per_pair * pairs


@dataclass(slots=True)
class Backlog:
    """Prompts given to a group and not yet computed, in order.

    The engine computes prompts in order of arrival, so a prompt with a first token is
    done, and so are those before it. Until the first report of a first token, the clock
    alone empties the backlog.

    correction: observed prefill time over predicted, a moving average
    clear_at: when all of them will be computed, if the first takes what is predicted
    min_wait_s: what those after the first take, and a share of the first, since one that
        takes longer than predicted is not over yet
    """

    pace: Pace
    correction: float = 1.0
    clear_at: float = 0.0
    min_wait_s: float = 0.0
    _prompts: dict[str, float] = field(default_factory=dict)  # lease id -> predicted seconds
    _sum_s: float = 0.0
    _first_since: float = 0.0
    _reported: bool = False

    def __len__(self) -> int:
        return len(self._prompts)

    def seconds(self, now: float) -> float:
        """Until the engine would start on a prompt added now."""
        return max(self.clear_at - now, self.min_wait_s)

    @property
    def longest_s(self) -> float:
        """What the longest of its prompts was predicted to take."""
        return max(self._prompts.values(), default=0.0)

    def add(self, lease_id: str, new_tokens: int, cached_tokens: int, now: float) -> None:
        self._drop_done(now)
        if not self._prompts:
            self._first_since = now
        seconds = self.pace.prefill_s(new_tokens, cached_tokens)
        self._prompts[lease_id] = seconds
        self._sum_s += seconds
        self._project()

    def first_token(self, lease_id: str, now: float) -> None:
        """The lease's first token is out."""
        if lease_id not in self._prompts:
            return
        self._reported = True
        predicted = 0.0
        for prompt in list(self._prompts):
            predicted += self._pop(prompt)
            if prompt == lease_id:
                break
        if predicted > 0:
            low, high = CORRECTION_RANGE
            seen = min(max((now - self._first_since) / predicted, low), high)
            weight = SMOOTHING * min(1.0, predicted / 0.05)  # tiny prompts are mostly noise
            self.correction += weight * (seen - self.correction)
        self._first_since = now
        self._project()

    def drop(self, lease_id: str, now: float) -> None:
        """The lease is gone, computed or not."""
        if lease_id in self._prompts:
            if next(iter(self._prompts)) == lease_id:
                self._first_since = now
            self._pop(lease_id)
            self._project()

    def _project(self) -> None:
        first = next(iter(self._prompts.values()), 0.0)
        self.clear_at = self._first_since + self._sum_s * self.correction
        left = self._sum_s - (1.0 - OVERRUN_SHARE) * first
        self.min_wait_s = left * self.correction if self._reported else 0.0

    def _pop(self, lease_id: str) -> float:
        seconds = self._prompts.pop(lease_id)
        self._sum_s = self._sum_s - seconds if self._prompts else 0.0
        return seconds

    def _drop_done(self, now: float) -> None:
        while self._prompts and not self._reported:
            first = next(iter(self._prompts))
            done_at = self._first_since + self._prompts[first] * self.correction
            if done_at > now:
                return
            self._pop(first)
            self._first_since = done_at
