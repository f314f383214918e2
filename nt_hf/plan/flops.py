"""FLOPs of training and decoding, as executed and as the literature counts sparse networks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import RunConfig
from ..models.transformers_versions import CACHE
from ..sparsity.config import SparsityConfig
from .parameters import Parameters, build, without_values


@dataclass(frozen=True)
class ForwardFlops:
    """Matrix FLOPs of a forward pass for a token or an image; a multiplication and an addition are two.

    Attributes:
        total, blocks, backbone: of the model, of all its blocks, and of the backbone's.
        modules: of each module, by name.
    """

    total: float
    blocks: float
    backbone: float
    modules: Mapping[str, float]

    def sparse(self, densities: Mapping[str, float]) -> float:
        """The total without the products by zeros, of modules whose weights have these densities."""
        return self.total - sum(self.modules[name] * (1 - density) for name, density in densities.items())


def _build(config: PreTrainedConfig, length: int) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model on no device, and a row of tokens for it."""
    model = build(config).eval()
    model.set_attn_implementation("eager")  # whose products the counter sees one by one
    return model, torch.zeros(1, length, dtype=torch.long, device="meta")


def count_forward(model: PreTrainedModel, units: int, passes: int = 1, **inputs) -> ForwardFlops:
    """What PyTorch counts in a forward pass over so many units (tokens, images), its backbone run ``passes`` times."""
    with torch.no_grad(), without_values(model), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts, blocks = counter.get_flop_counts(), model.blocks()
    backbone = blocks[: model.config.num_backbone_layers]
    repeated = {module for block in backbone for module in block.modules()}
    flops = {
        module: sum(counts.get(f"{type(model).__name__}.{name}", {}).values())
        * (passes if module in repeated else 1) / units
        for name, module in model.named_modules()
    }  # fmt: skip
    of_backbone = sum(flops[block] for block in backbone)
    return ForwardFlops(
        total=counter.get_total_flops() / units + of_backbone / passes * (passes - 1),
        blocks=sum(flops[block] for block in blocks),
        backbone=of_backbone,
        modules={name: flops[module] for name, module in model.named_modules()},
    )


def forward_flops(config: PreTrainedConfig, length: int, order_per_head: bool = False) -> ForwardFlops:
    """What a forward pass over sequences of ``length`` tokens executes, all heads together.

    Masks do not lower it: zeros are multiplied like any weight. Attention counts every query-key pair of the sequence,
    as is usual (PaLM, arXiv 2204.02311, appendix B), though half of them are masked. With ``order_per_head`` each head
    has a token of its own, and the backbone runs for each.
    """
    model, ids = _build(config, length)
    passes = config.num_ensemble_heads if order_per_head else 1
    return count_forward(model, length, passes, input_ids=ids, use_cache=False)


def decoding_flops(config: PreTrainedConfig, length: int) -> tuple[ForwardFlops, int]:
    """What decoding a token executes that attends to ``length`` ones, itself included; numbers in the cache then."""
    model, ids = _build(config, length)
    with torch.no_grad(), without_values(model):
        cache = model(input_ids=ids[:, 1:], use_cache=True)[CACHE]
    flops = count_forward(model, 1, input_ids=ids[:, :1], use_cache=True, **{CACHE: cache})
    return flops, sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def training_flops_per_token(config: PreTrainedConfig, length: int, order_per_head: bool = False) -> float:
    """Matrix FLOPs of a training step for a token: the backward pass costs two forward passes."""
    return 3 * forward_flops(config, length, order_per_head).total


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, as executed and as literature counts sparse networks; a multiplication and an addition are two.

    Attributes:
        training, decoding: executed; zeros are multiplied like any weight. Decoding is of one token that attends to
            ``context`` ones.
        sparse_training, sparse_decoding: active weights alone are counted, as hardware that skips zeros would need;
            steps of a topology update that looks at gradients count the dense weight gradient (RigL, Evci et al. 2020,
            appendix H). Attention is never sparse.
        recomputed: executed beside ``training`` for gradient checkpointing.
        backbone: its share of ``training``.
        context: tokens.
        cache_bytes: of the keys and values of one sequence of ``context`` tokens, bf16.
    """

    training: float
    sparse_training: float
    recomputed: float
    backbone: float
    decoding: float
    sparse_decoding: float
    context: int
    cache_bytes: int


def sparse_training_flops(forward: ForwardFlops, densities: Mapping[str, float], sparsity: SparsityConfig) -> float:
    """FLOPs of training on a token or an image if products by zeros cost nothing, see [`Flops`]."""
    sparse = forward.sparse(densities)
    looks_at_gradients = {sparsity.grow, sparsity.redistribute} & {"momentum", "gradient", "gradient_random"}
    if not (looks_at_gradients and sparsity.update_interval and min(densities.values(), default=1.0) < 1):
        return 3 * sparse
    interval = 1 if sparsity.needs_momentum else sparsity.update_interval
    return 3 * sparse + (forward.total - sparse) / interval


def count_flops(run: RunConfig, config: PreTrainedConfig, parameters: Parameters) -> Flops:
    """The FLOPs of a run's training, and of decoding at the length it was trained on."""
    length, densities = run.data.sequence_length, parameters.densities
    forward = forward_flops(config, length, run.data.order_per_head)
    decoding, cached = decoding_flops(config, length)
    return Flops(
        training=3 * forward.total,
        sparse_training=sparse_training_flops(forward, densities, run.sparsity),
        recomputed=forward.blocks if run.train.gradient_checkpointing else 0,
        backbone=forward.backbone / forward.total,
        decoding=decoding.total,
        sparse_decoding=decoding.sparse(densities),
        context=length,
        cache_bytes=2 * cached,
    )
