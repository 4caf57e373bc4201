"""Facts of the embedded model; tests/workers/test_greedy_output.py has what it generates."""

from __future__ import annotations

from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.source import resolve_model


def test_facts() -> None:
    facts = read_facts(resolve_model(EMBEDDED_NAME).path)
    assert (facts.name, facts.architecture) == (EMBEDDED_NAME, "LlamaForCausalLM")
    assert (facts.num_layers, facts.num_heads, facts.num_kv_heads) == (30, 9, 3)
    assert (facts.head_dim, facts.hidden_size, facts.vocab_size) == (64, 576, 49152)
    assert (facts.max_model_len, facts.eos_token_ids) == (8192, (2, 0))
