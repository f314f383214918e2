"""The parameters of a model, and how many of them are active."""

import re
from dataclasses import dataclass

import torch

from ..models.configuration_neurotrails import NeuroTrailsLlamaConfig
from ..models.masks import attach_masks, masked_modules, packed_shape
from ..models.modeling_neurotrails import NeuroTrailsLlamaForCausalLM
from ..models.multi_head import renumber_head
from ..sparsity.config import SparsityConfig
from ..sparsity.first_masks import target_counts

PARTS = ("embedding", "backbone", "heads", "LM heads", "norms")


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
        products: weights that a forward pass multiplies by, a tied LM head included: all but embeddings and norms.
        masked: weights that carry a mask.
        mobile: of these, the weights of tensors that are not dense.
        packed: bytes of the packed masks.
        largest: weights of the largest mobile tensor.
    """

    parts: dict[str, WeightCount]
    trails: list[WeightCount]
    products: WeightCount
    masked: int
    mobile: int
    packed: int
    largest: int

    @property
    def all(self) -> WeightCount:
        return sum(self.parts.values(), WeightCount())


def count_parameters(config: NeuroTrailsLlamaConfig, sparsity: SparsityConfig) -> Parameters:
    """Counts the parameters of a model on no device; exactly those that `draw_masks` leaves active.

    With a ``density_start`` the active ones are those of the end.
    """
    with torch.device("meta"):
        model = NeuroTrailsLlamaForCausalLM(config)
    if sparsity.is_sparse or config.masked_modules:
        attach_masks(model, [*(config.masked_modules or ["*"]), *(f"!{glob}" for glob in sparsity.exclude)])
    modules = masked_modules(model)
    targets = target_counts(model, sparsity) if modules else {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    counts = {name: WeightCount(weight.numel(), targets.get(name, weight.numel())) for name, weight in weights.items()}
    owners = {id(weight): name for name, weight in reversed(weights.items())}  # of a tied weight the first name

    parts = dict.fromkeys(PARTS, WeightCount())
    for name in owners.values():
        parts[_part(name)] += counts[name]
    trails = []
    for head in range(config.num_ensemble_heads):
        names = [name for name in weights if renumber_head(name, {head: 0}) is not None]
        trails.append(
            sum((counts[name] for name in {id(weights[n]): n for n in reversed(names)}.values()), WeightCount())
        )
    products = [name for name, weight in weights.items() if weight.dim() == 2 and _part(name) != "embedding"]
    mobile = [module.weight.numel() for name, module in modules.items() if targets[name] < module.weight.numel()]
    return Parameters(
        parts=parts,
        trails=trails,
        products=sum((counts[owners[id(weights[name])]] for name in products), WeightCount()),
        masked=sum(module.weight.numel() for module in modules.values()),
        mobile=sum(mobile),
        packed=sum(torch.Size(packed_shape(module.weight.shape)).numel() for module in modules.values()),
        largest=max(mobile, default=0),
    )


def _part(name: str) -> str:
    if "norm" in name:
        return "norms"
    if "embed_tokens" in name:
        return "embedding"
    return {"lm_heads": "LM heads", "model.heads": "heads"}.get(re.split(r"\.\d", name)[0], "backbone")
