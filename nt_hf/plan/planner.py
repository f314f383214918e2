"""What a run costs before it starts: parameters, FLOPs, memory, time, checkpoints and communication.

    python -m nt_hf.plan --config recipes/configs/350m.yaml --gpus 8 --gpu h100
    python -m nt_hf.plan --config recipes/configs/1b.yaml --gpus 64 --gpu h100 --train.micro_batch_size 8

``--config`` and the overrides ``--section.key value`` are the recipe's. The functions are pure; nothing is measured and
no GPU is needed.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..config import RunConfig, load_run_config, parse_overrides
from ..models.configuration_neurotrails_llama import NeuroTrailsLlamaConfig
from ..models.losses import LOSS_CHUNK, LOSS_CHUNK_DEVICE
from ..models.masks import attach_masks, masked_modules, packed_shape
from ..models.modeling_neurotrails_llama import NeuroTrailsLlamaForCausalLM
from ..sparsity.sparsifier import SparsityConfig, target_counts

GIB = 2**30
# What is kept free of a GPU's memory: the CUDA context, NCCL's buffers, the allocator's fragmentation. An assumption.
RESERVE = 0.1
# Optimizer steps take place in fp32, whatever the products' precision.
FP32 = 4
ADAM = 2 * FP32


# -------------------------------------------------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class GPU:
    """An accelerator, by its vendor's data sheet.

    Attributes:
        name: by which ``--gpu`` knows it.
        device: what its name contains as PyTorch tells it.
        tflops: dense bf16 matrix peak, without 2:4 sparsity.
        memory_gib: as on the sheet, whose "GB" of GPU memory are in practice GiB less some for error correction.
        memory_gb_s: memory bandwidth.
        node_gb_s: to the other GPUs of the node, each direction (sheets add both up).
        network_gb_s: of the node's network, each GPU's share.
    """

    name: str
    device: str
    tflops: float
    memory_gib: float
    memory_gb_s: float
    node_gb_s: float
    network_gb_s: float


# A network is no part of a card: for cards that no DGX system holds it is an assumption, 100 Gbit/s for 8 GPUs.
_ETHERNET = 100 / 8 / 8
# NVIDIA's data sheets of the cards; networks by those of DGX A100 (8 x 200 Gbit/s), H100, H200 and B200 (8 x 400).
# Of names that contain one another the longer comes first.
GPUS = (
    GPU("b200", "B200", 2250.0, 180, 8000, 900, 50),  # a DGX B200's eighth; NVLink 5
    GPU("h200", "H200", 989.0, 141, 4800, 450, 50),  # NVLink 4
    GPU("h100-pcie", "H100 PCIe", 756.0, 80, 2000, 64, _ETHERNET),  # PCIe 5 x16
    GPU("h100-nvl", "H100 NVL", 835.0, 94, 3900, 64, _ETHERNET),  # NVLink joins only two; PCIe 5 x16
    GPU("h100", "H100", 989.0, 80, 3350, 450, 50),  # SXM, NVLink 4
    GPU("a100-80gb", "A100", 312.0, 80, 2039, 300, 25),  # SXM, NVLink 3
    GPU("a100-40gb", "A100", 312.0, 40, 1555, 300, 25),
    GPU("l40s", "L40S", 362.0, 48, 864, 32, _ETHERNET),  # PCIe 4 x16
    GPU("a10g", "A10G", 70.0, 24, 600, 32, _ETHERNET),
    GPU("rtx-4090", "RTX 4090", 165.0, 24, 1008, 32, _ETHERNET),
)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 matrix peak of a known accelerator in TFLOP/s, by the name that PyTorch tells; else ``None``."""
    return next((gpu.tflops for gpu in GPUS if gpu.device in device_name), None)


