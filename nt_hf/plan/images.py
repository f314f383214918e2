"""What training an image classifier costs, counted without images and without weights."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..models.configuration_neurotrails import MultiHeadConfig
from ..sparsity.config import SparsityConfig
from .flops import ForwardFlops, count_forward, sparse_training_flops
from .parameters import WeightCount, build, densities, mask


@dataclass(frozen=True)
class ImageCosts:
    """What an image classifier costs.

    Attributes:
        weights: its parameters, and how many of them are active.
        training: FLOPs of training on an image as executed; zeros are multiplied like any weight.
        sparse_training: the same with active weights alone, see [`Flops`].
    """

    weights: WeightCount
    training: float
    sparse_training: float


def image_flops(config: MultiHeadConfig, order_per_head: bool = False) -> ForwardFlops:
    """What a forward pass executes for an image, all heads together.

    With ``order_per_head`` each head has an image of its own, and the backbone runs for each.
    """
    return _forward(build(config), order_per_head)


def count_images(config: MultiHeadConfig, sparsity: SparsityConfig, order_per_head: bool = False) -> ImageCosts:
    """The costs of an image classifier that is trained with such masks."""
    model = build(config)
    masked, targets = mask(model, sparsity)
    active = {id(module.weight): targets[name] for name, module in masked.items()}
    weights = (WeightCount(w.numel(), active.get(id(w), w.numel())) for w in model.parameters())
    forward = _forward(model, order_per_head)
    return ImageCosts(
        weights=sum(weights, WeightCount()),
        training=3 * forward.total,
        sparse_training=sparse_training_flops(forward, densities(model, masked, targets), sparsity),
    )


def _forward(model: PreTrainedModel, order_per_head: bool) -> ForwardFlops:
    config = model.config
    sides = [config.image_size] * 2 if isinstance(config.image_size, int) else config.image_size
    passes = config.num_ensemble_heads if order_per_head else 1
    return count_forward(model.eval(), 1, passes, pixel_values=torch.zeros(1, 3, *sides, device="meta"))
