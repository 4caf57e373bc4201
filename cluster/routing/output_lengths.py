"""What has been seen of output lengths: rolling quantiles by tenant and prompt length."""

from __future__ import annotations

from collections import deque

from sortedcontainers import SortedList

Key = tuple[str, int]
ANY_TENANT = ""


class _Window:
    """The last `size` lengths, in order of size and of age."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._by_age: deque[int] = deque()
        self._by_length: SortedList[int] = SortedList()

    def __len__(self) -> int:
        return len(self._by_age)

    def add(self, length: int) -> None:
        self._by_age.append(length)
        self._by_length.add(length)
        if len(self._by_age) > self._size:
            self._by_length.remove(self._by_age.popleft())

    def quantile(self, share: float) -> int:
        """The smallest length that at least `share` of the window does not exceed."""
        count = len(self._by_length)
        return int(self._by_length[min(count - 1, int(share * count))])


class OutputLengths:
    """Rolling quantiles of output tokens for each (tenant, class of prompt length).

    A class is a power of two of prompt tokens. With fewer than `min_samples` of a
    tenant's class, those of all tenants count; with fewer of these too, nothing is known.
    """

    def __init__(self, window: int = 512, min_samples: int = 32, max_keys: int = 4096) -> None:
        if not 0 < min_samples <= window:
            raise ValueError(f"min_samples must be from 1 to window ({window}), got {min_samples}")
        self._window = window
        self._min_samples = min_samples
        self._max_keys = max_keys
        self._seen: dict[Key, _Window] = {}

    def learn(self, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
        """A sequence ended naturally after `output_tokens`."""
        for key in {(tenant, prompt_tokens.bit_length()), (ANY_TENANT, prompt_tokens.bit_length())}:
            window = self._seen.pop(key, None) or _Window(self._window)
            self._seen[key] = window  # now the youngest key
            window.add(output_tokens)
        while len(self._seen) > self._max_keys:
            del self._seen[next(iter(self._seen))]

    def quantile(self, tenant: str, prompt_tokens: int, share: float) -> int | None:
        """The quantile of the request's class, or None where too little was seen."""
        for name in (tenant, ANY_TENANT):
            window = self._seen.get((name, prompt_tokens.bit_length()))
            if window is not None and len(window) >= self._min_samples:
                return window.quantile(share)
        return None
