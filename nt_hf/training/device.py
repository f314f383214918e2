"""What runs on the device: compiled blocks, numbers on their way to the host, memory."""

import resource
import sys
from typing import Any

import torch
from transformers import PreTrainedModel


def compile_blocks(model: PreTrainedModel) -> None:
    """Compiles the blocks of a multi-head model in place; names, masks and checkpoints stay as they are.

    All blocks share one graph. Masks are no part of it, so topology updates do not compile anything again.
    """
    for block in model.blocks():
        block.compile()


class HostCopy:
    """Numbers that are copied from the device to the host while the host does other work.

    Args:
        numbers: tensors ``[]`` or ``[n]``.
    """

    def __init__(self, **numbers: torch.Tensor):
        self._numbers = {name: value.detach().to("cpu", non_blocking=True) for name, value in numbers.items()}
        self._event = None
        if any(value.is_cuda for value in numbers.values()):
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> dict[str, Any]:
        """The numbers and lists of numbers, by name; waits for those that have not arrived yet."""
        if self._event is not None:
            self._event.synchronize()
        return {name: value.tolist() for name, value in self._numbers.items()}


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the accelerator's allocator, on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
