"""What a run costs before it starts: parameters, FLOPs, memory, time, checkpoints and communication.

Pure functions; nothing is measured and no GPU is needed.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..config import RunConfig
from ..data.config import DataConfig
from .flops import Flops, count_flops
from .hardware import GIB, GPU, RESERVE
from .memory import ADAM, FP32, MemorySnapshot, resident, step_memory
from .network import Communication, communication
from .parameters import Parameters, count_parameters
from .step import StepSettings, record_step


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


@dataclass(frozen=True)
class Memory:
    """The fullest moment of a step in one setting, and whether it fits a GPU that keeps `RESERVE` free."""

    settings: StepSettings
    peak: MemorySnapshot
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
    if not isinstance(run.data, DataConfig):
        raise ValueError(f"model.base={run.model['base']!r}: accepted are decoders; image classifiers have no plan yet")
    config = run.model_config()
    rows, passes = run.train.accumulation_steps(gpus)
    parameters = count_parameters(config, run.sparsity)
    flops = count_flops(run, config, parameters)
    bf16 = run.train.precision != "fp32"
    tokens = run.train.batch_size * run.data.sequence_length
    strategies = ("DDP", "FSDP2") if gpus > 1 else ("one process",)
    base = StepSettings(
        rows, run.data.sequence_length, bf16, passes=passes, ranks=gpus, order_per_head=run.data.order_per_head
    )
    record = functools.cache(functools.partial(record_step, config))
    usable = gpu.memory_gib * GIB * (1 - RESERVE)

    @functools.cache
    def memory(settings: StepSettings) -> Memory:
        peak = max(step_memory(record, parameters, settings), key=lambda snapshot: snapshot.total)
        return Memory(settings, peak, peak.total <= usable)

    def fits(settings: StepSettings) -> bool:
        return sum(resident(parameters, settings).values()) <= usable and memory(settings).fits

    variants = [replace(base, strategy=name, checkpointing=on) for name in strategies for on in (False, True)]
    as_configured = replace(base, strategy=strategies[0], checkpointing=run.train.gradient_checkpointing)
    remedies = []
    if not memory(as_configured).fits:
        remedies = list(_remedies(as_configured, fits, run.train.batch_size))
    return Plan(
        gpu=gpu,
        gpus=gpus,
        per_node=per_node,
        parameters=parameters,
        flops=flops,
        schedule=Schedule(
            run.train.max_steps, tokens, rows, passes, flops.training * tokens / (gpus * gpu.tflops * 1e12 * mfu), mfu
        ),
        memory=[memory(settings) for settings in variants],
        remedies=remedies,
        checkpoint=checkpoint_size(run, parameters),
        communication=[
            communication(parameters.all.total, replace(as_configured, strategy=name), gpu, per_node, flops.backbone)
            for name in strategies
            if gpus > 1
        ],
        bf16=bf16,
        checkpointing=run.train.gradient_checkpointing,
    )


def _remedies(settings: StepSettings, fits: Callable[[StepSettings], bool], batch: int) -> Iterator[str]:
    """What makes a step fit, one change or two at a time."""
    smaller = [rows for rows in range(settings.rows - 1, 0, -1) if settings.rows % rows == 0]

    def fitting(settings: StepSettings) -> Iterator[str]:
        if fits(settings):
            yield ""
            return
        for rows in smaller:
            if fits(replace(settings, rows=rows, passes=settings.passes * settings.rows // rows)):
                yield f" with --train.micro_batch_size {rows}"
                return

    for text in fitting(settings):
        yield text.removeprefix(" with ")
    if not settings.checkpointing:
        for text in fitting(replace(settings, checkpointing=True)):
            yield f"--train.gradient_checkpointing true{text}"
    for ranks in dict.fromkeys((max(2, settings.ranks), 8, 64, 512)):
        if ranks < settings.ranks or batch % ranks:
            continue
        for on in sorted({settings.checkpointing, True}):
            rows = min(settings.rows, batch // ranks)
            sharded = replace(settings, strategy="FSDP2", ranks=ranks, rows=rows, checkpointing=on)
            changes = [text for text in fitting(sharded) if fits(sharded) or rows > 1]
            for text in changes:
                more = f" on {ranks} GPUs" if ranks > settings.ranks else ""
                yield f"FSDP2{more}{' and gradient checkpointing' if on else ''}{text}"
            if changes:
                return
