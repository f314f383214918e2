"""A model that drafts for an ensemble: the stock model of one trail, its linear layers in eight bits."""

import torch
from torch import nn
from torch.nn import functional as F

from .sparse_weights import is_sparse


class Int8Linear(nn.Module):
    """A linear layer for bf16 inputs, whose weights are integers from -127 to 127 times a scale of each output.

    Args:
        linear: the layer that is rounded; a bias stays as it is.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        # PyTorch's kernel reads beyond rows that are no multiple of its vectors, without a word.
        self.padding = -linear.in_features % 32
        self.register_buffer("weight", F.pad((weight / scale[:, None]).round().to(torch.int8), (0, self.padding)))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs ``[…, out]`` of ``x`` ``[…, in]``, by PyTorch's kernel for weights in eight bits."""
        rows = x.reshape(-1, x.shape[-1])
        rows = F.pad(rows, (0, self.padding)) if self.padding else rows
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def draft_model(model: nn.Module, head: int = 0) -> nn.Module:
    """A model for ``generate(trail_draft=…)``: the trail of ``head``, which reads a quarter of its weights' fp32 bytes.

    Rounding its weights changes which tokens it proposes, not what the ensemble makes of them.

    Args:
        model: a multi-head causal LM on a CPU.
        head: whose trail drafts.

    Returns:
        A stock model in bf16, whose ``nn.Linear`` layers are ``Int8Linear``; other matrices stay in bf16.

    Raises:
        ValueError: there is no such head, or the model is not on a CPU, or has no dense weights.
    """
    if is_sparse(model):
        raise ValueError("draft_model: the weights are sparse (load_sparse): accepted are dense ones, restore(model)")
    if model.device.type != "cpu":
        raise ValueError(f"draft_model: a model on {model.device}: accepted is a CPU; trail_draft=<head> needs no copy")
    draft = model.extract_trail(head).to(torch.bfloat16).eval().requires_grad_(False)
    for name, layer in list(draft.named_modules()):
        if type(layer) is nn.Linear:
            draft.set_submodule(name, Int8Linear(layer))
    return draft
