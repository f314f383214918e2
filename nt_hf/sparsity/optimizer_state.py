"""The optimizer's state of weights that are dropped and grown."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..models.masks import local

# The state that optimizers keep of squared gradients: a grown weight starts with g**2 there (see `move_state`).
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")

# The optimizers whose second moment is, element by element, a moving average of squared gradients: its key in their
# state, and its decay in a group of parameters.
_MOVING_AVERAGES: dict[type, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    torch.optim.Adam: ("exp_avg_sq", lambda group: group["betas"][1]),
    torch.optim.AdamW: ("exp_avg_sq", lambda group: group["betas"][1]),
    torch.optim.NAdam: ("exp_avg_sq", lambda group: group["betas"][1]),
    torch.optim.RAdam: ("exp_avg_sq", lambda group: group["betas"][1]),
    torch.optim.RMSprop: ("square_avg", lambda group: group["alpha"]),
}

SECOND_MOMENTS = ("gradient", "dense")


@torch.no_grad()
def move_state(
    state: dict[str, object],
    grad: torch.Tensor | None,
    dropped: torch.Tensor,
    grown: torch.Tensor,
    second_moments: str = "gradient",
) -> list[str]:
    """Adapts the optimizer's state of one weight, in place, to weights that moved.

    All per-element state of moved weights becomes 0, but the second moment of grown ones, which starts at ``g**2``.
    With both moments 0 and a bias correction long past, Adam's first step of a grown weight would be several times the
    learning rate, and noise alone would make it large enough to survive the next drop. With dense second moments (see
    [`DenseSecondMoments`]) those of all moved weights stay as they are.

    Args:
        state: the optimizer's state of the weight, such as ``{"step": …, "exp_avg": …, "exp_avg_sq": …}``.
        grad: the dense gradient of this step; may be ``None`` when nothing grows.
        dropped, grown: bool, of the weight's shape.
        second_moments: "gradient" or "dense".

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
        if second_moments == "dense" and key in _SECOND_MOMENTS:
            continue
        value.masked_fill_(dropped | grown, 0)
        if grad is not None and key in _SECOND_MOMENTS:
            value.copy_(torch.where(grown, grad.square().to(value.dtype), value))
    return other_shape


class DenseSecondMoments:
    """Lets the second moments of inactive weights average their dense gradients, as if these were not masked.

    A weight that grows then has the second moment that it would have in a dense network's optimizer: Adam that masks
    gradients behind its second moment, as in the reference code of NeuroTrails. Weights and first moments outside the
    masks stay exactly 0, for the optimizer sees masked gradients.

    Between [`mask`] and [`average`] it holds a copy of the gradients. What clips them there by their norm scales the
    copy too: by as much as the norm of all active gradients has changed.

    Args:
        optimizer: one whose second moment is a moving average of squares, element by element.

    Raises:
        ValueError: it is another one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        kind, groups = type(optimizer), optimizer.param_groups
        if kind not in _MOVING_AVERAGES or any(group.get("centered") for group in groups):
            name = f"a centered {kind.__name__}" if kind in _MOVING_AVERAGES else kind.__name__
            raise ValueError(
                f"second_moments='dense': accepted with {name} is gradient; dense asks for "
                f"{', '.join(optimizer.__name__ for optimizer in _MOVING_AVERAGES)} (not centered)"
            )
        self.optimizer = optimizer
        self._masked: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._copies: list[torch.Tensor] = []
        self._norm = torch.tensor(0.0)

    @torch.no_grad()
    def mask(self, weights: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
        """Sets the gradients of inactive weights to 0, once a step, and remembers them.

        Args:
            weights: with their gradients, and where they are inactive: bool, of the shape of what this process holds.
        """
        self._masked, self._copies = weights, []
        for weight, inactive in weights:
            grad = local(weight.grad)
            self._copies.append(torch.where(inactive, grad, 0))
            grad.masked_fill_(inactive, 0)
        self._norm = self._norm_of_active()

    @torch.no_grad()
    def average(self) -> None:
        """Adds what the optimizer's step, which saw a gradient of 0, left out of inactive weights' second moments."""
        if any(weight.grad is None for weight, _ in self._masked):  # of a step that did not take place
            self.forget()
        if not self._masked:
            return
        key, decay_of = _MOVING_AVERAGES[type(self.optimizer)]
        decays = {id(weight): float(decay_of(g)) for g in self.optimizer.param_groups for weight in g["params"]}
        # A tensor, so that no step waits for a device; exactly 1 where nothing was clipped.
        scale = torch.where(self._norm > 0, self._norm_of_active() / self._norm, 1)
        for (weight, _), copy in zip(self._masked, self._copies):
            state = self.optimizer.state[weight]
            copy.mul_(scale.to(copy))
            second = local(state[key])
            second.addcmul_(copy, copy, value=1 - decays[id(weight)])
            if "max_exp_avg_sq" in state:
                highest = local(state["max_exp_avg_sq"])
                torch.maximum(highest, second, out=highest)
        self.forget()

    def forget(self) -> None:
        """Frees the copies, of a step that does not take place for example."""
        self._masked, self._copies = [], []

    def _norm_of_active(self) -> torch.Tensor:
        return nn.utils.get_total_norm([local(weight.grad) for weight, _ in self._masked])
