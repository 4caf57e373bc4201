"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    try:
        return version("kvmesh")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
