"""How well an image classifier's heads and their ensemble predict: accuracy, calibration, out-of-distribution images.

The figures are functions of logits and labels alone; two functions load a model and collect its logits.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..models.ensemble import uncertainty
from ..models.modeling_neurotrails_images import MultiHeadForImageClassification
from ..models.trails import load_complete
from .diversity import Calibration, Pairs, bin_sums, calibration
from .perplexity import class_of_checkpoint, one_line_errors, ready

# Temperatures are looked for between exp(-LOG_RANGE) and exp(LOG_RANGE), to a relative 2e-9.
LOG_RANGE, HALVINGS = 5.0, 32


@dataclass(frozen=True)
class ImageScore:
    """How well one head or one ensemble classifies images.

    Attributes:
        accuracy: share of images whose best guess is right.
        nll: mean negative log-likelihood of the right class, in nats.
        brier: mean over images of the squared distance between the probabilities and the right answer, 0 to 2
            (Brier 1950).
        ece: expected calibration error, see [`reliability`].
    """

    accuracy: float
    nll: float
    brier: float
    ece: float


# ------------------------------------------------------------------------------------------------ logits of a model


def load_image_model(path: str | Path) -> PreTrainedModel:
    """The image classifier of a checkpoint directory in eval mode, on a GPU if there is one; a stock one is one head.

    Raises:
        ValueError: ``path`` is no such directory, it is damaged or incomplete, or a weight is not finite.
    """
    path = Path(path)
    with one_line_errors(path):
        class_of_checkpoint(path, MultiHeadForImageClassification, "image classifier")  # and the Auto class knows it
        model = load_complete(AutoModelForImageClassification, path)
    return ready(model, path)


@torch.no_grad()
def predict(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[heads, n, classes]`` of every head, fp32 on the CPU, and the labels ``[n]``.

    Args:
        model: in eval mode. Without ``num_ensemble_heads`` in its configuration it counts as one head.
        batches: dicts of ``pixel_values`` ``[batch, 3, H, W]`` as the model takes them and ``labels`` ``[batch]``.

    Raises:
        ValueError: there are no images, or a label is none of the model's classes.
        FloatingPointError: a logit is not finite.
    """
    heads = getattr(model.config, "num_ensemble_heads", None)
    logits, labels = [], []
    for batch in batches:
        pixels = batch["pixel_values"].to(model.device, model.dtype)
        output = model(pixels, output_head_logits=True).head_logits if heads else model(pixels).logits[None]
        logits.append(output.float().cpu())
        labels.append(batch["labels"].cpu())
    if not labels:
        raise ValueError("the data has no images; accepted is one or more")
    logits, labels = torch.cat(logits, 1), torch.cat(labels)
    check_predictions(logits, labels)
    return logits, labels


