"""For all tests: threads that wait sleep, so that a shared machine does not slow them tenfold."""

from __future__ import annotations

import os

from kvmesh.workers.threads import wait_passively

wait_passively(os.environ)  # before anything imports torch
