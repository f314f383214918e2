"""Saliency: scores by which the first masks are chosen from a batch, before training."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[], torch.Tensor]


def snip(weights: Mapping[str, nn.Parameter], loss: Loss) -> dict[str, torch.Tensor]:
    """How much the loss feels each weight, ``|w * g|`` (SNIP, Lee et al. 2019)."""
    grads = _gradients(loss(), weights)
    return {name: (weight.detach() * grads[name]).abs() for name, weight in weights.items()}


def grasp(weights: Mapping[str, nn.Parameter], loss: Loss) -> dict[str, torch.Tensor]:
    """How much each weight helps the flow of gradients, ``w * (H g)`` (GraSP, Wang et al. 2020).

    A weight whose removal would weaken the gradient scores high: the paper removes the largest ``-w * (H g)``. Its
    temperature of the logits is the loss's business. The loss must have second derivatives; those of PyTorch's
    ``linear_cross_entropy`` are wrong without a word (a multi-head model does without it here).
    """
    with sdpa_kernel(SDPBackend.MATH):  # of attention only the plain one has second derivatives
        grads = _gradients(loss(), weights, create_graph=True)
        norm = sum((grad * grad.detach()).sum() for grad in grads.values())
        products = _gradients(norm, weights)
    return {name: weight.detach() * products[name] for name, weight in weights.items()}


Saliency = Callable[[Mapping[str, nn.Parameter], Loss], dict[str, torch.Tensor]]
SALIENCY: dict[str, Saliency] = {"snip": snip, "grasp": grasp}


def _gradients(
    value: torch.Tensor, weights: Mapping[str, nn.Parameter], create_graph: bool = False
) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(
        value, list(weights.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    for name, grad in zip(weights, grads):
        if not grad.isfinite().all():
            raise ValueError(f"the saliency of {name}: not finite on this batch; accepted is a batch of finite loss")
    return dict(zip(weights, grads))
