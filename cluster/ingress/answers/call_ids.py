"""Ids of tool calls: the same whichever ingress sends them, so that a stream can resume."""

from __future__ import annotations

import hashlib

from kvmesh.cluster.ingress.answers.syntaxes import ToolSyntax


def call_id(request: str, syntax: ToolSyntax | None, choice: int, call: int) -> str:
    """request: its key. Mistral's templates accept nothing but nine letters or digits."""
    digest = hashlib.sha256(f"{request}/{choice}/{call}".encode()).hexdigest()
    if syntax is not None and syntax.name.startswith("mistral"):
        return digest[:9]
    return f"call_{digest[:24]}"