def find_gpu(name: str) -> GPU:
    """The GPU of that name, whatever its case and punctuation.

    Raises:
        ValueError: there is none; the message lists them.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    for gpu in GPUS:
        if plain(gpu.name) == plain(name):
            return gpu
    raise ValueError(f"--gpu {name}: accepted are {', '.join(gpu.name for gpu in GPUS)}")


# -------------------------------------------------------------------------------------------------- parameters

PARTS = ("embedding", "backbone", "heads", "LM heads", "norms")


@dataclass(frozen=True)
class Count:
    """Weights, and how many of them are active."""

    total: int = 0
    active: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.total + other.total, self.active + other.active)


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

    parts: dict[str, Count]
    trails: list[Count]
    products: Count
    masked: int
    mobile: int
    packed: int
    largest: int

    @property
    def all(self) -> Count:
        return sum(self.parts.values(), Count())


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
    counts = {name: Count(weight.numel(), targets.get(name, weight.numel())) for name, weight in weights.items()}
    owners = {id(weight): name for name, weight in reversed(weights.items())}  # of a tied weight the first name

    parts = dict.fromkeys(PARTS, Count())
    for name in owners.values():
        parts[_part(name)] += counts[name]
    trails = []
    for head in range(config.num_ensemble_heads):
        names = [name for name in weights if _head(name) in (None, head)]
        trails.append(sum((counts[name] for name in {id(weights[n]): n for n in reversed(names)}.values()), Count()))
    products = [name for name, weight in weights.items() if weight.dim() == 2 and _part(name) != "embedding"]
    mobile = [module.weight.numel() for name, module in modules.items() if targets[name] < module.weight.numel()]
    return Parameters(
        parts=parts,
        trails=trails,
        products=sum((counts[owners[id(weights[name])]] for name in products), Count()),
        masked=sum(module.weight.numel() for module in modules.values()),
        mobile=sum(mobile),
        packed=sum(torch.Size(packed_shape(module.weight.shape)).numel() for module in modules.values()),
        largest=max(mobile, default=0),
    )


def _head(name: str) -> int | None:
    found = re.match(r"(?:model\.heads|lm_heads)\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _part(name: str) -> str:
    if "norm" in name:
        return "norms"
    if "embed_tokens" in name:
        return "embedding"
    return {"lm_heads": "LM heads", "model.heads": "heads"}.get(re.split(r"\.\d", name)[0], "backbone")


# ------------------------------------------------------------------------------------------------------- FLOPs


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
    block = 2 * _block_products(config) + _attention(config, sequence_length)
    lm_heads = 2 * config.num_ensemble_heads * config.hidden_size * config.vocab_size
    blocks = config.num_cache_layers + _further_passes(config, order_per_head) * config.num_backbone_layers
    return block * blocks + lm_heads


def _further_passes(config: NeuroTrailsLlamaConfig, order_per_head: bool) -> int:
    """Passes through the backbone beyond the first."""
    return config.num_ensemble_heads - 1 if order_per_head else 0


def training_flops_per_token(
    config: NeuroTrailsLlamaConfig, sequence_length: int, order_per_head: bool = False
) -> float:
    """Matrix FLOPs of a training step for a token: the backward pass costs two forward passes."""
    return 3 * forward_flops_per_token(config, sequence_length, order_per_head)


def _block_products(config: NeuroTrailsLlamaConfig) -> int:
    """Weights of a block's products."""
    hidden, queries, keys = _widths(config)
    return 2 * hidden * (queries + keys) + 3 * hidden * config.intermediate_size


def _widths(config: NeuroTrailsLlamaConfig) -> tuple[int, int, int]:
    """Of the hidden states, of all queries, of all keys."""
    return (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )


def _attention(config: NeuroTrailsLlamaConfig, sequence_length: int) -> float:
    """A block's FLOPs of the products of queries, keys and values, for a token."""
    return 4 * _widths(config)[1] * sequence_length


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
    attention, further = _attention(config, length), _further_passes(config, run.data.order_per_head)
    dense = forward_flops_per_token(config, length, run.data.order_per_head)
    decoding = 2 * parameters.products.active + config.num_cache_layers * attention
    backbone = 2 * parameters.parts["backbone"].active + config.num_backbone_layers * attention
    sparse = decoding + further * backbone
    sparsity = run.sparsity
    training = 3 * sparse
    if parameters.mobile and sparsity.update_interval:
        gradients = {"momentum", "gradient", "gradient_random"}
        every = 1 if sparsity.needs_momentum else sparsity.update_interval
        looks = bool({sparsity.grow, sparsity.redistribute} & gradients)
        training += looks * (dense - sparse) / every
    blocks = (2 * _block_products(config) + attention) * (
        config.num_cache_layers + further * config.num_backbone_layers
    )
    return Flops(
        training=3 * dense,
        sparse_training=training,
        recomputed=blocks if run.train.gradient_checkpointing else 0,
        decoding=forward_flops_per_token(config, length),
        sparse_decoding=decoding,
        context=length,
        cache_bytes=config.num_cache_layers * 2 * _widths(config)[2] * length * 2,
    )


