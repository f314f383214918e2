"""Sparse kernels for trained models."""

from .sparse_runtime import restore, specialize

__all__ = ["restore", "specialize"]
