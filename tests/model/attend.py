"""Simple attention over a contiguous cache: the reference of the model tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.model.load import ServedModel
from kvmesh.workers.model.recurrent_state import RecurrentStates
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.heads import merge_over_ranks

ALONE = Communicator.single()


class ContiguousCache:
    """Keys and values of several sequences, and attention over them, one loop per sequence.

    comm: every one of its kvp ranks has all pages, so merging what they have found changes nothing
        but that each gets its part of the channels
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._lengths: list[tuple[int, int]] = []

    def begin(self, lengths: list[tuple[int, int]]) -> None:
        """Announce the next forward's tokens: `count` of sequence `seq`, for each (seq, count)."""
        self._lengths = lengths

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, args: AttendArgs) -> Tensor:
        outs, start = [], 0
        for seq, count in self._lengths:
            part = slice(start, start + count)
            start += count
            keys, values = k[part], v[part]
            if (layer, seq) in self._kv:
                old_keys, old_values = self._kv[layer, seq]
                keys, values = torch.cat((old_keys, keys)), torch.cat((old_values, values))
            self._kv[layer, seq] = keys, values
            outs.append(_attention(q[part], keys, values, args))
        out = torch.cat(outs)
        if self._comm.kvp == 1:
            return out
        return merge_over_ranks(out, torch.zeros(out.shape[:2]), self._comm)[0]


def _attention(q: Tensor, k: Tensor, v: Tensor, args: AttendArgs) -> Tensor:
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1).float(), v.repeat_interleave(group, 1).float()
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * args.scale
    if args.softcap is not None:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    ends = torch.arange(len(k) - len(q), len(k))[:, None]
    at = torch.arange(len(k))[None, :]
    seen = at <= ends
    window = args.sliding_window
    if window is not None:
        seen &= at > ends - window if window > 0 else at // -window == ends // -window
    scores = scores.masked_fill(~seen, float("-inf"))
    if args.sinks is not None:
        sinks = args.sinks.float()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def prompt_logits(
    model: ServedModel, prompt: list[int], comm: Communicator = ALONE
) -> Tensor | None:
    """Logits of every position of `prompt`: [tokens, vocab_size] on rank 0."""
    cache = ContiguousCache(comm)
    cache.begin([(0, len(prompt))])
    positions = torch.arange(len(prompt))
    return model.forward(torch.tensor(prompt), positions, cache.attend, positions)


def generate_greedily(
    model: ServedModel,
    prompts: list[list[int]],
    count: int,
    tokens_of: list[list[int]] | None = None,
    comm: Communicator = ALONE,
) -> list[list[int]]:
    """`count` tokens for each prompt, all packed in one batch.

    tokens_of: the tokens that rank 0 chose, for ranks without logits
    """
    cache = ContiguousCache(comm)
    outputs: list[list[int]] = [[] for _ in prompts]
    steps = list(prompts)
    done = [0] * len(prompts)
    kept = None
    if model.state is not None:
        kept = RecurrentStates(model.state, len(prompts), torch.float32, torch.device("cpu"))
    for step in range(count):
        cache.begin([(seq, len(tokens)) for seq, tokens in enumerate(steps)])
        packed = torch.tensor([token for tokens in steps for token in tokens])
        positions = torch.cat(
            [torch.arange(start, start + len(t)) for start, t in zip(done, steps, strict=True)]
        )
        starts = [0, *torch.tensor([len(t) for t in steps]).cumsum(0).tolist()]
        rows = torch.tensor(starts[1:]) - 1
        states = None
        if kept is not None:
            query_starts = torch.tensor(starts)
            states = kept.step(torch.arange(len(steps)), positions, query_starts, np.array(starts))
        logits = model.forward(packed, positions, cache.attend, rows, states)
        if logits is not None:
            chosen = logits.argmax(-1).tolist()
        else:
            assert tokens_of is not None
            chosen = [tokens[step] for tokens in tokens_of]
        done = [start + len(t) for start, t in zip(done, steps, strict=True)]
        for output, token in zip(outputs, chosen, strict=True):
            output.append(token)
        steps = [[token] for token in chosen]
    return outputs
