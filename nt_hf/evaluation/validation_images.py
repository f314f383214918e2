"""Accuracy and calibration of an image classifier while it trains, summed batch by batch and over processes.

The figures are those of the module classification, for which the logits of all images need not be kept.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.configuration_neurotrails import ENSEMBLE_MODES
from ..models.ensemble import combine_logits
from ..models.losses import IGNORE_INDEX
from ..sparsity.sharding import reshard
from .diversity import BINS, bin_sums, calibration


@torch.no_grad()
def evaluate_images(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> dict[str, Any]:
    """Accuracy, mean negative log-likelihood and calibration error of the heads and of both ensembles, ready for JSON.

    Args:
        model: a multi-head classifier, not wrapped by DDP; it is left in the mode (train or eval) it was in. Of a
            sharded one every process must bring as many batches.
        batches: dicts of ``pixel_values`` and ``labels`` ``[batch]``; images labelled -100 do not count.
        autocast: makes the context to run the model in.
        reduce: sums a tensor over all processes.

    Raises:
        ValueError: there were no images.
        FloatingPointError: a loss is not finite, on all processes if on one.
    """
    training, heads = model.training, model.config.num_ensemble_heads
    model.eval()
    # Of each head and both ensembles [loss, bins of confidence]; then disagreeing pairs, in a row of their own.
    sums = torch.zeros(heads + len(ENSEMBLE_MODES) + 1, 1 + BINS * 3, dtype=torch.float64)
    for batch in batches:
        batch = {key: value.to(model.device) for key, value in batch.items()}
        with autocast():
            logits = model(batch["pixel_values"], output_head_logits=True).head_logits.float()
        counted = batch["labels"] != IGNORE_INDEX
        sums += _batch_sums(logits[:, counted], batch["labels"][counted]).cpu()
    reshard(model)
    model.train(training)
    sums = reduce(sums).cpu()
    losses, bins = sums[:-1, 0], sums[:-1, 1:].unflatten(-1, (BINS, 3))
    images = int(bins[0, :, 0].sum())
    if not images:
        raise ValueError("the validation data have no images; accepted is one or more")
    names = [f"head {head}" for head in range(heads)] + [f"the ensemble ({mode})" for mode in ENSEMBLE_MODES]
    if bad := [name for name, loss in zip(names, losses.tolist()) if not math.isfinite(loss)]:
        raise FloatingPointError(
            f"the loss of {', '.join(bad)} is not finite on these images: weights are not finite, or activations "
            "overflow"
        )
    figures = {
        "losses": (losses / images).tolist(),
        "accuracies": (bins[..., 2].sum(-1) / images).tolist(),
        "eces": [calibration(of_scorer).error for of_scorer in bins],
    }
    mode, pairs = model.config.ensemble_mode, heads * (heads - 1) // 2
    result: dict[str, Any] = {"images": images}
    for (name, values), of_mode in zip(figures.items(), ("loss", "accuracy", "ece")):
        ensembles = dict(zip(ENSEMBLE_MODES, values[heads:]))
        result |= {of_mode: ensembles[mode], f"head_{name}": values[:heads], f"ensemble_{name}": ensembles}
    disagreement = sums[-1, 0].item() / images / pairs if pairs else 0.0
    return {**result, "ensemble_mode": mode, "disagreement": disagreement}


def _batch_sums(head_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    ensembles = [combine_logits(head_logits, mode) for mode in ENSEMBLE_MODES]
    sums = []
    for logits in (*head_logits, *ensembles):
        log_probs = logits.double().log_softmax(-1)
        confidences, guesses = log_probs.exp().max(-1)
        loss = -log_probs.gather(-1, labels[:, None]).sum()
        sums.append(torch.cat([loss[None], bin_sums(confidences, guesses == labels).flatten()]))
    guesses = head_logits.argmax(-1)
    disagreeing = torch.zeros_like(sums[0])
    disagreeing[0] = (guesses[:, None] != guesses).sum() / 2
    return torch.stack([*sums, disagreeing])