def check_predictions(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises unless logits ``[heads, n, classes]`` are finite and labels ``[n]`` are of these classes.

    Raises:
        ValueError: a label is none of the classes.
        FloatingPointError: a logit is not finite.
    """
    classes = logits.shape[-1]
    if (wrong := labels[(labels < 0) | (labels >= classes)]).numel():
        raise ValueError(f"labels={int(wrong[0])}: accepted is 0 to {classes - 1}, the classes of the model")
    if not (finite := logits.isfinite().all(-1)).all():
        head, image = (~finite).nonzero()[0].tolist()
        raise FloatingPointError(
            f"logits of head {head} are not finite, for example of image {image}: weights are not finite, or "
            "activations overflow"
        )


def by_scorer(head_logits: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Log-probabilities ``[n, classes]``, float64, of "ensemble, logits", "ensemble, probs", "head 0", "head 1", …

    One head has no ensembles. They are those of ``combine_logits``: the softmax of the mean logits, and the mean of the
    heads' probabilities. One at a time, because those of all together need much memory where classes are many.
    """
    if len(head_logits) > 1:
        yield "ensemble, logits", head_logits.mean(0, dtype=torch.float64).log_softmax(-1)
        yield "ensemble, probs", head_logits.double().log_softmax(-1).logsumexp(0).log_softmax(-1)
    for head, logits in enumerate(head_logits):
        yield f"head {head}", logits.double().log_softmax(-1)


# ---------------------------------------------------------------------------------------------------- the figures


def losses_of(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood ``[n]`` of every image's label, in nats."""
    return -log_probs.gather(-1, labels[:, None])[:, 0]


def reliability(log_probs: torch.Tensor, labels: torch.Tensor) -> Calibration:
    """Accuracy and confidence in 15 bins of equal width of the maximum probability (Guo et al. 2017)."""
    confidences, guesses = log_probs.exp().max(-1)
    return calibration(bin_sums(confidences, guesses == labels))


def score(log_probs: torch.Tensor, labels: torch.Tensor) -> ImageScore:
    """The figures of log-probabilities ``[n, classes]``, float64, for labels ``[n]``."""
    probs = log_probs.exp()
    losses = losses_of(log_probs, labels)
    return ImageScore(
        accuracy=float((log_probs.argmax(-1) == labels).double().mean()),
        nll=float(losses.mean()),
        brier=float((probs.square().sum(-1) - 2 * (-losses).exp() + 1).mean()),
        ece=reliability(log_probs, labels).error,
    )


def figures(log_probs: torch.Tensor, labels: torch.Tensor, temperature: float | None = None) -> dict[str, float]:
    """The figures of [`score`] by name, and with a temperature those that it changes, as ``scaled_nll`` and so on."""
    values = asdict(score(log_probs, labels))
    if temperature is not None:
        at_temperature = asdict(score((log_probs / temperature).log_softmax(-1), labels))
        values["temperature"] = temperature
        values |= {f"scaled_{name}": value for name, value in at_temperature.items() if name != "accuracy"}
    return values


def fit_temperature(log_probs: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature ``T`` for which ``softmax(log_probs / T)`` has the least NLL (Guo et al. 2017, section 4.2).

    To be fitted on other images than those that are scored. The NLL is convex in ``1 / T``, so its slope is bisected;
    if it has no minimum from 0.007 to 148, as where every guess is right, the nearer bound is returned.

    Args:
        log_probs: log-probabilities or logits ``[n, classes]``, float64.
        labels: ``[n]``.
    """
    low, high = -LOG_RANGE, LOG_RANGE  # of log T
    right = log_probs.gather(-1, labels[:, None])[:, 0].mean()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        probs = (log_probs * torch.tensor(-middle).exp().double()).softmax(-1)
        # Of the NLL along 1 / T: the mean expected log-probability less that of the right classes.
        slope = (probs * log_probs).sum(-1).mean() - right
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(torch.tensor((low + high) / 2, dtype=torch.float64).exp())


def disagreement(head_logits: torch.Tensor) -> Pairs:
    """Share of images where the best guesses of two heads differ."""
    guesses = head_logits.argmax(-1)
    shares = (guesses[:, None] != guesses).double().mean(-1)
    count = len(shares)
    return Pairs(shares.tolist(), float(shares.sum()) / (count * (count - 1)) if count > 1 else None)


def gains(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Accuracy, NLL and Brier score of each ensemble less the mean of the heads', from [`figures`] by scorer."""
    heads = [values for name, values in scores.items() if name.startswith("head")]
    return {
        name: {key: values[key] - sum(head[key] for head in heads) / len(heads) for key in ("accuracy", "nll", "brier")}
        for name, values in scores.items()
        if not name.startswith("head")
    }


def auroc(negatives: torch.Tensor, positives: torch.Tensor) -> float:
    """Share of pairs of a negative ``[n]`` and a positive ``[m]`` where the positive's score is higher; a tie is half.

    That is the area under the ROC curve (Hanley & McNeil 1982).
    """
    negatives = negatives.sort().values
    below, not_above = (torch.searchsorted(negatives, positives, right=right) for right in (False, True))
    return float((below + not_above).double().mean()) / (2 * len(negatives))


def out_of_distribution(logits: torch.Tensor, other_logits: torch.Tensor, scorer: str) -> dict[str, float]:
    """AUROC of telling other images (the positives) from those of the task, by how unsure the heads are.

    Args:
        logits: of the task's images, ``[heads, n, classes]``.
        other_logits: of the other images, ``[heads, m, classes]``.
        scorer: whose maximum probability is taken, see [`by_scorer`].

    Returns:
        By measure; the mutual information only of two heads or more, because one head has none.
    """
    measures = []
    for part in (logits, other_logits):
        unsure = uncertainty(part)
        measures.append(
            {
                "mutual_information": unsure.mutual_information,
                "predictive_entropy": unsure.predictive_entropy,
                "maximum_probability": -dict(by_scorer(part))[scorer].amax(-1),
            }
        )
    names = list(measures[0])[len(logits) == 1 :]
    return {name: auroc(measures[0][name], measures[1][name]) for name in names}
