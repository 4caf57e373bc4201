"""Executes step plans on one rank: tables, model, attention over the pool, sampling."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.attention import can_be_deterministic, sharers, warm_up_far
from kvmesh.kernels.cpu import has_loops
from kvmesh.kernels.formats.base import KVFormat, ModelParams
from kvmesh.workers.basis import Basis
from kvmesh.workers.decode_graphs import DecodeGraphs
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.executor import Allocation
from kvmesh.workers.expert_load import ExpertLoad
from kvmesh.workers.kv_pool import KVPool
from kvmesh.workers.last_tokens import LastTokens
from kvmesh.workers.launched_step import LaunchedStep
from kvmesh.workers.model.blocks import fuses
from kvmesh.workers.model.hook import Entry
from kvmesh.workers.model.load import ServedModel
from kvmesh.workers.model.recurrent_state import RecurrentStates
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import (
    PENDING,
    StepPlan,
    StepResult,
    TableUpdate,
    TokenMasks,
    TokenScores,
)
from kvmesh.workers.rank_pages import Ints, RankPages
from kvmesh.workers.sampler import Sampler
from kvmesh.workers.shared_prefixes import PrefixFinder
from kvmesh.workers.step import (
    BlockTables,
    StepArrays,
    StepTensors,
    Works,
    decode_works,
    ints,
    to_device,
)
from kvmesh.workers.step_attention import RankAttention, StepAttention
from kvmesh.workers.warm_up import warm_up_steps

# Rows of logits that are computed at a time to score given tokens: 78 MB in fp32 for a vocabulary
# of 152,000 tokens, whatever the chunk's length.
SCORED_ROWS = 128


class ModelRunner:
    """One rank's model, pool and sampler.

    comm: of the group, between whose kvp ranks pages are dealt
    sink_pages, recent_pages: windows that are read exactly, the same on every rank of the group
    prepare_decode: compile decode, and capture its CUDA graphs, before the first step
    samples: whether this rank gets the logits and samples the tokens
    params: calibrated parameters for this rank's heads, if the format needs them
    deterministic: what is computed for a token has the same bits in any step; the model's products
        must have, too
    """

    def __init__(
        self,
        model: ServedModel,
        fmt: KVFormat,
        allocation: Allocation,
        comm: Communicator,
        *,
        page_size: int,
        sink_pages: int,
        recent_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        samples: bool,
        cuda_graphs: bool,
        prepare_decode: bool = True,
        params: ModelParams | None = None,
        deterministic: bool = False,
    ) -> None:
        self._model = model
        self._comm = comm
        self._pages = RankPages(comm.kvp, comm.kvp_rank, allocation.max_rows)
        basis = Basis(
            fmt,
            model.head_dim,
            dtype,
            device,
            values_rotated=model.values_rotated,
            deterministic=deterministic,
        )
        self._device = device
        self._pool = KVPool(
            allocation,
            fmt,
            num_layers=model.facts.num_kv_layers,
            num_kv_heads=model.num_kv_heads,
            page_size=page_size,
            head_dim=model.head_dim,
            dtype=dtype,
            device=device,
        )
        self._tables = BlockTables(
            self._pool.hot_tables,
            self._pool.sealed_tables,
            page_size,
            sink_pages,
            recent_pages,
            comm.kvp,
            deterministic,
        )
        self._states: RecurrentStates | None = None
        if model.state is not None:
            self._states = RecurrentStates(model.state, allocation.max_rows, dtype, device)
        if deterministic and not can_be_deterministic(fmt, self._pool.hot[0]):
            raise ConfigError(
                "deterministic",
                f"must be false for {fmt.name} with {model.head_dim} channels a head and pages of "
                f"{page_size} tokens: nothing reads them in a fixed order",
            )
        # Host copies of the tables, so that slots and shared prefixes are found without reading
        # from the device.
        self._hot_ids = np.full(self._pool.hot_tables.shape, -1, dtype=np.int64)
        self._sealed_ids = np.full(self._pool.sealed_tables.shape, -1, dtype=np.int64)
        min_members, max_members = sharers(fmt, self._pool.hot[0], model.num_heads)
        self._prefixes = PrefixFinder(self._sealed_ids, min_members, max_members)
        facts = model.facts
        self._sampler = Sampler.of(facts, device) if samples else None
        self._last_tokens = LastTokens(allocation.max_rows, device, comm)
        # The layers' sliding windows, and whether attention's kernels need to know the work ahead.
        self._windows = frozenset(facts.sliding_windows)
        self._divides = gpu.runs_kernels(self._pool.hot_tables)
        self._attention = RankAttention(fmt, self._pool, basis, comm, model.head_dim, params)
        self._entry = _entry(self._pool.all_hot, basis)
        self._graphs: DecodeGraphs | None = None
        if prepare_decode:
            self._warm_up(min_members)
        if prepare_decode and cuda_graphs and device.type == "cuda":
            with torch.inference_mode():
                self._graphs = DecodeGraphs(
                    self._forward,
                    self._tables,
                    max_rows=allocation.max_rows,
                    sliding_windows=self._windows,
                    min_members=min_members,
                )
        self._expert_load = ExpertLoad(model)  # warm-up steps do not count

    @property
    def pool(self) -> KVPool:
        """This rank's pages."""
        return self._pool

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Compute a plan without masks, and wait for the result; None on ranks that do not
        sample."""
        step = self.launch(plan)
        self.sample(step)
        return self.result(step)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start computing the plan, after the step before has been sampled. On a GPU this does not
        wait for the device, unless scores are wanted."""
        start_s = time.perf_counter()
        arrays = self._prepare(plan)
        if arrays.num_pending:
            self._last_tokens.share()
        sampling = None
        if self._sampler is not None:
            sampled = [chunk for chunk in plan.chunks if chunk.sample]
            if sampled:
                sampling = self._sampler.prepare(
                    [chunk.row for chunk in sampled], [chunk.end for chunk in sampled]
                )
        works = self._works(arrays)
        scores: list[TokenScores] = []
        if self._graphs is not None and self._graphs.fits(arrays, works) and not plan.scores:
            self._last_tokens.put_known(arrays)
            host_s = time.perf_counter() - start_s
            logits, rows = self._graphs.run(arrays, works)
        else:
            step = to_device(arrays, self._tables, self._device, works)
            host_s = time.perf_counter() - start_s
            hidden = self._hidden(step)
            if plan.scores:
                scores = self._score_targets(plan, arrays, hidden)
            logits, rows = self._model.logits(hidden, step.logits_rows), step.sampled_rows
        return LaunchedStep(plan, host_s, scores, rows, logits, sampling)

    @torch.inference_mode()
    def sample(self, step: LaunchedStep, masks: TokenMasks | None = None) -> None:
        """Sample its tokens, where the next step finds them. masks: if the plan is masked"""
        logits, step.logits = step.logits, None
        if self._sampler is None or step.sampling is None or logits is None:
            return
        assert step.plan.masked == (masks is not None), "a masked plan comes with its masks"
        step.sampled = self._sampler.sample(logits, step.sampling, masks)
        self._last_tokens.put(step.rows, step.sampled.tokens)

    def result(self, step: LaunchedStep) -> StepResult | None:
        """Wait for its tokens; None on ranks that do not sample."""
        if self._sampler is None:
            return None
        tokens = [] if step.sampled is None else step.sampled.read()
        imbalance = self._expert_load.after_step()
        return StepResult(step.plan.step, tokens, step.host_s, step.scores, imbalance)

    def _score_targets(
        self, plan: StepPlan, arrays: StepArrays, hidden: torch.Tensor
    ) -> list[TokenScores]:
        """Scores of each chunk's targets, a few rows of logits at a time; [] on other ranks."""
        found: list[TokenScores] = []
        for chunk, first in zip(plan.chunks, arrays.query_starts, strict=False):
            targets = np.frombuffer(chunk.targets, dtype=np.int32)
            if not targets.size:
                continue
            first_row = int(first) + chunk.score_start - chunk.start
            parts: list[TokenScores] = []
            for start in range(0, targets.size, SCORED_ROWS):
                some = ints(targets[start : start + SCORED_ROWS], self._device)
                rows = torch.arange(len(some), device=self._device) + (first_row + start)
                logits = self._model.logits(hidden, rows)
                if self._sampler is not None and logits is not None:
                    parts.append(self._sampler.score(chunk.row, logits, some))
            if parts:
                found.append(TokenScores.joined(parts))
        return found

    @torch.inference_mode()
    def score(self, plan: StepPlan) -> torch.Tensor | None:
        """Compute the plan without sampling: the logits [T, vocab_size] fp32 of all its T
        tokens, in the order of its chunks, on the rank that samples; None on the others."""
        arrays = self._prepare(plan)
        every = replace(arrays, logits_rows=np.arange(len(arrays.input_ids)))
        return self._forward(to_device(every, self._tables, self._device))

    def _prepare(self, plan: StepPlan) -> StepArrays:
        """Update tables and sampler; returns the plan as arrays."""
        for row_start in plan.row_starts:
            self._pages.start_row(row_start)
        self._update(self._tables.hot, self._hot_ids, plan.hot)
        if self._update(self._tables.sealed, self._sealed_ids, plan.sealed):
            self._prefixes.note_update()
        if self._sampler is not None:
            for row_start in plan.row_starts:
                self._sampler.start_row(row_start)
            for chunk in plan.chunks:
                if chunk.tokens != PENDING:
                    self._sampler.record_tokens(chunk.row, chunk.start, chunk.tokens)
                elif self._sampler.penalises(chunk.row):
                    token = self._last_tokens.of(chunk.row)
                    self._sampler.record(chunk.row, chunk.start, token)
        tables = self._tables
        arrays = StepArrays.of(plan, self._hot_ids, tables.page_size, self._pages)
        alone = np.diff(arrays.query_starts) > 1
        recent = (arrays.seq_lens - 1) // tables.page_size - tables.recent_pages
        stops = np.where(alone, 0, self._pages.below(recent, arrays.rows))
        starts = self._pages.below(tables.sink_pages, arrays.rows)
        prefixes = None
        if not tables.deterministic:
            prefixes = self._prefixes.find(arrays.rows, starts, stops)
        return replace(arrays, prefixes=prefixes)

    def _works(self, arrays: StepArrays) -> Works:
        """How kernels divide decode; loops for CPUs divide it themselves."""
        return decode_works(arrays, self._tables, self._windows) if self._divides else {}

    def _forward(self, step: StepTensors) -> torch.Tensor | None:
        """Logits [n, vocab_size] fp32 of the step's sampled rows; None on ranks without logits."""
        return self._model.logits(self._hidden(step), step.logits_rows)

    def _hidden(self, step: StepTensors) -> torch.Tensor:
        """Last hidden states [T, hidden_size] of the step's tokens."""
        states = None
        if self._states is not None:
            lengths = step.batch.lengths
            assert lengths is not None, "the host knows a step's lengths"
            states = self._states.step(
                step.batch.rows, step.positions, step.batch.query_starts, lengths.query_starts
            )
        input_ids = step.input_ids
        if step.num_pending:
            input_ids = self._last_tokens.put_in(step)
        attend = StepAttention(self._attention, step)
        hidden = self._model.hidden(input_ids, step.positions, attend, states, self._entry)
        attend.finish()
        return hidden

    @torch.inference_mode()
    def _warm_up(self, min_members: int) -> None:
        """Compile every kernel and loop. All ranks of a group take the same steps."""
        pages = (self._pool.hot_tables, self._pool.sealed_tables)
        for table in pages:
            table.fill_(0)
        for arrays in warm_up_steps(self._tables, min_members, divides=self._divides):
            step = to_device(arrays, self._tables, self._device, self._works(arrays))
            logits = self._forward(step)
            if self._sampler is not None and logits is not None:
                self._sampler.warm_up(logits)
        if self._divides and not self._tables.deterministic:
            warm_up_far(self._pool.hot[0], self._model.num_heads, fmt=self._attention.fmt)
        for table in pages:
            table.fill_(-1)
        self._pool.all_hot.select(1, 0).zero_()

    def _update(self, table: torch.Tensor, host_copy: Ints, update: TableUpdate) -> bool:
        """Note which pages this rank has now; whether there are any."""
        if not update.ids:
            return False
        rows, columns, ids = self._pages.entries(update)
        if len(ids):
            host_copy[rows, columns] = ids
            at = ints(rows, self._device), ints(columns, self._device)
            table[at] = ints(ids, self._device, torch.int32)
        return len(ids) > 0


def _entry(hot: torch.Tensor, basis: Basis) -> Entry:
    """How far layers may take what goes into these pages: fused operators write keys as they are
    after RoPE, and those for CPUs also rotate values."""
    if not (fuses(hot) and basis.keeps_keys):
        return Entry.PLAIN
    return Entry.WRITTEN if has_loops(hot) else Entry.ROPE
