"""Sparse kernels for trained models."""

from .specialization import LayerReport, Report, restore, specialize

__all__ = ["LayerReport", "Report", "restore", "specialize"]
