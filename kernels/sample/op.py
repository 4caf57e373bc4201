"""The public operator `sample_tokens`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.sample import reference

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How each of n rows is sampled.

    block: [5, n] fp64 on the logits' device: draw in [0, 1); temperature, 0 for the best token;
        top_k, 0 for none; top_p; min_p
    host: the same on the host
    """

    block: torch.Tensor
    host: Numbers

    @classmethod
    def of(
        cls,
        draws: Numbers,
        temperature: Numbers,
        top_k: Numbers,
        top_p: Numbers,
        min_p: Numbers,
        device: torch.device,
    ) -> SampleParams:
        """Copied to the device in one transfer, without waiting for it."""
        host = np.stack((draws, temperature, top_k, top_p, min_p)).astype(np.float64)
        return cls(gpu.copied(torch.from_numpy(host), device), host)


def sample_tokens(
    logits: torch.Tensor, params: SampleParams, *, backend: str | None = None
) -> torch.Tensor:
    """One token of each row.

    The weights e^((logit - best) / temperature) are cut by top-k, then top-p of what is left, then
    min-p; of tokens with the same weight those with the lowest ids are kept. The token is the
    first, in the order of the vocabulary, at which the sum of the kept weights exceeds the row's
    draw times their total.

    logits: [n, vocab_size] fp32; -inf for tokens that may not be sampled
    backend: None picks the kernel on GPUs and plain torch elsewhere
    Returns [n] int32; -1 for rows whose best logit is not finite.
    """
    if logits.dim() != 2 or params.block.shape != (5, logits.shape[0]):
        raise ValueError(
            "logits, params: expected [n, vocab_size] and a block [5, n], "
            f"got {tuple(logits.shape)} and {tuple(params.block.shape)}"
        )
    if gpu.picks_kernel(logits, backend):
        from kvmesh.kernels.sample import triton_sample

        return triton_sample.sample_tokens(logits, params)
    return reference.sample_tokens(logits, params)
