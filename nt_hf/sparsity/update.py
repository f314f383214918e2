"""One update of one mask: keep the best ``active - k`` weights, then grow ``k`` positions.

[`update_mask`] does both; [`keep_weights`] and [`grow_weights`] are its halves. These are pure functions on tensors:
nothing here knows modules or optimizers, and nothing draws from a random generator. Noise is hashed, see `selection`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from ..checks import check, check_fields, choice, integer, look_up, number
from ..models.masks import check_structure
from .criteria import DROP, GROW, REGROW, Chunk, Criterion, Drop, MaskedWeight
from .selection import (
    INT32_MAX,
    INT32_MIN,
    NoiseKey,
    Scores,
    chunks,
    hash_range,
    map_chunks,
    noise_key,
    restrict,
    select_top,
    select_top_rows,
    sort_keys,
    to_uniform,
)

logger = logging.getLogger(__name__)


def move_counts(
    active: int, size: int, drop_fraction: float, regrow: str = "allow", target: int | None = None
) -> tuple[int, int]:
    """How many weights an update keeps and grows: ``(kept, grown)``, ``kept + grown`` being the target.

    ``k = round(drop_fraction * active)`` weights (halves to even) give way to ``k`` grown ones. Where the target
    lies below ``active`` the difference is dropped as well, where it lies above it is grown as well. A tensor that is
    dense and stays dense has ``k = 0``; ``regrow="forbid"`` caps ``k`` at the number of inactive weights.

    Args:
        active: active weights before the update.
        size: of the tensor.
        drop_fraction: share of the active weights that move, in [0, 1].
        regrow: "allow" or "forbid".
        target: active weights after the update; ``None`` keeps their number.
    """
    target = active if target is None else target
    staying = min(active, target)
    k = round(drop_fraction * staying) if min(active, target) < size else 0
    if regrow == "forbid":
        k = max(0, min(k, size - active - (target - staying)))
    return staying - k, target - staying + k


def update_mask(
    mask: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor | None = None,
    *,
    drop_fraction: float,
    drop: str = "soft_magnitude",
    grow: str = "gradient",
    regrow: str = "allow",
    target: int | None = None,
    **fields: Any,
) -> torch.Tensor:
    """One topology update: keeps the best ``active - k`` weights, then grows ``k`` positions.

    The selection is exact; ties are broken by hashed noise, never by index. The kept weights are a subset of the
    active ones, without a ``target`` their number does not change, and the structure holds before and after. See
    [`move_counts`] for ``k``.

    Args:
        mask, weight, grad: the tensor as it is, see [`MaskedWeight`].
        drop_fraction: share of the active weights that move, in [0, 1].
        drop: a name in `DROP`.
        grow: a name in `GROW`.
        regrow: "allow": every position outside the kept ones is a candidate, also one just dropped, which then has
            not moved (RigL's rule); "forbid": only positions that were inactive before, ``k`` capped at their number.
        target: active weights after the update; ``None`` keeps their number.
        fields: further fields of [`MaskedWeight`], such as ``name``, ``seed`` and ``step``.

    Returns:
        The new bool mask, of the same shape.

    Raises:
        ValueError: an unknown name, a value out of range, tensors that do not match or do not have the structure, a
            missing gradient, or a weight or gradient that is not finite.
    """
    look_up(GROW, "grow", grow)
    state = MaskedWeight(mask, weight, grad, **fields)
    target = state.active if target is None else target
    (kept,) = keep_weights([state], [target], drop_fraction=drop_fraction, drop=drop, regrow=regrow)
    return grow_weights(state, kept, target, grow=grow, regrow=regrow)


@torch.no_grad()
def keep_weights(
    weights: Sequence[MaskedWeight],
    targets: Sequence[int],
    *,
    drop_fraction: float,
    drop: str = "soft_magnitude",
    regrow: str = "allow",
) -> list[torch.Tensor]:
    """The first half of an update: which active weights stay, a bool mask of each tensor.

    Args:
        weights: one tensor or several; several compete under a drop such as "global_magnitude".
        targets: active weights of each after the update, which decide with ``drop_fraction`` how many go, see
            [`move_counts`].
        drop_fraction, drop, regrow: see [`update_mask`].

    Raises:
        ValueError: see [`update_mask`].
    """
    method = look_up(DROP, "drop", drop)
    check("regrow", regrow, choice(REGROW))
    check("drop_fraction", drop_fraction, number("[0, 1]"))
    for weight, target in zip(weights, targets):
        _check(weight, target)
    moves = [move_counts(w.active, w.size, drop_fraction, regrow, target) for w, target in zip(weights, targets)]
    masks = [weight.mask.flatten() for weight in weights]
    if all(kept == weight.active for weight, (kept, _) in zip(weights, moves)):
        return [weight.mask.clone() for weight in weights]

    # First the weights that a structure or ``regrow`` makes stay, then the best of the others: as many as are missing.
    scores = [_score(weight, method.score, mask, "drop") for weight, mask in zip(weights, masks)]
    safe = [_unavoidable(*arguments, method, regrow) for arguments in zip(weights, scores, targets)]
    numbers = [kept - weight.count(mask)[0] for weight, (kept, _), mask in zip(weights, moves, safe)]
    if method.over_all:
        best = select_top(scores, sum(numbers), weights[0].reduce)
    elif method.by_sign:
        best = [_best_by_sign(*arguments) for arguments in zip(weights, scores, numbers)]
    else:
        best = [select_top([keys], k, weight.reduce)[0] for weight, keys, k in zip(weights, scores, numbers)]
    return [mask.logical_or_(also).view(weight.mask.shape) for weight, also, mask in zip(weights, safe, best)]


@torch.no_grad()
def grow_weights(
    weight: MaskedWeight, kept: torch.Tensor, target: int, *, grow: str = "gradient", regrow: str = "allow"
) -> torch.Tensor:
    """The second half of an update: the kept weights and the grown ones, ``target`` in all, as a bool mask.

    Args:
        weight: the tensor before the update.
        kept: bool, of its shape, from [`keep_weights`].
        target: active weights after the update; of a structure a multiple of its groups.
        grow, regrow: see [`update_mask`].

    Raises:
        ValueError: see [`update_mask`].
    """
    criteria = look_up(GROW, "grow", grow)
    new, candidates = kept.flatten().clone(), ~(kept if regrow == "allow" else weight.mask).flatten()
    for i, criterion in enumerate(criteria):
        share = 1.0 if i == len(criteria) - 1 else 1 - weight.random_share
        k = weight.missing(new, target)
        k = round(share * k) if isinstance(k, int) else _round_at_random(weight, share * k)
        scores = _score(weight, criterion, candidates & ~new if i else candidates, f"grow {i}" if i else "grow")
        new |= _best(weight, scores, k)
    return new.view(weight.mask.shape)


@torch.no_grad()
def random_mask(
    shape: Sequence[int],
    active: int,
    *,
    seed: int,
    name: str = "",
    device: torch.device | str | None = None,
    structure: str = "unstructured",
    transposed: bool = False,
) -> torch.Tensor:
    """Bool mask of ``shape`` with exactly ``active`` positions set, drawn uniformly among those of the structure.

    Args:
        shape: of the weight.
        active: number of positions to set, from 0 to the size; of a structure a multiple of its groups.
        seed: of the hashed noise; with ``name`` it determines the mask.
        name: canonical name of the parameter, so that tensors of one shape get different masks.
        device: where the mask is built; it is the same on every device.
        structure, transposed: see [`MaskedWeight`].

    Raises:
        ValueError: ``active`` outside its range.
    """
    empty = torch.zeros(tuple(shape), dtype=torch.bool, device=device)
    weight = MaskedWeight(empty, empty, name=name, seed=seed, structure=structure, transposed=transposed)
    check("active", active, integer(0, empty.numel()))
    return grow_weights(weight, empty, active, grow="random")


@torch.no_grad()
def best_scores(
    scores: Mapping[str, torch.Tensor],
    active: int,
    *,
    seed: int,
    structure: str = "unstructured",
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """Bool masks of the ``active`` largest scores over all tensors, of a structure those of each group of one tensor.

    Ties are broken by noise of ``seed``.
    """
    tensors = [
        Scores(sort_keys(score.flatten().to(torch.float32, copy=True)), noise_key(seed, 0, name, "saliency"))
        for name, score in scores.items()
    ]
    if structure == "unstructured":
        best = select_top(tensors, active)
    else:
        ((name, score),) = scores.items()
        weight = MaskedWeight(score.bool(), score, name=name, structure=structure, transposed=transposed)
        best = [_best(weight, tensors[0], active // weight.group_count)]
    return {name: mask.view(score.shape) for (name, score), mask in zip(scores.items(), best)}


def _score(weight: MaskedWeight, criterion: Criterion, candidates: torch.Tensor, purpose: str) -> Scores:
    """The sort keys of a criterion among the candidates, bool ``[n]``."""
    key = noise_key(weight.seed, weight.step, weight.name, purpose)
    tensors = {"weight": weight.weight, "grad": weight.grad, "momentum": weight.momentum}
    flat = {name: tensor.detach().flatten() for name, tensor in tensors.items() if tensor is not None}
    keys = torch.empty(candidates.numel(), dtype=torch.int32, device=candidates.device)
    keys_of = _fused_keys if keys.is_cuda else _keys

    def score(start: int, stop: int) -> None:
        keys[start:stop] = keys_of(criterion, weight, flat, key, start, stop, candidates)

    map_chunks(score, chunks(keys, weight.offset))
    return Scores(keys, noise_key(weight.seed, weight.step, weight.name, purpose + " ties"), weight.offset)


def _keys(
    criterion: Criterion,
    weight: MaskedWeight,
    flat: Mapping[str, torch.Tensor],
    key: NoiseKey,
    start: int,
    stop: int,
    candidates: torch.Tensor,
) -> torch.Tensor:
    return sort_keys(criterion(Chunk(weight, flat, key, start, stop)), candidates[start:stop])


def _fused_keys(
    criterion: Criterion, weight: MaskedWeight, flat: Mapping[str, torch.Tensor], key: NoiseKey, *arguments: Any
):
    """[`_keys`] in one kernel: one after another, its forty small operations would be bound by a GPU's memory."""
    # As tensors, numbers that change at every update do not compile anew.
    numbers = tuple(torch.tensor(number, dtype=torch.int32, device=weight.weight.device) for number in key)
    try:
        return _compiled_keys()(criterion, weight, flat, numbers, *arguments)
    except RuntimeError as error:
        keys = _keys(criterion, weight, flat, key, *arguments)
        _warn_once(f"torch.compile failed ({type(error).__name__}): topology updates take several times as long")
        return keys


@cache
def _compiled_keys() -> Callable[..., torch.Tensor]:
    return torch.compile(_keys, dynamic=True)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _unavoidable(weight: MaskedWeight, scores: Scores, target: int, method: Drop, regrow: str) -> torch.Tensor:
    """Weights that stay whatever the others score: bool ``[n]``. They, and what cannot stay, then rank last.

    Weights compete beyond their group, but a group must reach its target: it cannot keep more than that, and without
    regrowth it cannot lose more weights than it has inactive positions to grow.
    """
    # An unstructured tensor that competes with no other is one group, and the number it keeps obeys both limits.
    if weight.structure == "unstructured" and not method.over_all:
        return torch.zeros_like(scores.keys, dtype=torch.bool)
    target, active = target // weight.group_count, weight.active // weight.group_count
    if target < active:
        restrict(scores.keys, _best(weight, scores, target))
    irreplaceable = max(0, target - (weight.group_length - active)) if regrow == "forbid" else 0
    safe = _best(weight, scores, irreplaceable)
    restrict(scores.keys, ~safe)
    return safe


def _best_by_sign(weight: MaskedWeight, scores: Scores, k: int) -> torch.Tensor:
    """The ``k`` best candidates by magnitude, positive and negative ones each in proportion; zeros go first."""
    keys, flat = scores.keys, weight.weight.detach().flatten()
    candidates = keys > INT32_MIN
    positive, negative = weight.count(candidates & (flat > 0), candidates & (flat < 0))
    zeros = max(0, k - positive - negative)
    dropped = positive + negative - (k - zeros)
    from_positive = round(dropped * positive / max(1, positive + negative))

    def invert_negative(start: int, stop: int) -> None:
        keys[start:stop].bitwise_xor_((flat[start:stop] < 0).to(torch.int32).neg_())

    # One ranking serves both signs. Keys of magnitudes are from 0; with their bits inverted, those of negative weights
    # are below 0, the largest magnitude last. So the positive weights are at the top, zeros after them.
    map_chunks(invert_negative, chunks(keys))
    restrict(keys, candidates)
    (chosen,) = select_top([scores], positive - from_positive + zeros, weight.reduce)
    # All bits inverted, the negative weights are at the top, the largest magnitude first.
    restrict(keys.bitwise_not_(), candidates)
    return chosen.logical_or_(select_top([scores], negative - (dropped - from_positive), weight.reduce)[0])


def _best(weight: MaskedWeight, scores: Scores, k: int | torch.Tensor) -> torch.Tensor:
    """The best ``k`` of each group, a number or int64 ``[groups]``: bool ``[n]``."""
    if weight.structure == "unstructured":
        return select_top([scores], k, weight.reduce)[0]
    keys, end = weight.groups(scores.keys), scores.offset + len(scores.keys)
    dtype = torch.int32 if end <= INT32_MAX else torch.int64
    index = weight.groups(torch.arange(scores.offset, end, dtype=dtype, device=keys.device))
    rows = keys.reshape(-1, keys.shape[-1])
    counts = torch.full((len(rows),), k, device=rows.device) if isinstance(k, int) else k
    chosen = torch.empty_like(scores.keys, dtype=torch.bool)
    weight.groups(chosen).copy_(select_top_rows(rows, counts, scores.noise, index.reshape(rows.shape)).view(keys.shape))
    return chosen


def _round_at_random(weight: MaskedWeight, counts: torch.Tensor) -> torch.Tensor:
    """Rounds ``[groups]`` up with the probability of their fractions: groups that miss one weight share it too."""
    first = weight.offset // weight.group_length
    key = noise_key(weight.seed, weight.step, weight.name, "share")
    chance = to_uniform(hash_range(first, first + len(counts), key, counts.device))
    return (counts + chance.double()).floor().long()  # in fp32 a chance near 1 would round up whole numbers


# ------------------------------------------------------------------------------------------------------- errors


def _check(weight: MaskedWeight, target: int) -> None:
    label = weight.name or "the weight"
    check_fields(weight)
    if weight.mask.dtype != torch.bool or weight.mask.shape != weight.weight.shape:
        raise ValueError(
            f"the mask of {label}: is {weight.mask.dtype} {list(weight.mask.shape)}; "
            f"accepted is torch.bool {list(weight.weight.shape)}"
        )
    check("target", target, integer(0, weight.size))
    try:
        check_structure(weight.mask, weight.structure, weight.transposed)
    except ValueError as error:
        raise ValueError(f"the mask of {label}: {error}") from None
    if weight.structure != "unstructured" and target % weight.group_count:
        raise ValueError(
            f"target={target}: accepted with structure={weight.structure} is a multiple of the {weight.group_count} "
            f"groups of {label}"
        )
    for kind, tensor in (("weight", weight.weight), ("gradient", weight.grad), ("momentum", weight.momentum)):
        if tensor is None:
            continue
        if tensor.shape != weight.weight.shape:
            raise ValueError(f"the {kind} of {label}: is {list(tensor.shape)}; accepted is {list(weight.weight.shape)}")
        # The extremes of a tensor with NaN are NaN: one pass and no temporaries.
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.detach().aminmax()):
            raise ValueError(f"the {kind} of {label}: not finite everywhere; accepted are finite numbers")
