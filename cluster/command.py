"""The `kvmesh` command, where its packages are installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from kvmesh.cluster.cli import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the kvmesh command needs packages that are not here ({error.name}). "
            "Install them with\n"
            "  pip install 'kvmesh[cli]'     to ask a server: generate, chat, status and others\n"
            "  pip install 'kvmesh[serve]'   to run one as well"
        )
    app()
