"""`kvmesh bench`: measures a running server, and the memory of KV formats."""

from __future__ import annotations

import typer

from kvmesh.cluster.cli.bench_memory import bench_memory
from kvmesh.cluster.cli.bench_serve import bench_serve

bench_app = typer.Typer(
    help="Measure a running server, and the memory that KV formats take.", no_args_is_help=True
)
bench_app.command("serve")(bench_serve)
bench_app.command("memory")(bench_memory)
