"""Where logs go, and the fields that they share: request_id, tenant, group. Never texts or keys.

Serve writes the log of each of its processes to a file of JSON lines, which Ray's dashboard shows
with the replica.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

SERVE_LOGGER, OUR_LOGGER = "ray.serve", "kvmesh"


def use_serve_log(group: str = "") -> None:
    """Write what this process logs to Serve's file. group: on each line, if given"""
    serve, ours = logging.getLogger(SERVE_LOGGER), logging.getLogger(OUR_LOGGER)
    ours.handlers = list(serve.handlers)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    if group:
        for handler in ours.handlers:
            handler.addFilter(_of_group(group))


def about(key: str = "", group: str = "") -> dict[str, str]:
    """Fields of a log line, as its `extra`. key: tenant/id of a request"""
    tenant, _, request_id = key.partition("/")
    fields = {"tenant": tenant, "request_id": request_id, "group": group}
    return {name: value for name, value in fields.items() if value}


def _of_group(group: str) -> Callable[[logging.LogRecord], bool]:
    def add(record: logging.LogRecord) -> bool:
        if not hasattr(record, "group"):
            record.group = group
        return True

    return add
