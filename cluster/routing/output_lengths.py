"""What has been seen of output lengths: rolling medians by tenant and prompt length."""

from __future__ import annotations

from kvmesh.cluster.routing.rolling import RollingQuantile

Key = tuple[str, int]
ANY_TENANT = ""


class OutputLengths:
    """Rolling medians of output tokens for each (tenant, class of prompt length).

    A class is a power of two of prompt tokens. With fewer than `min_samples` of a
    tenant's class, those of all tenants count; with fewer of these too, nothing is known.
    """

    def __init__(self, window: int = 512, min_samples: int = 32, max_keys: int = 4096) -> None:
        if not 0 < min_samples <= window:
            raise ValueError(f"min_samples must be from 1 to window ({window}), got {min_samples}")
        self._size = window
        self._min_samples = min_samples
        self._max_keys = max_keys
        self._seen: dict[Key, RollingQuantile] = {}

    def learn(self, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
        """A sequence ended naturally after `output_tokens`."""
        for key in {(tenant, prompt_tokens.bit_length()), (ANY_TENANT, prompt_tokens.bit_length())}:
            window = self._seen.pop(key, None) or RollingQuantile(self._size)
            self._seen[key] = window  # now the youngest key
            window.add(output_tokens)
        while len(self._seen) > self._max_keys:
            del self._seen[next(iter(self._seen))]

    def median(self, tenant: str, prompt_tokens: int) -> int | None:
        """Of the request's class, or None where too little was seen."""
        for name in (tenant, ANY_TENANT):
            window = self._seen.get((name, prompt_tokens.bit_length()))
            if window is not None and len(window) >= self._min_samples:
                return int(window.quantile(0.5))
        return None
