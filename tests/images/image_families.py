"""Tiny image classifiers of stock families, and what multi-head ones are held against: their trails' stock models."""

import dataclasses
import tempfile
from typing import Any

import torch
from families import families_of, known_fields, refuse_large
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from nt_hf import NeuroTrailsForImageClassification, SparsityConfig, draw_masks
from nt_hf.models.masks import apply_masks, check_masks
from nt_hf.models.modeling_neurotrails_images import image_class

CLASSES, HEADS = 7, 3
MASKED = {"masked_modules": ["model.layers.*", "model.heads.*"]}
SIZES: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_channels": 3, "num_labels": CLASSES, "hidden_size": 32,
    "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 48, "depths": [2, 3, 1],
    "hidden_sizes": [16, 32, 48], "width": 1, "embedding_size": 16, "num_stages": 3, "groups_width": 8,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_SWIN = {"embed_dim": 16, "num_heads": [2, 2, 4], "window_size": 2, "patch_size": 2, "hidden_size": 64}
_PYRAMID = {
    "num_encoder_blocks": 3, "num_attention_heads": [1, 2, 4], "sr_ratios": [4, 2, 1], "mlp_ratios": [2, 2, 2],
    "patch_sizes": [7, 3, 3], "strides": [4, 2, 2],
}  # fmt: skip
#: By ``model_type``, with a variant after a blank. Where a size is a list in one family and a number in others.
SETTINGS: dict[str, dict[str, Any]] = {
    "resnet basic": {"layer_type": "basic"},
    "resnet bottleneck": {"layer_type": "bottleneck"},
    "regnet": {"layer_type": "x"},
    "bit": {"hidden_sizes": [32, 64, 96], "embedding_size": 32, "num_groups": 8},
    "cvt": {
        "embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 1],
    },
    "swin": _SWIN, "swinv2": _SWIN, "donut-swin": _SWIN, "dinat": _SWIN,
    "focalnet": {"embed_dim": 16, "patch_size": 2, "focal_levels": [2, 2, 2], "focal_windows": [3, 3, 3]},
    "hiera": {
        "embed_dim": 16, "num_heads": [1, 2, 4], "image_size": [32, 32], "masked_unit_attention": [True, False, False],
        "patch_size": [7, 7], "num_query_pool": 2, "masked_unit_size": [4, 4],
    },
    "levit": {
        "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2],
        "patch_size": 16, "image_size": 64,
    },
    "poolformer": {"patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "padding": [2, 1, 1], "num_encoder_blocks": 3},
    "pvt": {**_PYRAMID, "patch_sizes": [4, 2, 2], "sequence_reduction_ratios": [4, 2, 1]},
    "pvt_v2": _PYRAMID, "segformer": _PYRAMID,
    "textnet": {"depths": [3, 4, 4, 4], "hidden_sizes": [16, 16, 32, 32, 48]},
}  # fmt: skip


def tiny_config(family: str, **fields) -> PreTrainedConfig:
    """A small configuration of a stock family; ``fields`` replace some of its."""
    kind = family.split()[0]
    return AutoConfig.for_model(kind, **known_fields(kind, {**SIZES, **SETTINGS.get(family, {}), **fields}))


def tiny_model(family: str, seed: int = 1, **fields) -> PreTrainedModel:
    """A multi-head classifier of random weights and statistics, in evaluation mode."""
    stock = tiny_config(family)
    kind = image_class(stock)
    config = kind.config_class.from_stock_config(stock, **{"num_ensemble_heads": HEADS, "blocks_in_head": 3, **fields})
    refuse_large(kind, config)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def images(count: int = 4, side: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, CLASSES, (count,), generator=generator)}


@dataclasses.dataclass
class ImageParity:
    """How far a multi-head classifier is from the stock models of its trails.

    Attributes:
        logits: largest difference of a logit, with masks of half of the weights.
        losses: largest difference of a head's loss, as a share of it.
        stock: whether a model made of a stock model has its logits in every head.
        checkpoint: whether a sparse checkpoint brings the same logits and masks back.
    """

    logits: float
    losses: float
    stock: bool
    checkpoint: bool

    @property
    def exact(self) -> bool:
        """Whether nothing differs but the last digits of losses."""
        return self.logits == 0 and self.losses < 1e-6 and self.stock and self.checkpoint


@torch.no_grad()
def parity(model: PreTrainedModel) -> ImageParity:
    """Compares each trail with its stock model; the masks of ``model`` are drawn anew.

    Raises:
        ArithmeticError: a value is not finite or all are 0, so nothing was compared.
    """
    draw_masks(model, SparsityConfig(density=0.5, distribution="uniform"))
    apply_masks(model)
    side = model.config.image_size if isinstance(getattr(model.config, "image_size", None), int) else 32
    batch = images(side=side)
    output = model(**batch, output_head_logits=True)
    worst = worst_loss = 0.0
    for head in range(model.config.num_ensemble_heads):
        stock = model.extract_trail(head)
        logits = stock(batch["pixel_values"]).logits
        alone = nn.functional.cross_entropy(logits, batch["labels"]).item()
        if type(stock) is not model.stock_class or not logits.isfinite().all() or not logits.abs().max() > 0:
            raise ArithmeticError(f"logits of a {type(stock).__name__} up to {logits.abs().max()}")
        worst = max(worst, (logits - output.head_logits[head]).abs().max().item())
        worst_loss = max(worst_loss, abs(output.head_losses[head].item() - alone) / alone)
    # ``stock`` is the last trail.
    copied = NeuroTrailsForImageClassification.from_stock(stock, num_ensemble_heads=2, blocks_in_head=2)
    heads = copied(**batch, output_head_logits=True).head_logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, sparse=True)
        again = NeuroTrailsForImageClassification.from_pretrained(folder)
    same = torch.equal(again(**batch).logits, output.logits) and not check_masks(again)
    return ImageParity(worst, worst_loss, torch.equal(heads, logits.expand_as(heads)), same)


def all_image_families() -> list[str]:
    """The ``model_type`` of every image classifier, those of Transformers and the package's own."""
    return sorted([*families_of(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES), "wide_resnet"])


def image_outcome(family: str) -> ImageParity | str:
    """What became of a family: how far its trails are from stock models, or the line that refuses it.

    Raises:
        Exception: neither: the family is wrong, or fails in a way of its own.
    """
    try:
        model = tiny_model(family, **MASKED)
    except NotImplementedError as error:
        return str(error)
    return parity(model)
