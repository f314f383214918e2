"""The memory of a training step: what a process holds at the moments when it can hold most.

`step_memory` lists these moments, `peak_snapshot` picks the fullest. The tests compare both with measurements.
"""

from dataclasses import dataclass

from ..models.configuration_neurotrails import NeuroTrailsLlamaConfig
from ..models.losses import LOSS_CHUNK, LOSS_CHUNK_DEVICE
from .flops import block_products, widths
from .parameters import Parameters

# Optimizer steps take place in fp32, whatever the products' precision.
FP32 = 4
ADAM = 2 * FP32


@dataclass(frozen=True)
class MemorySnapshot:
    """What lies in a process's memory at one moment of a step, in bytes by item."""

    name: str
    items: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.items.values())


@dataclass(frozen=True)
class StepSettings:
    """How a step runs.

    Attributes:
        rows, length: sequences and tokens of one forward pass of one process.
        bf16: autocast over fp32 weights.
        checkpointing: recompute blocks in the backward pass.
        passes: forward passes of one optimizer step.
        strategy: "one process", "DDP" or "FSDP2".
        ranks: processes.
        device: "cuda", or "cpu", where chunks are smaller and some operations copy.
        head_by_head: heads run backward before the next one runs forward; ``None``: as the model decides.
        order_per_head: each head has rows of its own, which the backbone runs for.
    """

    rows: int
    length: int
    bf16: bool = True
    checkpointing: bool = False
    passes: int = 1
    strategy: str = "one process"
    ranks: int = 1
    device: str = "cuda"
    head_by_head: bool | None = None
    order_per_head: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def block_activations(config: NeuroTrailsLlamaConfig, bf16: bool) -> int:
    """Bytes for each token that autograd keeps of one Llama block with fused attention, its input included.

    Counted on ``LlamaDecoderLayer`` (Transformers 5) by ``torch.autograd.graph.saved_tensors_hooks``; ``e`` is 2 with
    autocast, else 4:

    - each of two norms: its input and the normalised input in fp32, and one number;
    - the inputs of the products: in fp32 the norm's output once; under autocast a bf16 copy for each of q, k, v, gate
      and up, because autocast caches copies of weights alone;
    - attention: q, k, v after the rotary embedding and the output, ``e`` each, and the fp32 log-sum-exp of each head;
    - MLP: gate, its activation, up, and their product, ``e`` each.

    The residual stream is fp32. On a GPU the flash and memory-efficient kernels of fused attention keep the same
    tensors (the log-sum-exp padded to whole tiles by the latter); without a fused kernel the scores
    ``[heads, length]`` would come on top.
    """
    hidden, queries, keys = widths(config)
    element = 2 if bf16 else FP32
    norms = 2 * (2 * FP32 * hidden + FP32)
    inputs = 5 * 2 * hidden if bf16 else 2 * FP32 * hidden
    attention = 2 * element * (queries + keys) + FP32 * config.num_attention_heads
    return norms + inputs + attention + 4 * element * config.intermediate_size


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what comes and goes during a step."""

    states: float  # hidden states [tokens, hidden_size] in fp32
    block: float  # activations of one block
    kept: float  # of these, what stays until its backward pass: where blocks are recomputed, the input alone
    trunk: float  # activations of the backbone, including the heads' inputs
    head: float  # activations of one head, without its input
    loss: float  # of the loss of one head, beside its input
    backward: float  # what the backward pass of a block holds beside its activations
    recomputed: float  # activations that checkpointing brings back for the block in work
    copies: float  # bf16 copies of weights, or gathered weights, while the heads run forward
    head_copies: float  # what the backward pass of the heads still needs of them
    trunk_copies: float  # what the backward pass of the backbone needs of them, and below of its last block
    last_copies: float
    unreduced: float  # gradients of a block before FSDP2 reduces them, and the fp32 buffer they are reduced from
    lm_grads: float  # gradients of one LM head
    own_grads: float  # gradients of all that one head has


def _sizes(config: NeuroTrailsLlamaConfig, settings: StepSettings) -> _Sizes:
    t, hidden, vocab = settings.tokens, config.hidden_size, config.vocab_size
    heads, depth, trunk_depth = config.num_ensemble_heads, config.blocks_in_head, config.num_backbone_layers
    sharded, recompute = settings.strategy == "FSDP2", settings.checkpointing
    element = 2 if settings.bf16 else FP32
    states = FP32 * hidden * t
    block = block_activations(config, settings.bf16) * t
    kept = states if recompute else block
    # The backbone runs once, or once for each head where each has tokens of its own; then each has an input, too.
    orders = heads if settings.order_per_head else 1
    inputs = heads if settings.order_per_head or not config.share_embedding else 1
    # The final norm keeps its input and the normalised input. A head's own input is counted in the trunk.
    final_norm = 2 * states + FP32 * t

    # Autocast makes a bf16 copy of each weight and keeps it until the forward pass ends; the products then hold those
    # that their backward pass needs, unless the block is recomputed. FSDP2 has two blocks gathered at a time instead.
    weights = block_products(config)
    copy, gathered = (2 if settings.bf16 else 0) * weights, 2 * element * weights
    kept_blocks = 1 if recompute else config.num_cache_layers
    lm_grads = FP32 * vocab * hidden
    return _Sizes(
        states=states,
        block=block,
        kept=kept,
        trunk=trunk_depth * kept * orders + states * inputs,
        head=depth * kept + final_norm - states,
        # Gathered, the LM head's weight lies beside its fp32 shard while its loss is computed.
        loss=_loss_memory(config, settings) + (element * vocab * hidden if sharded and not settings.bf16 else 0),
        # Two gradients of the MLP's width beyond what its backward pass frees, and the residual stream's.
        backward=2 * element * config.intermediate_size * t + states,
        recomputed=block - states if recompute else 0,
        copies=gathered if sharded else copy * config.num_cache_layers,
        head_copies=gathered if sharded else copy * kept_blocks,
        trunk_copies=gathered if sharded else copy * (1 if recompute else trunk_depth),
        last_copies=copy or (gathered if sharded else 0),
        unreduced=(element + FP32) * weights if sharded else 0,
        lm_grads=lm_grads,
        own_grads=depth * FP32 * (weights + 2 * hidden) + FP32 * hidden + lm_grads,
    )


def step_memory(config: NeuroTrailsLlamaConfig, parameters: Parameters, settings: StepSettings) -> list[MemorySnapshot]:
    """What a training step holds at the moments where it can hold most: forward, backward, topology update.

    Follows the code: `HeadByHead` and `LinearCrossEntropy` leave their gradients until the backward pass of the whole;
    autocast keeps its bf16 copies of weights until the forward pass ends; DDP has buckets as large as the gradients
    (``gradient_as_bucket_view`` is off). Of FSDP2 it is assumed that weights, gradients, moments and masks are split
    evenly, each block, embedding and LM head is gathered by itself (two blocks at a time, one ahead), and heads do not
    run head by head, so the activations of all are there.

    Not counted: the batch, rotary tables, and what libraries take for themselves (cuBLAS and NCCL workspaces, the
    CUDA context, fragmentation); `RESERVE` is for those.
    """
    sharded, s = settings.strategy == "FSDP2", _sizes(config, settings)
    by_head = settings.head_by_head
    if by_head is None:
        by_head = not (sharded or settings.checkpointing)
    ranks, count = settings.ranks if sharded else 1, parameters.all.total
    fixed = {
        "weights, fp32": FP32 * count / ranks,
        "Adam's moments, fp32": ADAM * count / ranks,
        "masks, topology state": (3 * parameters.packed + parameters.mobile) / ranks,
        "DDP's buckets": FP32 * count * (settings.strategy == "DDP"),
    }
    labels = (
        "gradients, fp32",
        "gathered weights" if sharded else "bf16 copies of weights",
        "activations",
        "loss: logits and gradients",
        "backward of a block",
        "topology update",
    )
    heads, all_grads = config.num_ensemble_heads, FP32 * count / ranks
    earlier = all_grads if settings.passes > 1 else 0  # gradients of the passes before this one
    head_grads = earlier or heads * s.own_grads / ranks
    moments = _moments_of_heads(config, s, by_head, earlier, head_grads)
    if config.num_backbone_layers:
        # The heads' gradients are there, and those of their inputs; their activations are gone.
        work = s.backward + s.unreduced
        start = (head_grads, s.trunk_copies, s.trunk + s.recomputed, 0, heads * s.states + work)
        moments["backward of the backbone begins"] = start
        moments["backward of the backbone ends"] = (all_grads, s.last_copies, s.kept + s.recomputed, 0, work)
    # A dense gradient of the embedding is added to one that is there already: of an earlier pass, or a tied LM head's.
    separate = settings.passes > 1 or sharded or config.tie_word_embeddings
    moments["backward of the embedding"] = (all_grads, 0, 0, 0, s.states + s.lm_grads * separate)
    if parameters.mobile:
        moments["topology update"] = (all_grads, 0, 0, 0, 0, _update_memory(parameters, settings) / ranks)
    nothing = dict.fromkeys(labels, 0)
    return [MemorySnapshot(name, fixed | nothing | dict(zip(labels, sizes))) for name, sizes in moments.items()]


def _moments_of_heads(
    config: NeuroTrailsLlamaConfig, s: _Sizes, by_head: bool, earlier: float, head_grads: float
) -> dict[str, tuple[float, ...]]:
    """The moments of the heads' passes, each: gradients, copies of weights, activations, loss, work of a block."""
    heads, depth = config.num_ensemble_heads, config.blocks_in_head
    if by_head:
        # One head runs backward before the next one runs forward, so only its activations are there. The gradients of
        # the heads before, and those of their inputs, wait for the backward pass of the backbone.
        pending = earlier + (heads - 1) * (s.own_grads + s.states)
        last_block = min(depth, 1) * s.block
        return {
            "loss of the last head": (pending, s.copies, s.trunk + s.head, s.states + s.loss),
            "backward of the last head begins": (
                pending + s.lm_grads,
                s.copies,
                s.trunk + s.head,
                0,
                s.states + s.backward,
            ),
            "backward of the last head ends": (
                pending + s.own_grads,
                s.copies,
                s.trunk + last_block,
                0,
                s.backward * bool(depth),
            ),
        }
    # All heads run forward before any runs backward, so all their activations are there. The losses have computed the
    # gradients of LM heads and of their inputs already, because logits are not kept.
    pending = earlier + (heads - 1) * (s.lm_grads + s.states)
    activations, work = s.trunk + heads * s.head, heads * s.states + s.backward + s.unreduced
    moments = {
        "loss of the last head": (pending, s.copies, activations, heads * s.states + s.loss),
        "backward of the heads begins": (
            earlier + heads * s.lm_grads,
            s.head_copies,
            activations + s.recomputed,
            0,
            heads * s.states + work,
        ),
    }
    if depth:
        # Unless they were there already, the gradients of the heads have taken the activations' place.
        copies = s.trunk_copies + s.head_copies
        moments["backward of the heads ends"] = (head_grads, copies, s.trunk + s.kept + s.recomputed, 0, work)
    return moments


