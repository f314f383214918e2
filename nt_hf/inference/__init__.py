"""Fast inference of trained models: sparse kernels, and drafts for speculative decoding."""

from .drafts import draft_model
from .sparse_weights import load_sparse
from .specialization import LayerReport, Report, restore, specialize

__all__ = ["LayerReport", "Report", "draft_model", "load_sparse", "restore", "specialize"]
