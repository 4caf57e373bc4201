"""The rotation of values, in every step or folded into the model's weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.basis import Basis
from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.model.load import ServedModel, load_model
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.heads import merge_over_ranks
from tests.model.small import VOCAB_SIZE, make_small_model
from tests.workers.thread_ranks import thread_communicators

CPU = torch.device("cpu")


ALONE = Communicator.single()


def loaded(
    folder: Path, architecture: str, dtype: torch.dtype, comm: Communicator = ALONE
) -> ServedModel:
    path = make_small_model(
        architecture, folder, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    return load_model(path, dtype=dtype, device=CPU, comm=comm)


def logits(model: ServedModel, kv_format: str, comm: Communicator = ALONE) -> torch.Tensor | None:
    """Of a prompt, with exact attention over what the format would store; on rank 0."""
    basis = Basis(
        get_format(kv_format),
        model.head_dim,
        torch.float32,
        CPU,
        values_rotated=model.values_rotated,
    )

    def attend(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttendArgs
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1) for x in basis.enter(q, k, v))
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=args.scale, enable_gqa=True
        )
        out = basis.leave(out[0].transpose(0, 1))
        if comm.kvp == 1:
            return out
        return merge_over_ranks(out, torch.zeros(out.shape[:2]), comm)[0]

    positions = torch.arange(20)
    return model.forward(positions % VOCAB_SIZE, positions, attend, positions)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_a_folded_rotation_changes_only_the_basis(architecture: str, tmp_path: Path) -> None:
    """Qwen2 has biases. Both have fewer KV heads than query heads."""
    model = loaded(tmp_path, architecture, torch.bfloat16)
    model._body.float()  # rounding would hide errors
    model._head.float()
    want = logits(model, "exact")
    stored = {kind: logits(model, kind) for kind in ("int8", "k4v4")}
    assert model.rotate_values(True) and model.values_rotated
    for kv_format in ("exact", "int8", "k4v4"):
        torch.testing.assert_close(logits(model, kv_format), want, atol=1e-4, rtol=0)
        if kv_format in stored:
            torch.testing.assert_close(stored[kv_format], want, atol=1e-4, rtol=0)
    folded = Basis(get_format("k4v4"), 32, torch.float32, CPU, values_rotated=True)
    x = torch.randn(3, 2, 32)
    assert folded.enter_values(x) is x and folded.leave(x) is x
    assert model.rotate_values(False)
    torch.testing.assert_close(logits(model, "k4v4"), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kvp", "folds"), [(2, True), (8, False)])
def test_a_rotation_is_folded_where_ranks_have_whole_heads(
    kvp: int, folds: bool, tmp_path: Path
) -> None:
    """Of 4 heads, which ranks merge in the basis in which they have them."""
    alone = loaded(tmp_path, "LlamaForCausalLM", torch.bfloat16)
    comms = thread_communicators(kvp, kvp)
    ranks = [loaded(tmp_path, "LlamaForCausalLM", torch.bfloat16, comm) for comm in comms]
    for model in (alone, *ranks):
        model._body.float()
        model._head.float()
    assert [model.rotate_values(True) for model in ranks] == [folds] * kvp
    with ThreadPoolExecutor(kvp) as threads:
        found = [*threads.map(logits, ranks, ["k4v4"] * kvp, comms)]
    torch.testing.assert_close(found[0], logits(alone, "exact"), atol=1e-4, rtol=0)
    assert found[1:] == [None] * (kvp - 1)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("StableLmForCausalLM", torch.bfloat16), ("LlamaForCausalLM", torch.float32)],
)
def test_what_cannot_be_folded_stays(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Other modules than ours would see the values, or weights are packed for a CPU."""
    model = loaded(tmp_path, architecture, dtype)
    assert not model.rotate_values(True)
    assert not model.values_rotated