# ------------------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True)
class Moment:
    """What lies in a process's memory at one moment of a step, in bytes by item."""

    name: str
    items: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.items.values())


@dataclass(frozen=True)
class Setting:
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
    hidden, queries, keys = _widths(config)
    element = 2 if bf16 else FP32
    norms = 2 * (2 * FP32 * hidden + FP32)
    inputs = 5 * 2 * hidden if bf16 else 2 * FP32 * hidden
    attention = 2 * element * (queries + keys) + FP32 * config.num_attention_heads
    return norms + inputs + attention + 4 * element * config.intermediate_size


def step_memory(config: NeuroTrailsLlamaConfig, parameters: Parameters, setting: Setting) -> list[Moment]:
    """What a training step holds at the moments where it can hold most: forward, backward, topology update.

    Follows the code: `HeadByHead` and `LinearCrossEntropy` leave their gradients until the backward pass of the whole;
    autocast keeps its bf16 copies of weights until the forward pass ends; DDP has buckets as large as the gradients
    (``gradient_as_bucket_view`` is off). Of FSDP2 it is assumed that weights, gradients, moments and masks are split
    evenly, each block, embedding and LM head is gathered by itself (two blocks at a time, one ahead), and heads do not
    run head by head, so the activations of all are there.

    Not counted: the batch, rotary tables, and what libraries take for themselves (cuBLAS and NCCL workspaces, the
    CUDA context, fragmentation); `RESERVE` is for those.
    """
    t, hidden, vocab = setting.tokens, config.hidden_size, config.vocab_size
    heads, depth, trunk_depth = config.num_ensemble_heads, config.blocks_in_head, config.num_backbone_layers
    sharded, bf16 = setting.strategy == "FSDP2", setting.bf16
    by_head = setting.head_by_head
    if by_head is None:
        by_head = not (sharded or setting.checkpointing)
    ranks = setting.ranks if sharded else 1
    count = parameters.all.total
    states = FP32 * hidden * t  # hidden states [tokens, hidden_size] in fp32
    block_weights = _block_products(config)
    block_grads = FP32 * (block_weights + 2 * hidden)
    lm_grads = FP32 * vocab * hidden

    fixed = {
        "weights, fp32": FP32 * count / ranks,
        "Adam's moments, fp32": ADAM * count / ranks,
        "masks, topology state": (3 * parameters.packed + parameters.mobile) / ranks,
        "DDP's buckets": FP32 * count * (setting.strategy == "DDP"),
    }
    all_grads = FP32 * count / ranks
    earlier = all_grads if setting.passes > 1 else 0  # gradients of the passes before this one

    # Activations. A head's input counts as the trunk's.
    block = block_activations(config, bf16) * t
    kept = states if setting.checkpointing else block
    own = setting.order_per_head
    trunk = trunk_depth * kept * (heads if own else 1) + states * (heads if own or not config.share_embedding else 1)
    norm = 2 * states + FP32 * t
    head = depth * kept + norm - states
    # Two gradients of the MLP's width beyond what its backward pass frees, and the residual stream's.
    element = 2 if bf16 else FP32
    backward = 2 * element * config.intermediate_size * t + states
    recomputed = block - states if setting.checkpointing else 0

    # Copies or gathered weights of products: all blocks' while autocast lasts, later those that backward needs.
    copy = (2 if bf16 else 0) * block_weights
    gathered = 2 * element * block_weights
    copies = gathered if sharded else copy * config.num_cache_layers
    later = gathered if sharded else copy * (1 if setting.checkpointing else config.num_cache_layers)
    trunk_later = gathered if sharded else copy * (1 if setting.checkpointing else trunk_depth)
    # FSDP2: a block's gradients before they are reduced, and the fp32 buffer that they are reduced from.
    unreduced = (element + FP32) * block_weights if sharded else 0

    def moment(name: str, **items: float) -> Moment:
        labels = {
            "grads": "gradients, fp32",
            "copies": "bf16 copies of weights" if not sharded else "gathered weights",
            "activations": "activations",
            "loss": "loss: logits and gradients",
            "work": "backward of a block",
            "update": "topology update",
        }
        return Moment(name, fixed | {labels[key]: items.get(key, 0) for key in labels})

    own_grads = depth * block_grads + FP32 * hidden + lm_grads  # a head's
    head_grads = heads * own_grads / ranks
    # Gathered or copied, the LM head's weight lies beside its fp32 original while its loss is computed.
    loss = _loss_memory(config, setting) + (element * vocab * hidden if sharded and not bf16 else 0)
    if by_head:
        pending = (heads - 1) * (own_grads + states)
        at_loss = moment(
            "loss of the last head", grads=earlier + pending, copies=copies, activations=trunk + head,
            loss=states + loss,
        )  # fmt: skip
        moments = [
            at_loss,
            moment("backward of the last head begins", grads=earlier + pending + lm_grads, copies=copies,
                   activations=trunk + head, work=states + backward),
            moment("backward of the last head ends", grads=earlier + pending + own_grads, copies=copies,
                   activations=trunk + min(depth, 1) * block, work=backward * bool(depth)),
        ]  # fmt: skip
    else:
        pending = (heads - 1) * (lm_grads + states)
        moments = [
            moment("loss of the last head", grads=earlier + pending, copies=copies, activations=trunk + heads * head,
                   loss=heads * states + loss),
            moment("backward of the heads begins", grads=earlier + heads * lm_grads, copies=later,
                   activations=trunk + heads * head + recomputed,
                   work=2 * heads * states + backward + unreduced),
        ]  # fmt: skip
        if depth:
            # Unless they were there already, the gradients of the heads have taken the activations' place.
            moments.append(
                moment("backward of the heads ends", grads=earlier or head_grads, copies=trunk_later + later,
                       activations=trunk + kept + recomputed, work=heads * states + backward + unreduced)
            )  # fmt: skip
    if trunk_depth:
        moments.append(
            moment("backward of the backbone begins", grads=earlier or head_grads, copies=trunk_later,
                   activations=trunk + recomputed, work=heads * states + backward + unreduced)
        )  # fmt: skip
        moments.append(
            moment("backward of the backbone ends", grads=all_grads, copies=copy or copies,
                   activations=kept + recomputed, work=backward + unreduced)
        )  # fmt: skip
    embedding_grads = lm_grads if setting.passes > 1 or sharded or config.tie_word_embeddings else 0
    moments.append(moment("backward of the embedding", grads=all_grads, work=states + embedding_grads))
    if parameters.mobile:
        moments.append(moment("topology update", grads=all_grads, update=_update_memory(parameters, setting) / ranks))
    return moments


