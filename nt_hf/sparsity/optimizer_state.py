"""The optimizer's state of weights that are dropped and grown."""

import torch

from ..models.masks import local

# The state that optimizers keep of squared gradients: a grown weight starts with g**2 there (see `move_state`).
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


@torch.no_grad()
def move_state(
    state: dict[str, object], grad: torch.Tensor | None, dropped: torch.Tensor, grown: torch.Tensor
) -> list[str]:
    """Adapts the optimizer's state of one weight, in place, to weights that moved.

    All per-element state of moved weights becomes 0, but the second moment of grown ones, which starts at ``g**2``.
    With both moments 0 and a bias correction long past, Adam's first step of a grown weight would be several times the
    learning rate, and noise alone would make it large enough to survive the next drop.

    Args:
        state: the optimizer's state of the weight, such as ``{"step": …, "exp_avg": …, "exp_avg_sq": …}``.
        grad: the dense gradient of this step; may be ``None`` when nothing grows.
        dropped, grown: bool, of the weight's shape.

    Returns:
        Keys of tensors of another shape (a factored second moment, for example), left as they are.
    """
    other_shape = []
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or (value.numel() == 1 and value.dim() < dropped.dim()):
            continue  # counters
        value = local(value)
        if value.shape != dropped.shape:
            other_shape.append(key)
            continue
        value.masked_fill_(dropped | grown, 0)
        if grad is not None and key in _SECOND_MOMENTS:
            value.copy_(torch.where(grown, grad.square().to(value.dtype), value))
    return other_shape
