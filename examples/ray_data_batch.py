"""Continue a data set of prompts on every node of a Ray cluster: Ray Data over kvmesh.LLM.

    pip install 'kvmesh[serve]' 'ray[data]'
    python examples/ray_data_batch.py prompts.jsonl completions [MODEL]

Each actor holds a model: one for each GPU of the cluster, or a single one without any. Rows of
the input have a `prompt`; those of the output a `completion`, or why there is none as `error`.
"""

import sys
from typing import Any

import ray
import ray.data

from kvmesh import KVMeshError


class Continue:
    """What an actor does with a batch of rows: a mapping from columns to arrays."""

    def __init__(self, model: str | None) -> None:
        # Here, so that the program itself loads no torch.
        from kvmesh import LLM

        self.llm = LLM(model, kv_format="k4v4")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = self.llm.generate(
            batch["prompt"], temperature=0.0, max_tokens=32, on_error="return"
        )
        failed = [isinstance(result, KVMeshError) for result in results]
        return {
            "prompt": batch["prompt"],
            "completion": ["" if isinstance(x, KVMeshError) else x.text for x in results],
            "error": [str(x) if bad else "" for x, bad in zip(results, failed, strict=True)],
        }


def main(source: str, target: str, model: str | None = None) -> None:
    ray.init()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    prompts = ray.data.read_json(source, lines=True)
    # Large batches: within each, as many prompts are computed together as fit.
    completions = prompts.map_batches(
        Continue,
        fn_constructor_args=(model,),
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=max(gpus, 1)),
        num_gpus=1 if gpus else 0,
    )
    completions.write_json(target)
    print(f"continued in {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
