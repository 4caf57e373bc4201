"""Refusals that name the field at fault by its path in the request."""

from __future__ import annotations

from typing import NoReturn

from kvmesh.workers.errors import InvalidFieldError


def refuse(field: str, message: str) -> NoReturn:
    raise InvalidFieldError(field, message)
