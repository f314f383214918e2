"""Why several heads help, or do not: how their predictions, errors, representations and masks differ.

Everything is measured in one pass over a text, as sums over the predicted tokens, so that memory does not grow with
the text.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..models.configuration_neurotrails import ENSEMBLE_MODES
from ..models.ensemble import combine_logits
from ..models.losses import IGNORE_INDEX
from ..models.modeling_neurotrails import MultiHeadForCausalLM
from ..models.multi_head import select_heads
from ..sparsity.measures import head_overlap, masks_by_head
from .perplexity import CHUNK, check_finite, perplexity

# Bins of confidence, of equal width, as in Guo et al. 2017.
BINS = 15


@dataclass(frozen=True)
class Calibration:
    """How often best guesses of some probability are right (Guo et al. 2017, arXiv 1706.04599, section 2).

    Attributes:
        error: expected calibration error: the difference between accuracy and mean confidence of each bin, weighted by
            its tokens.
        counts: tokens of each of the ``BINS`` bins; bin ``b`` holds confidences of ``(b / BINS, (b + 1) / BINS]``.
        confidences: mean probability of the best guess in each bin, ``None`` where a bin is empty.
        accuracies: share of right guesses in each bin, ``None`` where a bin is empty.
    """

    error: float
    counts: list[int]
    confidences: list[float | None]
    accuracies: list[float | None]


@dataclass(frozen=True)
class Score:
    """How well one head or one ensemble predicts; ``loss`` in nats a token, ``accuracy`` of its best guess."""

    loss: float
    perplexity: float
    accuracy: float
    calibration: Calibration


@dataclass(frozen=True)
class Gain:
    """The exact split ``ensemble_loss = mean_head_loss - diversity`` of a loss, in nats a token.

    Attributes:
        mean_head_loss: mean loss of the heads.
        diversity: what combining them gains, computed without the ensemble's loss; never negative but for rounding.
            Mode "logits", whose ensemble is the normalised geometric mean of the heads' distributions: ``-log sum_v
            exp(mean_h log p_h(v))``, which is the mean KL divergence from the ensemble to the heads and does not depend
            on the right token (Wood et al. 2023, arXiv 2301.03962; Heskes 1998, "Selecting weighting factors in
            logarithmic opinion pools"). Mode "probs": the Jensen gap ``log mean_h p_h(y) - mean_h log p_h(y)`` at the
            right token ``y`` (Abe et al. 2024, arXiv 2302.00704).
        ensemble_loss: loss of the ensemble.
        residual: ``mean_head_loss - diversity - ensemble_loss``, which is rounding only.
    """

    mean_head_loss: float
    diversity: float
    ensemble_loss: float
    residual: float


@dataclass(frozen=True)
class Pairs:
    """A figure of every two heads ``[M, M]``, and its mean over all pairs of different heads; ``None`` if undefined."""

    matrix: list[list[float | None]]
    mean: float | None


@dataclass(frozen=True)
class HeadsUsed:
    """Perplexity of ensembles of ``heads`` heads: mean, lowest and highest over the cyclic windows of the heads."""

    heads: int
    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class MaskOverlap:
    """Mean Jaccard overlap of the masks of every two heads, see `nt_hf.sparsity.measures.head_overlap`.

    Two random masks of density ``s`` overlap by ``s / (2 - s)``. ``by_kind``: of all modules of one name ("q_proj");
    ``by_block``: of each block of a head; ``by_module``: of each module ("layers.0.self_attn.q_proj").
    """

    overall: float
    by_kind: dict[str, float]
    by_block: dict[str, float]
    by_module: dict[str, float]


@dataclass(frozen=True)
class Diversity:
    """What a text shows about the heads of a model. Matrices and lists are in the order of ``heads``.

    Attributes:
        tokens: number of predicted tokens.
        heads: the heads measured.
        ensemble_mode: the model's own.
        head_scores: of each head.
        ensemble_scores: of the ensemble, by mode.
        vote_accuracy: accuracy of the majority of the heads' guesses; of guesses with equally many votes the one with
            the higher mean probability counts.
        oracle_accuracy: share of tokens that any head guesses right.
        gains: by mode, what the ensemble gains over its heads.
        disagreement: share of tokens where the guesses of two heads differ.
        kl: ``KL(p_g || p_h)``, row g, column h, mean over tokens, in nats.
        error_correlation: Pearson correlation of two heads' errors (1 where the guess is wrong, 0 where right).
        heads_used: in the model's mode, the perplexity with 1 to M heads. Of M heads there are M windows of neighbours,
            the last one's neighbour being the first, so every head counts equally often.
        similarity: linear CKA of the heads' hidden states, see [`LinearCKA`], by depth: after each block of a head
            ("block 0", ...) and after its final norm.
        mask_overlap: ``None`` where no two heads have masks.
    """

    tokens: int
    heads: list[int]
    ensemble_mode: str
    head_scores: list[Score]
    ensemble_scores: dict[str, Score]
    vote_accuracy: float
    oracle_accuracy: float
    gains: dict[str, Gain]
    disagreement: Pairs
    kl: Pairs
    error_correlation: Pairs
    heads_used: list[HeadsUsed]
    similarity: dict[str, Pairs]
    mask_overlap: MaskOverlap | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_diversity(
    model: MultiHeadForCausalLM,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    heads: Sequence[int] | None = None,
) -> Diversity:
    """Measures how the heads differ and what their ensemble gains, every token weighing the same.

    A model of one head has no pairs: their means are ``None``, and its ensembles are the head itself.

    Args:
        model: the model, not wrapped; it is left in the mode (train or eval) it was in.
        batches: as for [`evaluate`]: dicts of ``input_ids``, ``attention_mask`` and ``labels`` ``[batch, seq]``, labels
            unshifted, -100 ignored.
        heads: measure these heads and their ensemble; all by default.

    Raises:
        ValueError: there was no token to predict, or ``heads`` names one that the model lacks.
        FloatingPointError: a loss is not finite.
    """
    heads = select_heads(model.config, heads)
    training = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    similarities = [LinearCKA() for _ in range(model.config.blocks_in_head + 1)]
    for batch in batches:
        hidden, targets = _scored_states(model, {key: value.to(model.device) for key, value in batch.items()}, heads)
        if not len(targets):
            continue
        for similarity, states in zip(similarities, hidden):
            similarity.add(states)
        for start in range(0, len(targets), CHUNK):
            chunk = slice(start, start + CHUNK)
            head_logits = [model.head_logits(h, states[chunk]).float() for h, states in zip(heads, hidden[-1])]
            for key, value in _prediction_sums(head_logits, targets[chunk], model.config.ensemble_mode).items():
                sums[key] = sums.get(key, 0) + value
    model.train(training)
    if not sums:
        raise ValueError("the evaluation data has no token to predict")
    losses = dict(zip([*(f"head {head}" for head in heads), "the ensemble"], sums["losses"].tolist()))
    check_finite(losses)
    return Diversity(
        heads=heads,
        ensemble_mode=model.config.ensemble_mode,
        similarity={
            "final norm" if depth == model.config.blocks_in_head else f"block {depth}": _pairs(similarity.matrix())
            for depth, similarity in enumerate(similarities)
        },
        mask_overlap=mask_overlap(model, heads),
        **_predictions({key: value.cpu() for key, value in sums.items()}, model.config.ensemble_mode),
    )


def _scored_states(
    model: MultiHeadForCausalLM, batch: Mapping[str, torch.Tensor], heads: Sequence[int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states ``[M, n, hidden_size]`` at each depth of the heads, where tokens are predicted; these tokens."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    depths = model.head_states_by_depth(heads, **inputs)
    labels = batch["labels"][:, 1:]
    keep = labels != IGNORE_INDEX
    return [torch.stack([states[:, :-1][keep] for states in depth]) for depth in depths], labels[keep]


# --------------------------------------------------------------------------------------------------- predictions


def _prediction_sums(head_logits: Sequence[torch.Tensor], targets: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
    """What all figures about predictions are made of, summed over tokens, float64.

    Args:
        head_logits: fp32 logits ``[n, vocab]`` of the M heads.
        targets: the right tokens, ``[n]``.
        mode: the ensemble mode of ``windows``.

    Returns:
        ``tokens`` []; of the heads and then both ensembles ``losses`` [M + 2] and ``bins`` [M + 2, BINS, 3] (see
        [`bin_sums`]); ``diversity`` [2]; right answers of vote and oracle ``hits`` [2]; of pairs, [M, M],
        ``disagreeing``, ``both_wrong`` and ``cross`` (negative cross-entropies, relative to the first head's);
        ``windows`` [M - 2, M], the losses of 2 to M - 1 neighbouring heads.
    """
    count = len(head_logits)
    log_probs = torch.log_softmax(torch.stack(list(head_logits)), -1)
    predictors = [*log_probs, *(torch.log_softmax(combine_logits(head_logits, mode), -1) for mode in ENSEMBLE_MODES)]
    right = torch.stack([_gather_tokens(predictor, targets) for predictor in predictors]).double()
    best = [predictor.max(-1) for predictor in predictors]
    confidences, guesses = torch.stack([x.values for x in best]).exp(), torch.stack([x.indices for x in best])
    correct = guesses == targets
    guesses, wrong = guesses[:count], (~correct[:count]).double()

    diversity = {
        "logits": -torch.logsumexp(log_probs.mean(0), -1),
        "probs": torch.logsumexp(right[:count], 0) - math.log(count) - right[:count].mean(0),
    }
    probs = log_probs.exp()
    # The difference to one head, not the log-probability itself: a small KL is then no difference of large sums.
    cross = torch.einsum("gnv,hnv->ngh", probs, log_probs - log_probs[0])

    agreeing = guesses[:, None] == guesses[None]
    # The mean probability of each head's guess, at most 1, decides between guesses of equally many votes.
    support = probs.mean(0).gather(-1, guesses.T).T.double()
    winner = guesses.gather(0, (agreeing.sum(0) + support / 2).argmax(0, keepdim=True))[0]

    windows = torch.zeros(max(0, count - 2), count, dtype=torch.float64, device=targets.device)
    for size in range(2, count):
        for first in range(count):
            combined = combine_logits([head_logits[(first + i) % count] for i in range(size)], mode)
            losses = torch.logsumexp(combined, -1) - _gather_tokens(combined, targets)
            windows[size - 2, first] = losses.double().sum()
    return {
        "tokens": torch.tensor(len(targets), dtype=torch.float64),
        "losses": -right.sum(-1),
        "bins": bin_sums(confidences, correct),
        "diversity": torch.stack([diversity[mode].double().sum() for mode in ENSEMBLE_MODES]),
        "hits": torch.stack([winner == targets, correct[:count].any(0)]).double().sum(-1),
        "disagreeing": (~agreeing).double().sum(-1),
        "both_wrong": wrong @ wrong.T,
        "cross": cross.double().sum(0),
        "windows": windows,
    }


def _gather_tokens(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, tokens[:, None])[:, 0]


def _predictions(sums: Mapping[str, torch.Tensor], mode: str) -> dict[str, Any]:
    """The figures about predictions, by their names in [`Diversity`]."""
    tokens = sums["tokens"]
    losses = (sums["losses"] / tokens).tolist()
    accuracies = (sums["bins"][..., 2].sum(-1) / tokens).tolist()
    scores = [
        Score(loss, perplexity(loss), accuracy, calibration(bins))
        for loss, accuracy, bins in zip(losses, accuracies, sums["bins"])
    ]
    count = len(sums["cross"])
    ensembles = dict(zip(ENSEMBLE_MODES, scores[count:]))
    mean = math.fsum(losses[:count]) / count
    diversity = dict(zip(ENSEMBLE_MODES, (sums["diversity"] / tokens).tolist()))
    gains = {
        name: Gain(mean, diversity[name], score.loss, mean - diversity[name] - score.loss)
        for name, score in ensembles.items()
    }
    windows = [losses[:count], *(sums["windows"] / tokens).tolist()]
    if count > 1:
        windows.append([ensembles[mode].loss])
    vote, oracle = (sums["hits"] / tokens).tolist()
    wrong = sums["both_wrong"].diagonal()
    covariance = tokens * sums["both_wrong"] - torch.outer(wrong, wrong)
    return {
        "tokens": int(tokens),
        "head_scores": scores[:count],
        "ensemble_scores": ensembles,
        "vote_accuracy": vote,
        "oracle_accuracy": oracle,
        "gains": gains,
        "disagreement": _pairs(sums["disagreeing"] / tokens),
        "kl": _pairs((sums["cross"].diagonal()[:, None] - sums["cross"]) / tokens),
        "error_correlation": _pairs(_normalised(covariance)),
        "heads_used": [_heads_used(size, window) for size, window in enumerate(windows, 1)],
    }


def _heads_used(heads: int, losses: Sequence[float]) -> HeadsUsed:
    values = [perplexity(loss) for loss in losses]
    return HeadsUsed(heads, sum(values) / len(values), min(values), max(values))


def bin_sums(confidences: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Sums over tokens, by bin of confidence, float64 ``[..., BINS, 3]``: tokens, confidences, right guesses.

    Args:
        confidences: probability of the best guess, ``[..., n]``.
        correct: whether that guess is right, ``[..., n]``.
    """
    bins = (confidences.double() * BINS).ceil().long().clamp(1, BINS) - 1
    members = torch.nn.functional.one_hot(bins, BINS).double()
    values = torch.stack([torch.ones_like(confidences), confidences, correct.to(confidences)], -1)
    return members.mT @ values.double()


def calibration(sums: torch.Tensor) -> Calibration:
    """The calibration that [`bin_sums`] ``[BINS, 3]`` amount to."""
    counts, confidences, right = sums.unbind(-1)
    return Calibration(
        error=float((right - confidences).abs().sum() / counts.sum()),
        counts=[int(count) for count in counts],
        confidences=_defined(confidences / counts),
        accuracies=_defined(right / counts),
    )


def _normalised(products: torch.Tensor) -> torch.Tensor:
    """Products of vectors ``[M, M]`` to cosines; NaN where a vector is 0."""
    lengths = products.diagonal().sqrt()
    return products / torch.outer(lengths, lengths)


def _pairs(matrix: torch.Tensor) -> Pairs:
    different = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    different = different[~different.isnan()]
    return Pairs([_defined(row) for row in matrix], float(different.mean()) if len(different) else None)


def _defined(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


# ----------------------------------------------------------------------------------------------- representations


class LinearCKA:
    """Linear CKA between M representations of the same tokens (Kornblith et al. 2019, arXiv 1905.00414, section 3).

    ``||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` of centred features ``X, Y`` ``[tokens, hidden_size]``: 1 for
    representations that are equal up to rotation and one common scale. It means little unless the tokens are many
    more than the features: with few, any two representations look similar.

    Batches are added one at a time, each centred by its own mean and moved to the common one afterwards (the pairwise
    update of Chan et al. 1979), so that large means cost no precision. Memory: ``(M * hidden_size)**2`` float64.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, states: torch.Tensor) -> None:
        """Adds the states ``[M, n, hidden_size]`` of ``n >= 1`` tokens."""
        self._shape = states.shape[0], states.shape[2]
        states = states.float().transpose(0, 1).flatten(1)
        mean = states.mean(0, dtype=torch.float64)
        centred = states - mean.to(states)
        total = self.count + len(states)
        shift = mean - self.mean
        self.scatter += (centred.T @ centred).double() + torch.outer(shift, shift) * (self.count * len(states) / total)
        self.mean += shift * (len(states) / total)
        self.count = total

    def matrix(self) -> torch.Tensor:
        """CKA of every two representations, ``[M, M]``; NaN where one is the same for all tokens."""
        heads, size = self._shape
        products = self.scatter.view(heads, size, heads, size)
        return _normalised(torch.linalg.vector_norm(products, dim=(1, 3)).square().cpu())


# ----------------------------------------------------------------------------------------------------------- masks


def mask_overlap(model: MultiHeadForCausalLM, heads: Sequence[int]) -> MaskOverlap | None:
    """Overlaps of the masks of ``heads``; ``None`` where no two of them have masks."""
    masks = masks_by_head(model, heads)

    def overlaps(group_of: Callable[[list[str]], str | None]) -> dict[str, float]:
        groups = dict.fromkeys(group_of(name.split(".")) for head in masks for name in head)
        by_group = {
            group: head_overlap([{n: x for n, x in head.items() if group_of(n.split(".")) == group} for head in masks])
            for group in groups
            if group is not None
        }
        return {group: overlap for group, overlap in by_group.items() if overlap is not None}

    overall = head_overlap(masks)
    if overall is None:
        return None
    return MaskOverlap(
        overall=overall,
        by_kind=overlaps(lambda parts: parts[-1]),
        by_block=overlaps(lambda parts: f"block {parts[1]}" if parts[0] == "layers" else None),
        by_module=overlaps(".".join),
    )
