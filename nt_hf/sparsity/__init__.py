"""Dynamic sparse training of any PyTorch module."""
