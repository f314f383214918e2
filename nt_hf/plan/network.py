"""Communication between the processes of a run, at the bandwidths of the data sheets."""

from dataclasses import dataclass

from .hardware import GPU
from .memory import FP32
from .step import StepSettings


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


def overlap(settings: StepSettings, backbone: float) -> float:
    """Share of a step's computing during which gradients or weights can travel, at best.

    FSDP2 gathers and reduces all along. DDP reduces a gradient once it is there, in the last pass only: in the backward
    pass, two thirds of a pass; where heads run head by head, in the backbone's alone, since all the heads' gradients
    are handed over when the backward pass of the whole begins.

    Args:
        settings: of the step.
        backbone: share of the backbone in a pass.
    """
    if settings.strategy == "FSDP2":
        return 1.0
    return 2 / 3 * (1 if settings.checkpointing else backbone) / settings.passes


def communication(weights: int, settings: StepSettings, gpu: GPU, per_node: int, backbone: float) -> Communication:
    """Communication of one step.

    DDP all-reduces the fp32 gradients once a step: each rank sends ``2 (n - 1) / n`` times their bytes. FSDP2 gathers
    the weights (bf16 under bf16) for the forward and again for the backward pass, and reduces and scatters the fp32
    gradients, in every pass: ``(n - 1) / n`` of their bytes each.

    Time: ring algorithms in two levels, as NCCL has them. Of ``B`` bytes a rank sends ``(g - 1) / g * B`` within its
    node of ``g`` GPUs, and between ``N`` nodes each of the ``g`` network cards sends its part ``(N - 1) / N * B / g``;
    the two are added up, latencies are left out.
    """
    gpus = settings.ranks
    nodes, node_gpus = -(-gpus // per_node), min(gpus, per_node)

    def seconds(size: float) -> float:
        within = (node_gpus - 1) / node_gpus * size / (gpu.node_gb_s * 1e9)
        return within + (nodes - 1) / nodes * size / node_gpus / (gpu.network_gb_s * 1e9)

    gradients = FP32 * weights
    if settings.strategy == "FSDP2":
        gathered = 2 * (2 if settings.bf16 else FP32) * weights
        total = settings.passes * (gathered + gradients)
    else:
        total = 2 * gradients
    return Communication(settings.strategy, (gpus - 1) / gpus * total, seconds(total), overlap(settings, backbone))
