"""Losses of heads whose logits never exist all at one time, and whose gradients may be computed along with them."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# Positions whose logits exist at one time when a loss is computed. On a CPU (2,048 positions, hidden size 256 and 512,
# vocabularies of 4,096 and 32,000) 256 was the fastest of 128, 256, 512 and 1024. The GPU's value is a choice of
# memory, 0.5 GB of fp32 logits at a vocabulary of 32,000, and not measured.
LOSS_CHUNK = {"cpu": 256}
LOSS_CHUNK_DEVICE = 4096
# Numbers that a thread of a CPU goes through at a time where one pass follows another: 1 MB in fp32, which stays in its
# cache. In bf16 the loss takes 0.83 of the time it takes without, on one thread of an AMD EPYC (2,048 positions, hidden
# size 512, vocabulary 32,000); 2**17, 2**19 and 2**20 are as fast.
CACHED = {"cpu": 2**18}


def next_tokens(labels: torch.LongTensor, heads: int) -> torch.LongTensor:
    """The token that each position predicts, ``[heads, batch * seq]``, from labels ``[batch, seq]``.

    The last position of a row predicts none. Labels ``[heads, batch, seq]`` are a batch for each head.
    """
    targets = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX).flatten(-2)
    return targets if targets.dim() == 2 else targets.expand(heads, -1)


def chunked_cross_entropy(
    lm_head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross-entropies of ``lm_head(hidden)``, the logits of only a chunk alive at any time.

    Args:
        lm_head: any callable from ``[n, hidden_size]`` to logits ``[n, vocab]``; its own forward runs, so
            adapters and quantised layers count.
        hidden: ``[n, hidden_size]``.
        labels: ``[n]``, ``-100`` is ignored.
    """

    def piece(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = lm_head(hidden).float()
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for part in zip(_loss_chunks(hidden), _loss_chunks(labels)):
        # The backward pass computes the chunk's logits again instead of keeping them.
        total = total + (checkpoint(piece, *part, use_reentrant=False) if torch.is_grad_enabled() else piece(*part))
    return total


def _loss_chunks(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values.split(LOSS_CHUNK.get(values.device.type, LOSS_CHUNK_DEVICE))


def _cached_rows(values: torch.Tensor) -> int:
    """Rows of ``values`` ``[n, size]`` to go through at a time; on a GPU all."""
    cached = CACHED.get(values.device.type)
    return max(1, len(values) if cached is None else cached * torch.get_num_threads() // values.shape[1])


def _cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """Sum of the cross-entropies of ``logits`` ``[n, vocab]``; with ``gradient`` that of each row overwrites it.

    It is computed in fp32. The gradient of a row whose label ``[n]`` is ignored is not zero.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    rows = _cached_rows(logits)
    for part, y in zip(logits.split(rows), labels[:, None].split(rows)):
        place = y.clamp(min=0)
        log_probs = torch.log_softmax(part, -1, dtype=torch.float32)
        total -= log_probs.gather(1, place).masked_fill_(y == IGNORE_INDEX, 0).sum()
        if gradient:  # softmax minus one-hot
            grad = log_probs.exp_()
            part.copy_(grad.scatter_add_(1, place, grad.new_full((), -1.0).expand_as(place)))
    return total


def _add_(total: torch.Tensor, values: torch.Tensor) -> None:
    """Adds ``values`` to ``total`` ``[n, size]`` of a wider type; a CPU copies them into that type first."""
    rows = _cached_rows(total)
    for to, part in zip(total.split(rows), values.split(rows)):
        to += part


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of ``hidden @ weight.T``, whose gradients are computed along with it.

    The logits of only a chunk exist at any time: the gradient of the cross-entropy overwrites them, and the gradients
    of ``hidden`` and ``weight`` follow at once. So nothing is kept and nothing is computed twice (the idea of Liger
    Kernel's fused loss, arXiv 2410.10989). Losses and the weight's gradient are summed in fp32, products are of the
    type that autocast or the weight asks for.

    Args:
        hidden: ``[n, hidden_size]``.
        weight: ``[vocab, hidden_size]``.
        labels: ``[n]``, ``-100`` is ignored.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        need_hidden, need_weight, _ = ctx.needs_input_grad
        with torch.autocast(device, enabled=False):
            inputs, matrix = hidden.to(dtype), weight.to(dtype)
            loss = hidden.new_zeros((), dtype=torch.float32)
            grad_hidden, grad_weight = [], None
            for x, y in zip(_loss_chunks(inputs), _loss_chunks(labels)):
                grad = x @ matrix.T  # the logits, which their gradient overwrites
                loss += _cross_entropy_(grad, y, gradient=need_hidden or need_weight)
                ignored = (y == IGNORE_INDEX).unsqueeze(1)
                if need_hidden:
                    grad_hidden.append((grad @ matrix).masked_fill_(ignored, 0))
                if need_weight:
                    x = x.masked_fill(ignored, 0)
                    if grad_weight is None:
                        grad_weight = (grad.T @ x).float()
                    elif dtype == torch.float32:
                        grad_weight.addmm_(grad.T, x)
                    else:
                        _add_(grad_weight, grad.T @ x)
        ctx.grads = (
            torch.cat(grad_hidden).to(hidden.dtype) if grad_hidden else None,
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
            None,
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _scaled_once(ctx, grad)


class HeadByHead(torch.autograd.Function):
    """A head's loss, whose gradients are computed along with it.

    So a head's activations are gone when the next head runs, and training needs the memory of one head. Nothing is
    computed twice: forward and backward of a head follow one another at once, in place of first all forward passes and
    then all backward passes.

    Args:
        loss: from the head's input to its loss, a scalar.
        states: the head's input.
        parameters: all that ``loss`` may depend on and that is to have gradients; there may be none.
    """

    @staticmethod
    def forward(ctx, loss, states, *parameters):
        start = states.detach().requires_grad_(states.requires_grad)
        wanted = [start, *parameters] if states.requires_grad else list(parameters)
        with torch.enable_grad():
            value = loss(start)
        grads = [None] * len(wanted)
        if value.requires_grad:  # else nothing that trains takes part: the head is frozen, its adapters are off
            grads = _apart(torch.autograd.grad(value, wanted, allow_unused=True))
        ctx.grads = (None, *([] if states.requires_grad else [None]), *grads)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _scaled_once(ctx, grad)


def _apart(grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The gradients, none of which shares its memory: those of two parameters that are added are one tensor."""
    seen: set[int] = set()
    apart = []
    for grad in grads:
        storage = None if grad is None else grad.untyped_storage()._cdata
        apart.append(grad.clone() if storage in seen else grad)
        seen |= {storage} - {None}
    return apart


def _scaled_once(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients that a forward pass left in ``ctx.grads``, times that of its scalar result."""
    if ctx.grads is None:
        raise RuntimeError(
            "this loss has gone backward already; accepted is backward(retain_graph=True) before, or another forward"
        )
    if torch._C._autograd._get_current_graph_task_keep_graph():  # retain_graph=True: they may be asked for again
        return tuple(None if each is None else each * grad for each in ctx.grads)
    # In place: copies of the weights' sizes would cost as much time as the optimizer does.
    grads, ctx.grads = ctx.grads, None
    return tuple(None if each is None else each.mul_(grad) for each in grads)
