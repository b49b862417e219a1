"""Isthmus trains a reasoning model on one vendor's chips, runs it on another's, and proves every crossing."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("isthmus")
    """That of the tag that was installed, or what lies beyond it."""
except PackageNotFoundError:
    __version__ = "0 (not installed)"
__all__ = ["__version__"]
