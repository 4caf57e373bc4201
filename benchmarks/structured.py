"""What constrained rows cost the host in a decode step.

    python -m benchmarks.structured [--output FILE]

The masks of a batch are made in a thread while the ranks compute, so this is the time that a
step must take anyway for them to cost nothing. Besides it: the load of a vocabulary, and how
long a grammar takes until its first mask. Vocabularies are random words of the sizes of
Llama 2's, SmolLM2's and Qwen's; tokens follow the mask at random, with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tokenizers

from benchmarks.device import conditions
from kvmesh.cluster.routing.rolling import nearest_rank
from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.executor import RankDescription
from kvmesh.workers.structured import grammar
from kvmesh.workers.structured.grammars import Grammars
from kvmesh.workers.structured.masks import MaskMaker
from kvmesh.workers.structured.state import OutputState
from kvmesh.workers.structured.vocabulary import Vocabulary

VOCABULARIES = (32_000, 49_152, 151_851)
BATCHES = (1, 8, 32)
STEPS = 120
EOS = 0

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json schema": grammar.json_schema(PERSON),
    "any json object": grammar.json_schema({"type": "object"}),
    "regex": grammar.regex(r"([a-z]+@[a-z]+\.com, )*\d{4}-\d{2}-\d{2}"),
    "grammar": grammar.context_free(
        'root ::= expr\nexpr ::= term ("+" term)*\nterm ::= [0-9]+ | "(" expr ")"'
    ),
}


def make_vocabulary(directory: Path, size: int) -> None:
    """A byte-level tokenizer with every byte and random words."""
    draw = Random(size)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    names = {"</s>": EOS, **{character: i for i, character in enumerate(sorted(alphabet), 1)}}
    letters = 'etaoinshrdlucmfwypvbgkjqxzETAOIN0123456789"{}[]:,.-_'
    while len(names) < size:
        word = "".join(draw.choices(letters, k=draw.randint(2, 10)))
        names.setdefault(draw.choice(["", "Ġ"]) + word, len(names))
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(names, []))
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(["</s>"])
    raw.save(str(directory / "tokenizer.json"))


def description(directory: Path, size: int) -> RankDescription:
    return RankDescription(
        "random", "0", "float32", size, 8192, (EOS,), 0, 0, 1, 1, 1, 64, model_path=str(directory)
    )


def step_times(
    grammars: Grammars, found: grammar.Grammar, size: int, batch: int, steps: int
) -> list[float]:
    """Seconds for the masks of each step, with the tokens of the step before."""
    masks, draw = MaskMaker(size), Random(1)
    constraint = OutputConstraint(found.text())
    states: list[OutputState] = [grammars.prepare(constraint, ()).result() for _ in range(batch)]
    times = []
    for step in range(steps):
        began = time.perf_counter()
        made = masks.start(step, list(enumerate(states))).result()
        times.append(time.perf_counter() - began)
        rows = np.frombuffer(made.bits, np.uint8).reshape(batch, -1)
        for index, row in enumerate(rows):
            allowed = np.flatnonzero(np.unpackbits(row, bitorder="little"))
            token = int(allowed[draw.randrange(len(allowed))])
            if token == EOS:
                states[index] = grammars.prepare(constraint, ()).result()
            else:
                states[index].accept(token)
    return times


def measure(size: int, batches: tuple[int, ...] = BATCHES, steps: int = STEPS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_vocabulary(directory, size)
        began = time.perf_counter()
        Vocabulary.load(directory, size, (EOS,))
        load_s = time.perf_counter() - began
        grammars = Grammars(description(directory, size))
        grammars.prepare(OutputConstraint(grammar.regex("a").text()), ()).result()
        rows = []
        for kind, found in GRAMMARS.items():
            began = time.perf_counter()
            state = grammars.prepare(OutputConstraint(found.text()), ()).result()
            MaskMaker(size).make(0, [(0, state)])
            first_s = time.perf_counter() - began
            for batch in batches:
                times = sorted(step_times(grammars, found, size, batch, steps))
                rows.append(
                    {
                        "kind": kind,
                        "batch": batch,
                        "first_mask_ms": round(first_s * 1e3, 2),
                        "median_ms": round(statistics.median(times) * 1e3, 3),
                        "p95_ms": round(times[nearest_rank(0.95, len(times))] * 1e3, 3),
                        "max_ms": round(times[-1] * 1e3, 2),
                    }
                )
    return {"vocabulary": size, "load_s": round(load_s, 2), "steps": steps, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    measured = [measure(size) for size in VOCABULARIES]
    results = {"device": conditions(), "vocabularies": measured}
    for result in measured:
        print(f"{result['vocabulary']:,} tokens, loaded in {result['load_s']} s")
        for row in result["rows"]:
            print(
                f"  {row['kind']:16} batch {row['batch']:3}: median {row['median_ms']:8.3f} ms, "
                f"p95 {row['p95_ms']:8.3f}, max {row['max_ms']:8.2f}; "
                f"first mask after {row['first_mask_ms']:.1f} ms"
            )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
