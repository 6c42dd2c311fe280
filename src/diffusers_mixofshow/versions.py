"""Which versions of packages are installed."""

from __future__ import annotations

from importlib import metadata


PACKAGE = "diffusers-mixofshow"


def installed_version(package: str = PACKAGE) -> str:
    """A package's version; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