def peak_moment(config: NeuroTrailsLlamaConfig, parameters: Parameters, setting: Setting) -> Moment:
    """The moment of `step_memory` that needs most."""
    return max(step_memory(config, parameters, setting), key=lambda moment: moment.total)


def _loss_memory(config: NeuroTrailsLlamaConfig, setting: Setting) -> float:
    """Bytes that `LinearCrossEntropy` holds of one head at most, beside its input in fp32.

    A chunk's logits, their log-probabilities, and those of the chunk before with their gradients; the gradients of the
    hidden states so far and of the LM head; under autocast bf16 copies of the input and the LM head.
    """
    t, hidden, vocab = setting.tokens, config.hidden_size, config.vocab_size
    chunk = min(t, LOSS_CHUNK.get(setting.device, LOSS_CHUNK_DEVICE))
    logits, weight = chunk * vocab, vocab * hidden
    widened = 4 if setting.device == "cpu" else 0  # a CPU's log_softmax copies bf16 logits to fp32, a GPU's does not
    if setting.bf16:
        fixed = 2 * weight + 2 * t * hidden + 2 * t * hidden
        if chunk == t:
            return fixed + max((6 + widened) * logits, 6 * logits + 6 * weight)
        return fixed + 4 * weight + max((12 + widened) * logits, 6 * logits + 2 * weight)
    fixed = 4 * t * hidden
    return fixed + (max(8 * logits, 4 * logits + 4 * weight) if chunk == t else 12 * logits + 4 * weight)


