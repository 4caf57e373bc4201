"""A rank's process: load, then execute what the leader sends until it sends Close."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from kvmesh.workers.cache_directory import keep_compiled_loops
from kvmesh.workers.channel import Allocated, Close, Divergences, Failed, Flush, Probe, RankEnd
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.executor import Allocation
from kvmesh.workers.freed_memory import return_memory
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import StepPlan, TokenMasks
from kvmesh.workers.rank import Rank, choose_device
from kvmesh.workers.rank_steps import RankSteps

logger = logging.getLogger(__name__)

_PARENT_CHECK_S = 1.0


def worker_main(config: EngineConfig, rank: int, endpoint: str, rendezvous: Path) -> None:
    """Serve `rank` of the group until the leader closes it or is gone.

    endpoint: the leader's channel; rendezvous: file through which the ranks meet
    A failure is reported to the leader and then raised.
    """
    keep_compiled_loops(os.environ)
    parent = os.getppid()
    end = RankEnd(endpoint)
    try:
        comm = Communicator.connect(
            rank,
            config.ranks,
            rendezvous,
            device=choose_device(config, rank),
            kvp=config.kvp,
            deterministic=config.deterministic,
        )
        try:
            _serve(Rank(config, rank, comm), end, parent)
        finally:
            comm.close()
    except ConfigError as error:
        end.send(Failed(type(error).__name__, error.message, error.field))
        raise
    except Exception as error:
        logger.exception("rank %d failed", rank)
        end.send(Failed(type(error).__name__, str(error)))
        raise
    finally:
        end.close()


def _serve(rank: Rank, end: RankEnd, parent: int) -> None:
    end.send(rank.describe())
    # A step that is not computed yet is answered once the next one is launched, or on request.
    keep = 1 if rank.runs_ahead else 0
    has_worked = True  # since it last waited in vain
    while True:
        message = end.receive(_PARENT_CHECK_S)
        if isinstance(message, Close):
            return
        if message is None:
            if os.getppid() != parent:
                logger.warning("the leader is gone")
                return
            if has_worked:
                return_memory()
        elif isinstance(message, Allocation):
            rank.allocate(message)
            return_memory()  # of loading and of the probe, up to 200 MB
            steps = RankSteps(rank.runner, samples=rank.samples)
            end.send(Allocated())
        elif isinstance(message, Probe):
            kl_nats = rank.divergences(message.kv_formats)
            if kl_nats:
                end.send(Divergences(kl_nats))
        else:
            if isinstance(message, StepPlan):
                steps.submit(message)
            elif isinstance(message, TokenMasks):
                steps.mask(message)
            for result in steps.results(0 if isinstance(message, Flush) else keep):
                end.send(result)
        has_worked = message is not None