def peak_snapshot(config: NeuroTrailsLlamaConfig, parameters: Parameters, settings: StepSettings) -> MemorySnapshot:
    """The moment of `step_memory` that needs most memory."""
    return max(step_memory(config, parameters, settings), key=lambda snapshot: snapshot.total)


def _loss_memory(config: NeuroTrailsLlamaConfig, settings: StepSettings) -> float:
    """Bytes that `LinearCrossEntropy` holds of one head at most, beside its input in fp32.

    A chunk's logits, their log-probabilities, and those of the chunk before with their gradients; the gradients of the
    hidden states so far and of the LM head; under autocast bf16 copies of the input and the LM head.
    """
    t, hidden, vocab = settings.tokens, config.hidden_size, config.vocab_size
    chunk = min(t, LOSS_CHUNK.get(settings.device, LOSS_CHUNK_DEVICE))
    logits, weight = chunk * vocab, vocab * hidden
    widened = 4 if settings.device == "cpu" else 0  # a CPU's log_softmax copies bf16 logits to fp32, a GPU's does not
    if settings.bf16:
        fixed = 2 * weight + 2 * t * hidden + 2 * t * hidden
        if chunk == t:
            return fixed + max((6 + widened) * logits, 6 * logits + 6 * weight)
        return fixed + 4 * weight + max((12 + widened) * logits, 6 * logits + 2 * weight)
    fixed = 4 * t * hidden
    return fixed + (max(8 * logits, 4 * logits + 4 * weight) if chunk == t else 12 * logits + 4 * weight)


def _update_memory(parameters: Parameters, settings: StepSettings) -> float:
    """Bytes that a topology update takes for a while, one process holding all weights.

    Old and new masks of all tensors as bools; of one tensor its sort keys and what is chosen, or the squared gradients
    that its optimizer state takes over.
    """
    n = parameters.largest
    chunk = min(n, 2**17 if settings.device == "cpu" else 2**25)
    histograms = 4 * 2**20  # and the samples that bracket a score
    return 2 * parameters.mobile + max(7 * n + 8 * chunk, 13 * n) + histograms