def _update_memory(parameters: Parameters, setting: Setting) -> float:
    """Bytes that a topology update takes for a while, one process holding all weights.

    Old and new masks of all tensors as bools; of one tensor its sort keys and what is chosen, or the squared gradients
    that its optimizer state takes over.
    """
    n = parameters.largest
    stretch = min(n, 2**17 if setting.device == "cpu" else 2**25)
    histograms = 4 * 2**20  # and the samples that bracket a score
    return 2 * parameters.mobile + max(7 * n + 8 * stretch, 13 * n) + histograms


# ---------------------------------------------------------------------------------------- time, disk, network


@dataclass(frozen=True)
class Checkpoint:
    """Bytes on disk of one checkpoint, and how many there are."""

    model: int
    training_state: int
    kept: int


def checkpoint_size(run: RunConfig, parameters: Parameters) -> Checkpoint:
    """Size of ``model.safetensors`` (weights and masks) and of the training state; tokenizer and text files beside.

    The training state holds Adam's moments, which masks were ever active and last grown, averaged gradients where
    updates look at them, and the fp32 weights where the model's own file is rounded.
    """
    weights, masks = parameters.all.total, parameters.packed
    rounded = run.train.save_dtype != "float32"
    momentum = FP32 * parameters.masked * run.sparsity.needs_momentum
    state = ADAM * weights + 2 * masks + momentum + rounded * (FP32 * weights + masks)
    return Checkpoint((2 if rounded else FP32) * weights + masks, state, run.train.keep)


@dataclass(frozen=True)
class Communication:
    """What a rank sends for one optimizer step, in bytes, and how long that takes at the sheets' bandwidths.

    Attributes:
        overlap: share of the step's computing that communication can run beside, see [`overlap`].
    """

    name: str
    sent: float
    seconds: float
    overlap: float

    def step_seconds(self, computing: float) -> float:
        """A step whose communication is hidden behind ``computing`` seconds as far as can be."""
        return computing + max(0.0, self.seconds - self.overlap * computing)


def overlap(config: NeuroTrailsLlamaConfig, setting: Setting) -> float:
    """Share of a step's computing during which gradients or weights can travel, at best.

    FSDP2 gathers and reduces all along. DDP reduces a gradient once it is there, in the last pass only: in the backward
    pass, two thirds of a pass; where heads run head by head, in the backbone's alone, since all the heads' gradients
    are handed over when the backward pass of the whole begins.
    """
    if setting.strategy == "FSDP2":
        return 1.0
    trunk = config.num_backbone_layers
    forward = forward_flops_per_token(config, setting.length)
    block = 2 * _block_products(config) + _attention(config, setting.length)
    late = forward if setting.checkpointing else trunk * block
    return 2 / 3 * late / forward / setting.passes


