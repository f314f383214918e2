"""What comes and goes in a process's memory while the real training step runs on fake tensors.

Fake tensors have shapes and no memory, so the step of a large model takes seconds, and every operation can be seen.
PyTorch's own ``MemTracker`` hangs hooks on the parameters, and a model whose parameters have hooks does not train head
by head. So a recorder of its own looks on.
"""

import contextlib
import functools
import weakref
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.lm_heads import LMHead
from ..models.losses import CACHED, LOSS_CHUNK, LOSS_CHUNK_DEVICE, LinearCrossEntropy
from .parameters import build, without_values


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
        head_by_head: heads run backward before the next one runs forward, unless FSDP2 or checkpointing rules it out.
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
    head_by_head: bool = True
    order_per_head: bool = False

    @property
    def shards(self) -> int:
        """Parts that the weights are split into."""
        return self.ranks if self.strategy == "FSDP2" else 1


# What a tensor can be for. Gradients wait until the backward pass of the whole hands them to the parameters.
PURPOSES = WAITING, GRADIENTS, COPIES, ACTIVATIONS, LOSS, BACKWARD = (
    "gradients to be added", "gradients", "copies of weights", "activations", "loss", "backward",
)  # fmt: skip


@dataclass(eq=False)
class _Allocation:
    size: int
    purpose: str
    end: weakref.ref | None = None  # which tells the recorder


class StepRecorder(TorchDispatchMode):
    """Notes the tensors that are made and freed while a step runs within it.

    Args:
        model: its parameters are not noted, the gradients that they have already are.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self._events: list[tuple[int, _Allocation, str]] = []  # made or freed: 1 or -1; when
        self._moment, self._running = "forward", []
        self._names = {module: name for name, module in model.named_modules()}
        self._weights = {_storage(p) for p in model.parameters()}
        self._known = dict.fromkeys(self._weights)
        for p in model.parameters():
            if p.grad is not None:
                self._make(_storage(p.grad), p.grad.nbytes, GRADIENTS)
        # Hooks of these nodes see gradients as hooks of the parameters would. A node lives while somebody holds it.
        self._nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in model.parameters()]
        for node in self._nodes:
            node.register_prehook(self._hand_over)
        self._lm_heads = model.get_lm_heads()
        for module in (*model.blocks(), *model.get_embeddings(), *self._lm_heads):
            module.register_forward_pre_hook(self._enter)
            # A block that is recomputed ends by an exception, as soon as all is there that the backward pass needs.
            module.register_forward_hook(self._leave, always_call=True)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor) and (key := _storage(tensor)) not in self._known:
                purpose = self._purpose(function, args)
                # Gradients that meet are added in place, but for tensors that a dispatch mode looks at.
                in_place = purpose == BACKWARD and function is torch.ops.aten.add.Tensor
                allocation = self._make(key, tensor.untyped_storage().nbytes(), purpose, not in_place)
                allocation.end = weakref.ref(tensor.untyped_storage(), functools.partial(self._free, key))
        return result

    def _make(self, key: int, size: int, purpose: str, counts: bool = True) -> _Allocation:
        allocation = self._known[key] = _Allocation(size, purpose)
        self._events.append((1, allocation, self._moment if counts else ""))
        return allocation

    def _free(self, key: int, end: weakref.ref | None = None) -> _Allocation:
        allocation = self._known.pop(key)
        self._events.append((-1, allocation, ""))
        return allocation

    def _purpose(self, function, args) -> str:
        if self._running and self._running[-1] in self._lm_heads:
            return LOSS
        if function is torch.ops.aten._to_copy.default and _storage(args[0]) in self._weights:
            return COPIES
        return BACKWARD if _in_backward() and not self._running else ACTIVATIONS

    def _hand_over(self, grads: tuple[torch.Tensor | None, ...]) -> None:
        for key in (_storage(grad) for grad in grads if grad is not None):
            if self._known.get(key):
                waiting = self._free(key)
                waiting.purpose = WAITING  # as it turns out
                self._make(key, waiting.size, GRADIENTS).end = waiting.end

    def _enter(self, module: nn.Module, inputs) -> None:
        self._running.append(module)
        if not _in_backward():
            self._moment = f"{'loss' if module in self._lm_heads else 'forward'} of {self._names[module]}"

    def _leave(self, module: nn.Module, inputs, outputs) -> None:
        self._running.pop()
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(functools.partial(self._begin_backward, self._names[module]))

    def _begin_backward(self, name: str, grad: torch.Tensor) -> None:
        self._moment = f"backward of {name}"

    def moments(self) -> list[tuple[str, dict[str, int]]]:
        """The moments after something was made: a name, and the bytes that are there for each of `PURPOSES`."""
        amounts, moments = dict.fromkeys(PURPOSES, 0), []
        for sign, allocation, moment in self._events:
            amounts[allocation.purpose] += sign * allocation.size
            if moment:
                moments.append((moment, dict(amounts)))
        return moments


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _FakeLMHead(LMHead):
    """As the LM head, whose weight it would take for a quantised one: a fake tensor is of another class, too."""

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is None or self.bias is not None:
            return super().forward(hidden, labels)
        return LinearCrossEntropy.apply(hidden, self.weight, labels)


class _LogSoftmaxOfGPU(TorchFunctionMode):
    """Fake tensors are a CPU's, which copies bf16 logits to fp32 first; a GPU does not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.log_softmax and "dtype" in (kwargs or {}):
            return torch.empty_like(args[0], dtype=kwargs["dtype"])
        return function(*args, **(kwargs or {}))


def record_step(config: PreTrainedConfig, settings: StepSettings) -> list[tuple[str, dict[str, int]]]:
    """The moments of the last forward and backward pass of a step on one process, see [`StepRecorder.moments`].

    Args:
        config: of the model, which is built in full: a block has settings of its own in some families.
        settings: of which ``strategy`` and ``ranks`` are ignored.
    """
    of_cpu = settings.device == "cpu"
    chunk = mock.patch.dict(LOSS_CHUNK, cpu=LOSS_CHUNK.get(settings.device, LOSS_CHUNK_DEVICE))
    cached = mock.patch.dict(CACHED, clear=not of_cpu)  # a GPU goes through a whole chunk at a time
    model = build(config).train()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        without_values(model),
        chunk,
        cached,
        contextlib.nullcontext() if of_cpu else _LogSoftmaxOfGPU(),
    ):
        model.to_empty(device="cpu").tie_weights()
        lm_heads = model.get_lm_heads()
        for lm_head in lm_heads:
            lm_head.__class__ = _FakeLMHead
        if settings.checkpointing:
            # Transformers 5.23 knows it by the first name, earlier ones by the second.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if not settings.head_by_head:
            lm_heads[0].weight.register_hook(lambda grad: None)  # a hook is to see the backward pass of the whole
        if settings.passes > 1:
            for p in model.parameters():
                p.grad = torch.empty_like(p)
        rows = (settings.rows, settings.length)
        ids = torch.zeros((len(lm_heads), *rows) if settings.order_per_head else rows, dtype=torch.long)
        recorder = StepRecorder(model)
        with recorder:
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
                loss = model(ids, labels=ids, use_cache=False, num_items_in_batch=ids[0].numel()).loss
            loss.backward()
        return recorder.moments()
