"""Which Python modules are there: told without importing them."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(module: str) -> bool:
    """Whether a module of this dotted name can be found; the packages around it are imported, it is not."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
