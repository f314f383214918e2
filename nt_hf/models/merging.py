"""One stock model of all heads: the average of their weights, or a trail that learns what their ensemble says."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .losses import IGNORE_INDEX
from .multi_head import keep_heads, renumber_head, select_heads
from .trails import tensors_of


@torch.no_grad()
def merge_heads(model: PreTrainedModel, heads: Sequence[int] | None = None) -> PreTrainedModel:
    """The stock model of one trail whose head is the average of some heads: blocks, norm, LM head.

    Averages of weights are good models only where the heads share an ancestor and have not moved far from it, as after
    fine-tuning copies of one model (Wortsman et al. 2022, model soups, arXiv 2203.05482). Of heads that began as
    different random weights it need not be any good. A weight outside a head's mask counts as the 0 that it is there,
    so the average is active where any head is. The stock model carries no masks.

    Args:
        model: of several heads.
        heads: those to average, all by default.

    Raises:
        ValueError: an impossible choice of heads.
    """
    heads = select_heads(model.config, heads, "heads")
    stock = model.extract_trail(heads[0])
    means: dict[tuple[int, str], torch.Tensor] = {}
    for count, head in enumerate(heads, 1):
        for index, (own, stock_module) in enumerate(model._trail(head, stock)):
            tensors = tensors_of(own)
            for name in (name for name, x in tensors_of(stock_module).items() if x.is_floating_point()):
                # A running mean, which is exact for equal heads.
                value = tensors[name].detach().float()
                mean = means.setdefault((index, name), value.clone())
                mean.lerp_(value, 1 / count)
    for index, (_, stock_module) in enumerate(model._trail(heads[0], stock)):
        for name, tensor in tensors_of(stock_module).items():
            if (index, name) in means:
                tensor.copy_(means[index, name])
    return stock


@torch.no_grad()
def with_student(model: PreTrainedModel, head: int) -> PreTrainedModel:
    """A copy of ``model`` with one head more, the last: a copy of ``head``, masks included, which is to learn.

    The heads of ``model`` stay as they are, so the ensemble that teaches does not move with its student.

    Raises:
        ValueError: there is no such head.
    """
    (head,) = select_heads(model.config, [head])
    source = [*range(model.config.num_ensemble_heads), head]
    with init.no_init_weights():
        grown = type(model)(keep_heads(model.config, source, type(model).maskable_names))
    grown.tie_weights()
    grown = grown.to(model.device)
    old, numbers = tensors_of(model), dict(enumerate(source))
    for name, tensor in tensors_of(grown).items():
        tensor.data = old[renumber_head(name, numbers)].detach().clone()
    grown.generation_config = copy.deepcopy(model.generation_config)
    return grown.train(model.training)


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.LongTensor,
    *,
    alpha: float = 0.5,
    temperature: float = 2.0,
    count: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """``alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy``, in nats (Hinton et al. 2015, 1503.02531).

    Both distributions of the divergence are at temperature ``T``; its square keeps the size of the gradient the same
    at any ``T``. The teacher gets no gradient.

    Args:
        student: logits ``[..., vocab]``.
        teacher: logits, or log-probabilities, ``[..., vocab]``.
        labels: the token that each position predicts, ``[...]``; ``-100`` is ignored, by the divergence, too.
        alpha: share of the divergence, 0 to 1.
        temperature: ``T``, above 0.
        count: divide the summed losses by this; by default by the number of labels.
    """
    used = labels != IGNORE_INDEX
    student, teacher, labels = student[used].float(), teacher[used].detach().float(), labels[used]
    entropy = nn.functional.cross_entropy(student, labels, reduction="sum")
    student, teacher = (torch.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    divergence = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2
    total = alpha * divergence + (1 - alpha) * entropy
    return total / (max(len(labels), 1) if count is None else count)
