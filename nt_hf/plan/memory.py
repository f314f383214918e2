"""The memory of a training step: what a process holds at the moments when it can hold most."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .parameters import Parameters
from .step import ACTIVATIONS, BACKWARD, COPIES, GRADIENTS, LOSS, WAITING, StepSettings

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


def resident(parameters: Parameters, settings: StepSettings) -> dict[str, float]:
    """What a process holds all the time, in bytes by item."""
    weights = parameters.all.total
    items = {
        "weights, fp32": FP32 * weights,
        "Adam's moments, fp32": ADAM * weights,
        "masks, topology state": 3 * parameters.packed + parameters.mobile,
        "DDP's buckets": FP32 * weights * (settings.strategy == "DDP"),
    }
    return {name: size / settings.shards for name, size in items.items()}


def step_memory(
    record: Callable[[StepSettings], list[tuple[str, dict[str, int]]]], parameters: Parameters, settings: StepSettings
) -> list[MemorySnapshot]:
    """What a step holds at the fullest moment of its passes, in its topology update, and with dense second moments.

    The passes are recorded; of several the last, which finds the gradients of those before. The rest follows from
    shapes. DDP has buckets as large as the gradients (``gradient_as_bucket_view`` is off). Of FSDP2 it is assumed that
    weights, gradients, moments and masks are split evenly; that each block, embedding and LM head is gathered by
    itself, two at a time (one ahead); that in the backward pass the gradients of one of them wait, with the fp32 buffer
    they are reduced from; and that heads do not run head by head, so the activations of all are there.

    Not counted: the batch, rotary tables, and what libraries take for themselves (cuBLAS and NCCL workspaces, the
    CUDA context, fragmentation); `RESERVE` is for those.

    Args:
        record: gives the moments of a step, see [`record_step`].
        parameters: of the model.
        settings: of the step.
    """
    held, shards, sharded = resident(parameters, settings), settings.shards, settings.strategy == "FSDP2"
    element, unit = 2 if settings.bf16 else FP32, parameters.unit if sharded else 0

    def snapshot(name: str, amounts: dict[str, int]) -> MemorySnapshot:
        unreduced = (element + FP32) * unit if name.startswith("backward") else 0
        items = {
            "gradients, fp32": amounts[GRADIENTS] / shards + amounts[WAITING],
            "bf16 copies of weights": 0 if sharded else amounts[COPIES],
            "activations": amounts[ACTIVATIONS],
            "loss: logits and gradients": amounts[LOSS],
            "backward of a block": amounts[BACKWARD] + unreduced,
            "gathered weights": 2 * element * unit,
        }
        return MemorySnapshot(name, held | items)

    by_head = settings.head_by_head and not (sharded or settings.checkpointing)
    one_process = {"strategy": "one process", "ranks": 1, "passes": min(2, settings.passes), "head_by_head": by_head}
    moments = [snapshot(*moment) for moment in record(replace(settings, **one_process))]
    fullest = [max(moments, key=lambda moment: moment.total)]
    behind = {
        "topology update": _update_memory(parameters, settings) if parameters.mobile else 0,
        "copies of gradients": FP32 * parameters.copied,
    }
    for name, size in behind.items():
        if size:
            items = {"gradients, fp32": FP32 * parameters.all.total / shards, name: size / shards}
            fullest.append(MemorySnapshot(name, held | items))
    return fullest


def _update_memory(parameters: Parameters, settings: StepSettings) -> float:
    """Bytes that a topology update takes for a while, one process holding all weights.

    Old and new masks of all tensors as bools; of one tensor its sort keys and what is chosen, or the squared gradients
    that its optimizer state takes over.
    """
    n = parameters.largest
    chunk = min(n, 2**17 if settings.device == "cpu" else 2**25)
    histograms = 4 * 2**20  # and the samples that bracket a score
    return 2 * parameters.mobile + max(7 * n + 8 * chunk, 13 * n) + histograms
