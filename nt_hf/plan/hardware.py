"""Accelerators and what they can do, by their vendors' data sheets."""

import re
from dataclasses import dataclass

GIB = 2**30
# What is kept free of a GPU's memory: the CUDA context, NCCL's buffers, the allocator's fragmentation. An assumption.
RESERVE = 0.1


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