def communication(
    config: NeuroTrailsLlamaConfig, weights: int, setting: Setting, gpu: GPU, per_node: int
) -> Communication:
    """Communication of one step.

    DDP all-reduces the fp32 gradients once a step: each rank sends ``2 (n - 1) / n`` times their bytes. FSDP2 gathers
    the weights (bf16 under bf16) for the forward and again for the backward pass, and reduces and scatters the fp32
    gradients, in every pass: ``(n - 1) / n`` of their bytes each.

    Time: ring algorithms in two levels, as NCCL has them. Of ``B`` bytes a rank sends ``(g - 1) / g * B`` within its
    node of ``g`` GPUs, and between ``N`` nodes each of the ``g`` network cards sends its part ``(N - 1) / N * B / g``;
    the two are added up, latencies are left out.
    """
    gpus = setting.ranks
    nodes, local = -(-gpus // per_node), min(gpus, per_node)

    def seconds(size: float) -> float:
        within = (local - 1) / local * size / (gpu.node_gb_s * 1e9)
        return within + (nodes - 1) / nodes * size / local / (gpu.network_gb_s * 1e9)

    gradients = FP32 * weights
    if setting.strategy == "FSDP2":
        gathered = 2 * (2 if setting.bf16 else FP32) * weights
        total = setting.passes * (gathered + gradients)
    else:
        total = 2 * gradients
    return Communication(setting.strategy, (gpus - 1) / gpus * total, seconds(total), overlap(config, setting))


@dataclass(frozen=True)
class Schedule:
    """The work of a run, and its time at an assumed share ``mfu`` of the peak.

    Attributes:
        steps: optimizer steps.
        tokens_per_step: over all processes.
        rows, passes: sequences of one forward pass of one process, and forward passes of one step.
        step_seconds: of computing alone; executed FLOPs of the model, without what checkpointing recomputes.
        mfu: the assumption.
    """

    steps: int
    tokens_per_step: int
    rows: int
    passes: int
    step_seconds: float
    mfu: float

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600


# ---------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Memory:
    """The fullest moment of a step in one setting, and whether it fits a GPU that keeps `RESERVE` free."""

    setting: Setting
    peak: Moment
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run costs; see the classes of its parts.

    Attributes:
        memory: by strategy, each without and with gradient checkpointing.
        remedies: where the run as configured does not fit, what would: a text each, none if nothing does.
    """

    gpu: GPU
    gpus: int
    per_node: int
    parameters: Parameters
    flops: Flops
    schedule: Schedule
    memory: list[Memory]
    remedies: list[str]
    checkpoint: Checkpoint
    communication: list[Communication]
    bf16: bool
    checkpointing: bool


def plan(run: RunConfig, gpus: int, gpu: GPU, *, mfu: float = 0.4, per_node: int = 8) -> Plan:
    """The costs of a run on ``gpus`` GPUs of one kind.

    Args:
        run: its configuration.
        gpus: one process each.
        gpu: of the table.
        mfu: assumed share of the bf16 peak that training reaches, in (0, 1].
        per_node: GPUs of a node.

    Raises:
        ValueError: a number out of range, a batch that does not divide among the GPUs, or an impossible model.
    """
    if gpus < 1 or per_node < 1:
        raise ValueError(f"--gpus {gpus}, --gpus_per_node {per_node}: accepted are whole numbers from 1")
    if gpus > per_node and gpus % per_node:
        raise ValueError(f"--gpus {gpus}: accepted are up to {per_node}, a node's, and multiples of it")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu:g}: accepted is a number in (0, 1]")
    config = NeuroTrailsLlamaConfig(**run.model, max_position_embeddings=run.data.sequence_length)
    rows, passes = run.train.accumulation_steps(gpus)
    parameters = count_parameters(config, run.sparsity)
    flops = count_flops(run, config, parameters)
    bf16 = run.train.precision != "fp32"
    tokens = run.train.batch_size * run.data.sequence_length
    strategies = ("DDP", "FSDP2") if gpus > 1 else ("one process",)
    base = Setting(
        rows, run.data.sequence_length, bf16, passes=passes, ranks=gpus, order_per_head=run.data.order_per_head
    )

    def memory(setting: Setting) -> Memory:
        peak = peak_moment(config, parameters, setting)
        return Memory(setting, peak, peak.total <= gpu.memory_gib * GIB * (1 - RESERVE))

    settings = [replace(base, strategy=name, checkpointing=on) for name in strategies for on in (False, True)]
    memories = [memory(setting) for setting in settings]
    as_configured = replace(base, strategy=strategies[0], checkpointing=run.train.gradient_checkpointing)
    remedies = []
    if not memory(as_configured).fits:
        remedies = list(_remedies(as_configured, memory, run.train.batch_size))
    return Plan(
        gpu=gpu,
        gpus=gpus,
        per_node=per_node,
        parameters=parameters,
        flops=flops,
        schedule=Schedule(
            run.train.max_steps, tokens, rows, passes, flops.training * tokens / (gpus * gpu.tflops * 1e12 * mfu), mfu
        ),
        memory=memories,
        remedies=remedies,
        checkpoint=checkpoint_size(run, parameters),
        communication=[
            communication(config, parameters.all.total, replace(as_configured, strategy=name), gpu, per_node)
            for name in strategies
            if gpus > 1
        ],
        bf16=bf16,
        checkpointing=run.train.gradient_checkpointing,
    )


def _remedies(setting: Setting, memory: Callable[[Setting], Memory], batch: int) -> Iterator[str]:
    """What makes a step fit, one change or two at a time."""
    smaller = [rows for rows in range(setting.rows - 1, 0, -1) if setting.rows % rows == 0]

    def fitting(setting: Setting) -> Iterator[str]:
        if memory(setting).fits:
            yield ""
            return
        for rows in smaller:
            if memory(replace(setting, rows=rows, passes=setting.passes * setting.rows // rows)).fits:
                yield f" with --train.micro_batch_size {rows}"
                return

    for text in fitting(setting):
        yield text.removeprefix(" with ")
    if not setting.checkpointing:
        for text in fitting(replace(setting, checkpointing=True)):
            yield f"--train.gradient_checkpointing true{text}"
    for ranks in dict.fromkeys((max(2, setting.ranks), 8, 64, 512)):
        if ranks < setting.ranks or batch % ranks:
            continue
        for on in sorted({setting.checkpointing, True}):
            rows = min(setting.rows, batch // ranks)
            sharded = replace(setting, strategy="FSDP2", ranks=ranks, rows=rows, checkpointing=on)
            found = [text for text in fitting(sharded) if memory(sharded).fits or rows > 1]
            for text in found:
                more = f" on {ranks} GPUs" if ranks > setting.ranks else ""
                yield f"FSDP2{more}{' and gradient checkpointing' if on else ''}{text}"
            if found:
                return


# ------------------------------------------------------------------------------------------------- the report


def report(plan: Plan) -> str:
    """The plan as plain text."""
    return "\n\n".join(
        "\n".join(lines)
        for lines in (
            _describe_parameters(plan.parameters),
            _describe_flops(plan),
            _describe_memory(plan),
            _describe_schedule(plan),
            _describe_communication(plan),
        )
    )


def _table(rows: list[list[str]]) -> list[str]:
    """Columns two spaces apart, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _millions(number: float) -> str:
    return f"{number / 1e6:,.2f} M"


def _plural(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _describe_parameters(parameters: Parameters) -> list[str]:
    rows = [["", "total", "active", "density"]]
    trails = {f"trail {head}": trail for head, trail in enumerate(parameters.trails)}
    for name, count in {**parameters.parts, "all": parameters.all, **trails}.items():
        density = count.active / count.total if count.total else 1.0
        rows.append([name, _millions(count.total), _millions(count.active), f"{density:.4f}"])
    return ["Parameters (a trail is the path through the backbone and one head)", *_table(rows)]


def _describe_flops(plan: Plan) -> list[str]:
    flops, weights = plan.flops, 2 * plan.parameters.all.total
    rows = [["", "executed", "active weights only"]]
    rows.append(["training", f"{flops.training / 1e9:.3f} G", f"{flops.sparse_training / 1e9:.3f} G"])
    if flops.recomputed:
        rows.append(["  recomputed by checkpointing", f"{flops.recomputed / 1e9:.3f} G", ""])
    rows.append([f"decoding, {flops.context} tokens of context", f"{flops.decoding / 1e9:.3f} G",
                 f"{flops.sparse_decoding / 1e9:.3f} G"])  # fmt: skip
    read = (weights + flops.cache_bytes) / (plan.gpu.memory_gb_s * 1e9)
    return [
        "FLOPs per token, all heads (zeros are multiplied like any weight: only the first column is time)",
        *_table(rows),
        f"  one token decoded reads {_gib(weights)} GiB of bf16 weights and {_gib(flops.cache_bytes)} GiB of cache: "
        f"at least {read * 1e3:.2f} ms",
    ]


def _describe_memory(plan: Plan) -> list[str]:
    columns = plan.memory
    rows = [["", *(f"{m.setting.strategy}{' + ckpt' if m.setting.checkpointing else ''}" for m in columns)]]
    names = dict.fromkeys(name for memory in columns for name in memory.peak.items)
    for name in names:
        values = [memory.peak.items.get(name, 0) for memory in columns]
        if any(values):
            rows.append([name, *map(_gib, values)])
    rows.append(["total", *(_gib(memory.peak.total) for memory in columns)])
    rows.append(["fits", *("yes" if memory.fits else "NO" for memory in columns)])
    usable = plan.gpu.memory_gib * (1 - RESERVE)
    moments: dict[str, list[str]] = {}
    for label, memory in zip(rows[0][1:], columns):
        moments.setdefault(memory.peak.name, []).append(label)
    lines = [
        f"Memory of a rank in GiB, {plan.schedule.rows} x {columns[0].setting.length} tokens a pass, "
        f"{'bf16 autocast' if plan.bf16 else 'fp32'}, at the fullest moment of a step",
        *_table(rows),
        *(f"  fullest at: {name} ({', '.join(labels)})" for name, labels in moments.items()),
        f"  usable: {usable:.1f} of {plan.gpu.memory_gib:g} GiB, {RESERVE:.0%} kept for CUDA, NCCL and fragmentation",
        "  ckpt: gradient checkpointing"
        + ". FSDP2's columns rest on assumptions, see nt_hf.plan.step_memory" * (plan.gpus > 1),
    ]
    configured = next(memory for memory in columns if memory.setting.checkpointing == plan.checkpointing)
    if not configured.fits:
        lines.append(f"  WARNING: {rows[0][1 + columns.index(configured)]}, as configured, does not fit. What would:")
        lines += [f"    {remedy}" for remedy in plan.remedies] or ["    nothing that this planner tries"]
    return lines


def _describe_schedule(plan: Plan) -> list[str]:
    schedule, saved = plan.schedule, plan.checkpoint
    hours = f"{schedule.hours:,.2f} hours" if schedule.hours < 48 else f"{schedule.hours / 24:,.1f} days"
    time = (
        f"  {hours}, {plan.gpus * schedule.hours:,.0f} GPU hours, {schedule.step_seconds * 1e3:,.1f} ms a step, "
        f"at an MFU of {schedule.mfu:g}: an assumption"
        if plan.bf16
        else "  no time: train.precision is fp32, and the peaks of the table are bf16's"
    )
    return [
        f"Run on {plan.gpus} x {plan.gpu.name} ({plan.gpu.tflops:g} TFLOP/s dense bf16 each)",
        f"  {schedule.steps:,} steps of {schedule.tokens_per_step:,} tokens: {schedule.tokens / 1e9:.2f} G tokens; "
        f"{_plural(schedule.passes, 'pass', 'passes')} of {_plural(schedule.rows, 'sequence')} a step on each GPU",
        time,
        "  computing alone: evaluation, topology updates, checkpoints and communication come on top",
        f"  a checkpoint: {_gib(saved.model)} GiB model.safetensors and {_gib(saved.training_state)} GiB training "
        f"state; {saved.kept} kept, {_gib((saved.kept + 1) * (saved.model + saved.training_state))} GiB at most",
    ]


def _describe_communication(plan: Plan) -> list[str]:
    if not plan.communication:
        return ["Communication: none, one process"]
    compute = plan.schedule.step_seconds
    rows = [["", "sent by a rank", "time", "share of computing", "overlap", "step, hidden", "step, not hidden"]]
    for each in plan.communication:
        times = (each.seconds, each.step_seconds(compute), compute + each.seconds)
        sent, *steps = (f"{seconds * 1e3:,.1f} ms" for seconds in times)
        rows.append([each.name, f"{_gib(each.sent)} GiB", sent, f"{each.seconds / compute:.1%}",
                     f"{each.overlap:.1%}", *steps])  # fmt: skip
    nodes = _plural(-(-plan.gpus // plan.per_node), "node")
    return [
        f"Communication of a step, {nodes} of {min(plan.gpus, plan.per_node)} GPUs "
        f"({plan.gpu.node_gb_s:g} GB/s within, {plan.gpu.network_gb_s:g} GB/s a GPU between them, each direction), "
        "at full bandwidth",
        *_table(rows),
        "  overlap: share of the computing that communication can at best run beside; hidden: it does",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nt_hf.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", nargs="+", required=True, help="YAML files; later ones override earlier ones")
    parser.add_argument("--gpus", type=int, default=1, help="how many, one process each")
    parser.add_argument("--gpu", default="h100", help=", ".join(gpu.name for gpu in GPUS))
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the bf16 peak (default: 0.4)")
    args, rest = parser.parse_known_args()
    run_config = load_run_config(args.config, parse_overrides(rest))
    found = plan(run_config, args.gpus, find_gpu(args.gpu), mfu=args.mfu, per_node=args.gpus_per_node)
    sys.stdout.write(report(found) + "\n")
