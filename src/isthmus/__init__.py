"""Isthmus trains a reasoning model on one vendor's chips, runs it on another's, and proves every crossing."""

__version__ = "0.1.0"
__all__ = ["__version__"]
