"""Sparse kernels for trained models."""

from .sparse_weights import load_sparse
from .specialization import LayerReport, Report, restore, specialize

__all__ = ["LayerReport", "Report", "load_sparse", "restore", "specialize"]
