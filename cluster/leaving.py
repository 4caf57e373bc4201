"""Groups that take nothing new and finish what they have: when, and under which names."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping


def to_close(open_groups: Mapping[str, str], leaving_nodes: Collection[str]) -> list[str]:
    """Those of the open groups that take nothing new from now on.

    A group closes when its node leaves; but not the last ones, before another group is there:
    a sequence that has to move loses less than a request that finds no group.

    open_groups: by name, the node of each group that takes requests
    """
    leaving = [name for name, node in open_groups.items() if node in leaving_nodes]
    return leaving if len(leaving) < len(open_groups) else []


def name_while_leaving(group: str, taken: Collection[str]) -> str:
    """A name for an engine whose group's own name is its successor's."""
    names = (f"{group}.leaving{number or ''}" for number in itertools.count())
    return next(name for name in names if name not in taken)
