"""The model that a run begins with: new weights or a checkpoint's, heads that differ, first masks."""

import hashlib
import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..config import RunConfig, TrainConfig
from ..data.config import DataConfig
from ..models.auto import family_of, is_dropout, register
from ..models.configuration_neurotrails import MODEL_TYPE_PREFIX, MultiHeadConfig
from ..models.masks import apply_masks, masked_modules
from ..models.trails import load_complete
from ..sparsity.first_masks import draw_masks
from ..sparsity.pruning import PRUNERS
from .optimizer import learning_rate_factor
from .tasks import Task

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def initial_model(config: RunConfig, shape: MultiHeadConfig, task: Task) -> PreTrainedModel:
    """A model of the configuration ``shape``, fp32, with new weights or those of ``model.init_from``.

    Raises:
        ValueError: the checkpoint lacks weights, or is of another kind of model.
    """
    source = config.model.get("init_from")
    if source is None:
        return register(shape)(shape)
    if family_of(source).startswith(MODEL_TYPE_PREFIX):
        model = task.models.from_pretrained(source, dtype=torch.float32, **dropout_of(shape))
        logger.info("%s: all weights and %d masks are taken", source, len(masked_modules(model)))
    else:
        model = _from_stock(source, shape, is_text=isinstance(config.data, DataConfig))
        add_noise(model, config.train.head_noise, config.train.seed)
    for name in SPECIAL_TOKENS:
        for holder in (model.config, getattr(model, "generation_config", None)):
            if holder is not None and hasattr(shape, name):
                setattr(holder, name, getattr(shape, name))
    return model


def _from_stock(source: str, shape: MultiHeadConfig, is_text: bool) -> PreTrainedModel:
    """A model whose every trail is the stock checkpoint; a classifier of other classes is new."""
    kind = register(shape)
    options = dropout_of(shape)
    if not is_text:
        options |= {"id2label": shape.id2label, "label2id": shape.label2id}
    replaces = not is_text and AutoConfig.from_pretrained(source).num_labels != shape.num_labels
    stock = load_complete(kind.stock_class, source, dtype=torch.float32, ignore_mismatched_sizes=replaces, **options)
    model = kind.from_stock(
        stock,
        num_ensemble_heads=shape.num_ensemble_heads,
        blocks_in_head=shape.blocks_in_head,
        ensemble_mode=shape.ensemble_mode,
        share_embedding=shape.share_embedding,
    )
    new = f"new is a classifier of {shape.num_labels} classes" if replaces else "nothing is new"
    logger.info(
        "%s: the weights of a %s are taken for %s, each head is a copy; %s",
        source, kind.stock_class.__name__, shape.topology, new,
    )  # fmt: skip
    return model


def dropout_of(shape: MultiHeadConfig) -> dict[str, Any]:
    """The fields of dropout, which a run may set over those of its checkpoint."""
    return {name: value for name, value in vars(shape).items() if is_dropout(shape, name)}


@torch.no_grad()
def add_noise(model: PreTrainedModel, share: float, seed: int) -> None:
    """Adds noise to the matrices of every head but the first, so that heads that are copies become different.

    Args:
        model: with equal heads.
        share: standard deviation of the noise, as a share of each matrix's own.
        seed: of the noise, which is the same on every device and process.
    """
    if not share:
        return
    first = {id(weight) for module in model.head_modules(0).values() for weight in module.parameters(recurse=False)}
    for head in range(1, model.config.num_ensemble_heads):
        for path, module in model.head_modules(head).items():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dim() > 1 and id(weight) not in first:  # LM heads tied to the embedding are one weight
                    digest = hashlib.sha256(f"{seed}/{head}/{path}.{name}".encode()).digest()
                    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.add_(noise.to(weight) * (share * weight.std()))
    apply_masks(model)


def first_masks(model: PreTrainedModel, config: RunConfig, task: Task) -> None:
    """Gives the model of a new run its masks; those of the checkpoint that it starts from stay.

    Raises:
        ValueError: the heads are equal and would stay so, see [`require_different_heads`], or see [`draw_masks`].
    """
    sparsity = config.sparsity
    if masked_modules(model) and sparsity.initial_masks == "random" and "init_from" in config.model:
        logger.info("the masks of %s stay as they are", config.model["init_from"])
    else:
        rows = sparsity.calibration_rows
        batches = task.calibration_batches(rows, model.device) if sparsity.needs_calibration else None
        draw_masks(model, sparsity, loss=lambda: task.saliency_loss(model), batches=batches)
    if "init_from" in config.model:
        moves = sparsity.is_sparse and sparsity.update_interval > 0  # the noise of updates differs from head to head
        if moves and sparsity.initial_masks in PRUNERS:
            logger.warning(
                "sparsity.update_interval=%d: masks by %s were chosen for weights that are trained, and every update "
                "drops a share of these; accepted is this, and 0, which keeps the masks (docs/upcycle.md)",
                sparsity.update_interval, sparsity.initial_masks,
            )  # fmt: skip
        if not (moves or config.data.order_per_head or have_own_rates(model, config.train)):
            accepted = "a number above 0, data.order_per_head=true, random masks, or learning rates that differ"
            require_different_heads(model, f"train.head_noise={config.train.head_noise:g}", accepted)


def have_own_rates(model: PreTrainedModel, train: TrainConfig) -> bool:
    """Whether ``train.learning_rate_factors`` gives the first two heads different rates."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    first, second = (
        [
            learning_rate_factor(names[id(parameter)], train)
            for module in model.head_modules(head).values()
            for parameter in module.parameters(recurse=False)
        ]
        for head in (0, min(1, model.config.num_ensemble_heads - 1))
    )
    return first != second


def require_different_heads(model: PreTrainedModel, setting: str, accepted: str) -> None:
    """Raises if two heads are equal and get equal gradients in training: they would stay equal.

    Args:
        model: before training on batches that all heads share.
        setting: ``key=value`` of what could have made the heads differ.
        accepted: its accepted values, and other ways, in words.

    Raises:
        ValueError: they are; the message says what is accepted.
    """
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    drops = drops or any(value for name, value in vars(model.config).items() if "dropout" in name)
    if drops or model.config.num_ensemble_heads == 1:
        return
    first, second = (model.head_modules(head) for head in (0, 1))
    pairs = (
        (w, second[path].get_parameter(n)) for path in first for n, w in first[path].named_parameters(recurse=False)
    )
    if all(torch.equal(weight, other) for weight, other in pairs):
        raise ValueError(f"{setting}: the heads are equal and would stay so; accepted is {accepted}")
