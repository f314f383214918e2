"""The parameters of a model, and how many of them are active."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

from ..models.auto import register
from ..models.masks import MASKABLE, attach_masks, masked_modules, packed_shape
from ..sparsity.config import SparsityConfig
from ..sparsity.first_masks import target_counts

PARTS = ("embedding", "backbone", "heads", "LM heads", "norms")


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The multi-head model of a configuration on the meta device, for forward passes within [`without_values`]."""
    config = copy.deepcopy(config)
    config.pad_token_id = None  # some models look for it in their input
    with torch.device("meta"):
        return register(config)(config)


@contextlib.contextmanager
def without_values(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model runs on tensors that have shapes and no values.

    Raises:
        ValueError: it cannot.
    """
    try:
        # Whether rows are packed of several texts only values can tell.
        with mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
            yield
    except (RuntimeError, NotImplementedError) as error:
        name, reason = type(model).__name__, str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be planned: accepted are models that run without values ({reason})") from error


@dataclass(frozen=True)
class WeightCount:
    """Weights, and how many of them are active."""

    total: int = 0
    active: int = 0

    def __add__(self, other: "WeightCount") -> "WeightCount":
        return WeightCount(self.total + other.total, self.active + other.active)


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model, a tied one once.

    Attributes:
        parts: by part, see ``PARTS``; the blocks' norms and the final ones are "norms".
        trails: of the model of each trail.
        densities: of the masked weight of a module, by the module's name; a tied weight under both names.
        masked: weights that carry a mask.
        mobile: of these, the weights of tensors that are not dense.
        packed: bytes of the packed masks.
        largest: weights of the largest mobile tensor.
        copied: weights whose gradients a step copies, for dense second moments.
        unit: weights of the largest of the modules that FSDP2 gathers one by one: blocks, embeddings, LM heads.
    """

    parts: dict[str, WeightCount]
    trails: list[WeightCount]
    densities: dict[str, float]
    masked: int
    mobile: int
    packed: int
    largest: int
    copied: int
    unit: int

    @property
    def all(self) -> WeightCount:
        return sum(self.parts.values(), WeightCount())


def mask(model: PreTrainedModel, sparsity: SparsityConfig) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Attaches the masks of a run to a model on no device.

    Returns:
        The masked modules by name, and the weights of each that `draw_masks` leaves active; with a ``density_start``
        those of the end.
    """
    globs = model.config.masked_modules
    if sparsity.is_sparse or globs:
        attach_masks(model, [*(globs or ["*"]), *(f"!{glob}" for glob in sparsity.exclude)])
    masked = masked_modules(model)
    return masked, target_counts(model, sparsity) if masked else {}


def densities(model: PreTrainedModel, masked: Mapping[str, nn.Module], targets: Mapping[str, int]) -> dict[str, float]:
    """The density of the masked weight of every module by its name; a tied weight counts under both names."""
    by_weight = {id(module.weight): targets[name] / module.weight.numel() for name, module in masked.items()}
    return {
        name: by_weight[id(module.weight)]
        for name, module in model.named_modules()
        if isinstance(module, MASKABLE) and id(module.weight) in by_weight
    }


def count_parameters(config: PreTrainedConfig, sparsity: SparsityConfig) -> Parameters:
    """Counts the parameters of a decoder on no device; exactly those that `mask` leaves active."""
    model = build(config)
    masked, targets = mask(model, sparsity)
    active = {id(module.weight): targets[name] for name, module in masked.items()}
    heads = [set(model.head_modules(head).values()) for head in range(config.num_ensemble_heads)]
    lm_heads = model.get_lm_heads()

    def part_of(module: nn.Module) -> str:
        if isinstance(module, nn.Embedding):
            return "embedding"
        if module in lm_heads:
            return "LM heads"
        if not isinstance(module, MASKABLE) and all(p.dim() < 2 for p in module.parameters(recurse=False)):
            return "norms"
        return "heads" if any(module in head for head in heads) else "backbone"

    def count(weight: nn.Parameter) -> WeightCount:
        return WeightCount(weight.numel(), active.get(id(weight), weight.numel()))

    parts, seen = dict.fromkeys(PARTS, WeightCount()), set()
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if weight not in seen:
                seen.add(weight)
                parts[part_of(module)] += count(weight)
    trails = []
    for head in heads:
        others = set().union(*heads) - head
        weights = {p for module in model.modules() if module not in others for p in module.parameters(recurse=False)}
        trails.append(sum(map(count, weights), WeightCount()))
    mobile = [module.weight.numel() for name, module in masked.items() if targets[name] < module.weight.numel()]
    units = (*model.blocks(), *model.get_embeddings(), *lm_heads)
    return Parameters(
        parts=parts,
        trails=trails,
        densities=densities(model, masked, targets),
        masked=sum(module.weight.numel() for module in masked.values()),
        mobile=sum(mobile),
        packed=sum(torch.Size(packed_shape(module.weight.shape)).numel() for module in masked.values()),
        largest=max(mobile, default=0),
        copied=sum(mobile) if sparsity.second_moments == "dense" else 0,
        unit=max(sum(p.numel() for p in unit.parameters()) for unit in units),
    )
