"""Write the parts of the SDK that would repeat others, or check that they are current.

    python -I client/generate.py [--check]

async_generations.py: the four methods that generate, with a parameter for each of
`GenerateOptions` or `ChatOptions`, so that help(), editors and type checkers know them
sync_*.py: the blocking client, which is async_*.py without `async` and `await`

Nothing of the SDK is imported, so that this also works while these files are missing. -I leaves
this folder, which has a types.py, out of the modules' path.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
GENERATIONS = "async_generations.py"

# Name, prompt, what makes its message, result, and the first line of the docstring.
METHODS = (
    ("async def generate", "prompt: str | Sequence[int]", "prompt_message(prompt)", "Completion",
     "Continue a prompt given as text or token ids; returns the whole output."),
    ("def generate_stream", "prompt: str | Sequence[int]", "prompt_message(prompt)", "AsyncStream",
     "Continue a prompt; returns a stream that yields output as it is generated."),
    ("async def chat", "messages: Messages", "chat_message(messages)", "Completion",
     "Answer a chat rendered with the model's template; returns the whole output."),
    ("def chat_stream", "messages: Messages", "chat_message(messages)", "AsyncStream",
     "Answer a chat; returns a stream that yields output as it is generated."),
)  # fmt: skip

HEAD = '''"""The methods of the asyncio client that generate. Written by `make sdk`; do not edit."""

# Annotations are not texts, so that help() shows them without quotes.
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Never

from kvmesh.client.async_stream import AsyncStream
from kvmesh.client.options import UNSET, Messages, Timeout
from kvmesh.client.requests import chat_message, prompt_message
from kvmesh.client.types import Completion
from kvmesh.protos import pb


class AsyncGenerations(ABC):
    """Implemented by AsyncClient."""

    @abstractmethod
    async def _complete(self, prompt: pb.Prompt, options: dict[str, Any]) -> Completion: ...

    @abstractmethod
    def _stream(self, prompt: pb.Prompt, options: dict[str, Any]) -> AsyncStream: ...
'''

# What differs between async_*.py and sync_*.py, in this order.
SUBSTITUTIONS = (
    (r"asyncio client", "blocking client"),
    (r", for use in one event loop\.", "; safe to share between threads."),
    (r"\ban AsyncClient\b", "a Client"),
    (r"\b(async|await) ", ""),
    (r"\b(Stop)?Async(?=[A-Z])", r"\1"),
    (r"\basync_", "sync_"),
    (r"\b__a(?=(enter|exit|iter|next)__)", "__"),
    (r"\ba(?=(close|next|iter)\b)", ""),
)


def generations() -> str:
    """The source of async_generations.py."""
    return HEAD + "".join(_method(*method) for method in METHODS)


def _method(name: str, prompt: str, message: str, result: str, summary: str) -> str:
    classes = _options_classes("GenerateOptions", *(["ChatOptions"] if "chat" in name else []))
    options = {name: kind for found in classes for name, kind in _options(found)}
    parameters = "".join(f"        {name}: {kind},\n" for name, kind in options.items())
    described = [(ast.get_docstring(found) or "").partition("\n\n")[2] for found in classes]
    docstring = "\n".join(f"        {line}".rstrip() for x in described for line in x.splitlines())
    values = ", ".join(f'"{name}": {name}' for name in options)
    call = (
        f"await self._complete({message}" if result == "Completion" else f"self._stream({message}"
    )
    return f'''
    {name}(
        self,
        {prompt},
        *,
{parameters}        **unknown: Never,
    ) -> {result}:
        """{summary}

{docstring}
        """
        return {call}, {{{values}, **unknown}})
'''


def _options(declared: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """For each option: its name, and its type with the default."""
    for statement in declared.body:
        if isinstance(statement, ast.AnnAssign):
            kind = ast.unparse(statement.annotation)
            default = "Timeout = UNSET" if kind == "Timeout" else f"{kind} | None = None"
            yield ast.unparse(statement.target), default


def _options_classes(*names: str) -> list[ast.ClassDef]:
    tree = ast.parse((HERE / "options.py").read_text("utf-8"))
    return [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]


def blocking(source: str) -> str:
    """The blocking form of an asynchronous module."""
    for pattern, replacement in SUBSTITUTIONS:
        source = re.sub(pattern, replacement, source)
    return source


def _formatted(source: str, name: str) -> str:
    for command in (("check", "--select", "I", "--fix", "--quiet"), ("format",)):
        source = subprocess.run(
            [sys.executable, "-m", "ruff", *command, f"--stdin-filename={HERE / name}", "-"],
            input=source, capture_output=True, text=True, check=True, cwd=HERE.parent,
        ).stdout  # fmt: skip
    return source


def written() -> dict[str, str]:
    """Every file that is written, by its name in this folder."""
    sources = {path.name: path.read_text("utf-8") for path in HERE.glob("async_*.py")}
    sources[GENERATIONS] = _formatted(generations(), GENERATIONS)
    note = "# Written by `make sdk` from {}; do not edit.\n"
    blocking_sources = {
        name.replace("async_", "sync_"): note.format(name) + blocking(source)
        for name, source in sources.items()
    }
    fresh = {name: _formatted(source, name) for name, source in blocking_sources.items()}
    return {GENERATIONS: sources[GENERATIONS], **fresh}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check: bool = parser.parse_args().check
    stale = {
        name: source
        for name, source in written().items()
        if not (HERE / name).exists() or (HERE / name).read_text("utf-8") != source
    }
    for name, source in stale.items():
        if check:
            print(f"client/{name} is stale; run `make sdk`", file=sys.stderr)
        else:
            (HERE / name).write_text(source, "utf-8")
            print(f"wrote client/{name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
