"""The command line: commands.py lists its commands."""

from __future__ import annotations

import codecs
import io
import sys


def main() -> None:
    """The `kvmesh` command: run it, or say what to install for it."""
    try:
        from kvmesh.cluster.cli.commands import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the kvmesh command needs packages that are not here ({error.name}). "
            "Install them with\n"
            "  pip install 'kvmesh[cli]'     to ask a server: generate, chat, status and others\n"
            "  pip install 'kvmesh[serve]'   to run one as well"
        )
    if (
        isinstance(sys.stdout, io.TextIOWrapper)
        and codecs.lookup(sys.stdout.encoding).name != "utf-8"
    ):
        # Other encodings lack characters: show "?", as an error would end a text midway.
        sys.stdout.reconfigure(errors="replace")
    app()
