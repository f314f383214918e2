"""FLOPs of training and decoding, as executed and as the literature counts sparse networks."""

from dataclasses import dataclass

from ..config import RunConfig
from ..models.configuration_neurotrails import NeuroTrailsLlamaConfig
from .parameters import Parameters


def forward_flops_per_token(
    config: NeuroTrailsLlamaConfig, sequence_length: int, order_per_head: bool = False
) -> float:
    """Matrix FLOPs that a forward pass executes for a token, all heads together.

    With ``order_per_head`` each head has a token of its own, and the backbone runs for each.

    A multiplication and an addition are two. Masks do not lower it: zeros are multiplied like any weight. Attention
    counts every query-key pair of the sequence, as is usual (PaLM, arXiv 2204.02311, appendix B), though half of
    them are masked. The same is the cost of decoding one token that attends to ``sequence_length`` ones, itself
    included.
    """
    block = 2 * block_products(config) + attention_flops(config, sequence_length)
    lm_heads = 2 * config.num_ensemble_heads * config.hidden_size * config.vocab_size
    blocks = config.num_cache_layers + further_passes(config, order_per_head) * config.num_backbone_layers
    return block * blocks + lm_heads


def further_passes(config: NeuroTrailsLlamaConfig, order_per_head: bool) -> int:
    """Passes through the backbone beyond the first."""
    return config.num_ensemble_heads - 1 if order_per_head else 0


def training_flops_per_token(
    config: NeuroTrailsLlamaConfig, sequence_length: int, order_per_head: bool = False
) -> float:
    """Matrix FLOPs of a training step for a token: the backward pass costs two forward passes."""
    return 3 * forward_flops_per_token(config, sequence_length, order_per_head)


def block_products(config: NeuroTrailsLlamaConfig) -> int:
    """Weights of a block's products."""
    hidden, queries, keys = widths(config)
    return 2 * hidden * (queries + keys) + 3 * hidden * config.intermediate_size


def widths(config: NeuroTrailsLlamaConfig) -> tuple[int, int, int]:
    """Of the hidden states, of all queries, of all keys."""
    return (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )


def attention_flops(config: NeuroTrailsLlamaConfig, sequence_length: int) -> float:
    """A block's FLOPs of the products of queries, keys and values, for a token."""
    return 4 * widths(config)[1] * sequence_length


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
        context: tokens.
        cache_bytes: of the keys and values of one sequence of ``context`` tokens, bf16.
    """

    training: float
    sparse_training: float
    recomputed: float
    decoding: float
    sparse_decoding: float
    context: int
    cache_bytes: int


def count_flops(run: RunConfig, config: NeuroTrailsLlamaConfig, parameters: Parameters) -> Flops:
    """The FLOPs of a run's training, and of decoding at the length it was trained on."""
    length = run.data.sequence_length
    attention, further = attention_flops(config, length), further_passes(config, run.data.order_per_head)
    dense = forward_flops_per_token(config, length, run.data.order_per_head)
    decoding = 2 * parameters.products.active + config.num_cache_layers * attention
    backbone = 2 * parameters.parts["backbone"].active + config.num_backbone_layers * attention
    sparse = decoding + further * backbone
    sparsity = run.sparsity
    training = 3 * sparse
    if parameters.mobile and sparsity.update_interval:
        gradients = {"momentum", "gradient", "gradient_random"}
        interval = 1 if sparsity.needs_momentum else sparsity.update_interval
        needs_gradients = bool({sparsity.grow, sparsity.redistribute} & gradients)
        training += needs_gradients * (dense - sparse) / interval
    blocks = (2 * block_products(config) + attention) * (config.num_cache_layers + further * config.num_backbone_layers)
    return Flops(
        training=3 * dense,
        sparse_training=training,
        recomputed=blocks if run.train.gradient_checkpointing else 0,
        decoding=forward_flops_per_token(config, length),
        sparse_decoding=decoding,
        context=length,
        cache_bytes=config.num_cache_layers * 2 * widths(config)[2] * length * 2,
    )
