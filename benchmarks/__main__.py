"""`make bench`: runs the CPU benchmarks one after the other; each also runs alone, with options.

The one next to llama.cpp says how to install that where it is missing."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = (
    *("benchmarks.engine", "benchmarks.serving", "benchmarks.attention_cpu"),
    "benchmarks.llama_cpp",
)


def main() -> int:
    """Run each in its own process, so that none inherits another's threads."""
    for name in BENCHMARKS:
        print(f"\n== python -m {name}", flush=True)
        code = subprocess.run([sys.executable, "-m", name], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
