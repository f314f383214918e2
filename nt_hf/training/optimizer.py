"""The optimizer of a run and its learning rate."""

import fnmatch

import torch
from torch import nn

from ..config import TrainConfig
from ..sparsity.schedules import cosine


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW, fused, or SGD; AdamW's decay spares norms and biases (everything with fewer than two dimensions).

    Each group of parameters has its ``learning_rate_factor``, for the loop to multiply the rate by.

    Raises:
        ValueError: a glob of ``learning_rate_factors`` fits no parameter.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for glob in train.learning_rate_factors:
        if not fnmatch.filter(named, glob):
            raise ValueError(
                f"train.learning_rate_factors: {glob!r} fits no parameter; accepted are globs of names such as "
                f"{', '.join(list(named)[:3])}"
            )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        decays = parameter.dim() >= 2 or train.optimizer == "sgd"
        key = (train.weight_decay if decays else 0.0, learning_rate_factor(name, train))
        groups.setdefault(key, []).append(parameter)
    options = [
        {"params": parameters, "weight_decay": decay, "learning_rate_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]
    if train.optimizer == "sgd":
        return torch.optim.SGD(options, lr=train.learning_rate, momentum=train.momentum, nesterov=train.nesterov)
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    return cls(options, lr=train.learning_rate, betas=tuple(train.betas), eps=train.eps, fused=True)


def learning_rate_factor(name: str, train: TrainConfig) -> float:
    """What the rate of a parameter is multiplied by: the last of ``learning_rate_factors`` whose glob fits, or 1."""
    fitting = [value for glob, value in train.learning_rate_factors.items() if fnmatch.fnmatchcase(name, glob)]
    return (fitting or [1.0])[-1]


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up, then what ``lr_schedule`` says, see `TrainConfig`."""
    decay = warmup = round(train.warmup_ratio * train.max_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if train.lr_schedule == "step":
        passed = sum(step >= round(share * train.max_steps) for share in train.lr_milestones)
        return train.learning_rate / 10**passed
    if train.lr_schedule == "warmup_stable_decay":
        decay = max(warmup, train.max_steps - round(train.decay_ratio * train.max_steps))
    floor = train.learning_rate * train.min_lr_ratio
    return cosine(step, decay, train.max_steps, train.learning_rate, floor)
