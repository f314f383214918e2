"""Sparse topologies as pure functions on tensors: how many weights each tensor keeps, which drop, which grow.

One update of one tensor is [`update_mask`]: **keep** the best ``active - k`` weights by a drop score
([`keep_weights`]), then **grow** ``k`` positions by a grow score ([`grow_weights`]). Nothing here knows modules or
optimizers, and nothing draws from a random generator: noise is hashed, see `selection`.

A new criterion is one function from a [`Stretch`] to scores and one line in `DROP` or `GROW`; a new distribution is
one function to a share and one line in `DISTRIBUTIONS`.
"""

import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import torch

from ..models.masks import check_structure, groups_of
from .selection import (
    INT32_MAX,
    INT32_MIN,
    NoiseKey,
    Part,
    Reduce,
    count_set,
    hash_range,
    noise_key,
    only,
    select_top,
    select_top_rows,
    sort_keys,
    stretches,
    sweep,
    to_uniform,
    whole,
)

logger = logging.getLogger(__name__)

REGROW = ("allow", "forbid")


# ---------------------------------------------------------------------------------------------------- densities


def uniform(shape: Sequence[int], uses: int) -> int:
    """Share of the active weights in proportion to the tensor's size: the same density everywhere."""
    return math.prod(shape)


def er(shape: Sequence[int], uses: int) -> int:
    """Erdős–Rényi: density in proportion to ``(n_in + n_out) / (n_in * n_out)`` (Mocanu et al. 2018)."""
    return sum(shape[:2]) * math.prod(shape[2:])


def erk(shape: Sequence[int], uses: int) -> int:
    """Erdős–Rényi-Kernel: as `er`, with the kernel's height and width in both sums (Evci et al. 2020, section 3).

    The density is in proportion to ``sum(shape) / prod(shape)``, so the active weights are to ``sum(shape)``. Of a
    two-dimensional weight it equals `er`.
    """
    return sum(shape)


def flops(shape: Sequence[int], uses: int) -> Fraction | float:
    """As many multiplications in every tensor: active weights in proportion to 1 / (how often each is used).

    A tensor that costs none, such as an embedding, stays dense.
    """
    return Fraction(1, uses) if uses else math.inf


Distribution = Callable[[Sequence[int], int], int | float | Fraction]
DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "er": er, "erk": erk, "flops": flops}


def active_counts(
    shapes: Mapping[str, Sequence[int]],
    density: float,
    distribution: str = "erk",
    fixed: Mapping[str, float] | None = None,
    uses: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Distributes ``round(density * total size)`` active weights over tensors, exactly.

    A tensor whose share exceeds its size stays dense and the rest is rescaled, until all fit. No tensor is left without
    an active weight as long as the budget holds one for each.

    Args:
        shapes: the shape of each tensor by name, output dimension first, as torch stores weights.
        density: share of active weights among all, in (0, 1].
        distribution: a name in `DISTRIBUTIONS`: "uniform", "er", "erk" or "flops".
        fixed: densities in (0, 1] of tensors that are not to follow the distribution; the rest takes what remains.
        uses: for "flops", how often a forward pass multiplies by each weight of a tensor; 1 where it is not given.

    Returns:
        The number of active weights of each tensor, in the order of ``shapes``.

    Raises:
        ValueError: a density outside (0, 1], an unknown distribution, ``fixed`` names no tensor of ``shapes``, or
            leaves a remainder that the other tensors cannot hold.
    """
    share_of = look_up(DISTRIBUTIONS, "distribution", distribution)
    _check_density("density", density)
    fixed, uses = fixed or {}, uses or {}
    for name, value in fixed.items():
        _check_density(f"densities: the density of {name}", value)
        if name not in shapes:
            raise ValueError(f"densities: {name} is no tensor among {', '.join(shapes) or 'none'}")

    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(sizes.values()))
    counts = {name: max(1, round(fixed[name] * sizes[name])) for name in sizes if name in fixed}
    shares = {name: share_of(shape, uses.get(name, 1)) for name, shape in shapes.items() if name not in fixed}
    budget = total - sum(counts.values())
    room = {name: sizes[name] for name in shares}
    if shares and not 0 < budget <= sum(room.values()):
        raise ValueError(
            f"densities: the fixed groups take {sum(counts.values())} of the {total} active weights of density "
            f"{density:g}, which leaves {budget} for the {sum(room.values())} other weights; accepted: 1 to "
            f"{sum(room.values())}"
        )
    if not shares and abs(budget) > len(counts):
        raise ValueError(
            f"densities: the groups cover every weight and give density "
            f"{sum(counts.values()) / sum(sizes.values()):g}; density must be the same, it is {density:g}"
        )
    if not shares:  # settle what rounding each group left over
        sign = 1 if budget > 0 else -1
        able = [name for name in counts if 1 <= counts[name] + sign <= sizes[name]]
        for name in sorted(able, key=sizes.__getitem__, reverse=True)[: abs(budget)]:
            counts[name] += sign
    counts |= allocate(budget, shares, room) if shares else {}

    adjustable = [name for name in counts if name not in fixed]
    for name in adjustable:
        richest = max(adjustable, key=counts.__getitem__)
        if counts[name] == 0 and counts[richest] > 1:
            counts[name] += 1
            counts[richest] -= 1
    return {name: counts[name] for name in shapes}


def allocate(budget: int, shares: Mapping[str, float | Fraction], room: Mapping[str, int]) -> dict[str, int]:
    """Divides ``budget`` in proportion to ``shares``, nobody getting more than its ``room``; exact in total.

    What does not fit goes to the others in the same proportion; an infinite share takes all the room it has. Fractions
    are settled by largest remainder, in exact arithmetic, so the result does not depend on the platform.

    Args:
        budget: from 0 to the sum of ``room``.
        shares: at least 0, by name. Where those with room have none, they share equally.
        room: at least 0, by name.

    Raises:
        ValueError: infinite shares ask for more than the budget, or there is not enough room.
    """
    if not 0 <= budget <= sum(room.values()):
        raise ValueError(f"budget is {budget}; accepted: 0 to {sum(room.values())}, the room there is")
    given = {name: room[name] for name, share in shares.items() if share == math.inf}
    budget -= sum(given.values())
    if budget < 0:
        raise ValueError(
            f"{', '.join(given)} cost nothing, would stay dense and need {-budget} more active weights than there are; "
            "accepted: a higher density, or to exclude them or give them one by densities"
        )
    open_shares = {name: Fraction(share) for name, share in shares.items() if name not in given}
    while budget:
        open_shares = {name: share for name, share in open_shares.items() if given.get(name) is None}
        if not any(open_shares.values()):
            open_shares = {name: Fraction(1) for name in open_shares}
        whole_share = sum(open_shares.values())
        full = [name for name, share in open_shares.items() if budget * share >= room[name] * whole_share]
        if not full:
            break
        for name in full:
            given[name] = room[name]
            budget -= room[name]
    else:
        return {name: given.get(name, 0) for name in shares}
    exact = {name: budget * share / whole_share for name, share in open_shares.items()}
    given |= {name: math.floor(value) for name, value in exact.items()}
    left_over = budget - sum(given[name] for name in exact)
    for name in sorted(exact, key=lambda name: exact[name] % 1, reverse=True)[:left_over]:
        given[name] += 1
    return {name: given[name] for name in shares}


def structured_counts(
    counts: Mapping[str, int], shapes: Mapping[str, Sequence[int]], groups: Mapping[str, int]
) -> dict[str, int]:
    """The nearest counts that give every group of a tensor as many, with a total as near as possible.

    Args:
        counts: wanted active weights by tensor.
        shapes: of the tensors.
        groups: how many groups of equal count each tensor has: its output units for constant fan-in.

    Raises:
        ValueError: a group would be left without an active weight.
    """
    each = {name: count // groups[name] for name, count in counts.items()}
    missing = sum(counts.values()) - sum(each[name] * groups[name] for name in each)
    for name in sorted(counts, key=lambda name: counts[name] % groups[name] / groups[name], reverse=True):
        if groups[name] <= 2 * missing and each[name] * groups[name] < math.prod(shapes[name]):
            each[name] += 1
            missing -= groups[name]
    for name, value in each.items():
        if value < 1:
            raise ValueError(
                f"the density of {name} {list(shapes[name])} leaves {counts[name]} weights for {groups[name]} groups; "
                f"accepted: at least one each, density {groups[name] / math.prod(shapes[name]):.4g}"
            )
    return {name: value * groups[name] for name, value in each.items()}


def falling_counts(
    now: Mapping[str, int], first: Mapping[str, int], last: Mapping[str, int], progress: float
) -> dict[str, int]:
    """Counts ``progress`` of the way from the first to the last ones, exact in total, none above what it is now.

    Rounding each time anew would let single weights wander from tensor to tensor.

    Args:
        now: counts so far, each between ``first`` and ``last``.
        first, last: counts at the begin and, nowhere larger, at the end of a density schedule.
        progress: from 0 to 1.
    """
    exact = {name: first[name] + Fraction(progress) * (last[name] - first[name]) for name in first}
    surplus = max(0, sum(now.values()) - round(sum(exact.values())))
    room = {name: now[name] - last[name] for name in now}
    fallen = allocate(surplus, {name: max(Fraction(0), now[name] - exact[name]) for name in now}, room)
    return {name: now[name] - fallen[name] for name in now}


# ----------------------------------------------------------------------------------------------------- criteria


@dataclass(frozen=True)
class SparseWeight:
    """One weight tensor at an update: all that criteria may look at, and what its noise depends on.

    Attributes:
        mask: bool, any shape; True where a weight is active.
        weight: of the mask's shape, any floating dtype; scores are computed in fp32.
        grad: its dense gradient; ``None`` where no criterion needs it.
        momentum: an average of its dense gradients; ``None`` where no criterion needs it.
        name: canonical name of the parameter.
        seed, step: of the run.
        exponent: of soft magnitude.
        mest_lambda: of MEST.
        random_share: of "gradient_random".
        structure: "unstructured", "constant_fan_in" or "N:M".
        transposed: whether the input dimension comes first.
        offset: flat index of the first element, when this is one shard of a tensor, split along its first dimension.
        reduce: sums counts over the shards.
        size, active: elements and active weights of the tensor, over all shards; counted here.
    """

    mask: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor | None = None
    momentum: torch.Tensor | None = None
    name: str = ""
    seed: int = 0
    step: int = 0
    exponent: float = 3.0
    mest_lambda: float = 1.0
    random_share: float = 0.5
    structure: str = "unstructured"
    transposed: bool = False
    offset: int = 0
    reduce: Reduce = whole
    size: int = field(init=False)
    active: int = field(init=False)

    def __post_init__(self) -> None:
        all_of_it = torch.tensor(self.mask.numel(), device=self.mask.device)
        size, active = self.reduce(torch.stack([all_of_it, count_set(self.mask)])).tolist()
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "active", active)

    def count(self, *masks: torch.Tensor) -> list[int]:
        """How many are set in each of some masks, over all shards."""
        return self.reduce(torch.stack([count_set(mask) for mask in masks])).tolist()

    @property
    def group_length(self) -> int:
        """Weights of one group of the structure; unstructured, the tensor is one group."""
        return self.size if self.structure == "unstructured" else self.groups(self.mask).shape[-1]

    @property
    def group_count(self) -> int:
        """Groups of the structure, over all shards."""
        return self.size // max(1, self.group_length)

    def groups(self, tensor: torch.Tensor) -> torch.Tensor:
        """View of a tensor of the weight's size by the structure's groups, ``[..., length]``."""
        return groups_of(tensor.view(self.mask.shape), self.structure, self.transposed)

    def missing(self, mask: torch.Tensor, target: int) -> int | torch.Tensor:
        """How many weights a mask is short of ``target``: int64 ``[groups]``, or one number if unstructured."""
        if self.structure == "unstructured":
            return target - self.count(mask)[0]
        return target // self.group_count - self.groups(mask).sum(-1).flatten()


class Stretch:
    """What a criterion sees: a stretch of a flattened tensor, every field fp32 ``[n]`` and free to overwrite.

    Attributes:
        weight: the weights.
        grad: their gradients.
        momentum: the average of their gradients. Where there is none, a `ValueError` says so, as for ``grad``.
        noise: uniform numbers in (0, 1), a hash of the element's place.
        exponent, mest_lambda: see [`SparseWeight`].
    """

    def __init__(self, of: SparseWeight, flat: Mapping[str, torch.Tensor], key: NoiseKey, start: int, stop: int):
        self._of, self._flat, self._key, self._start, self._stop = of, flat, key, start, stop
        self.exponent, self.mest_lambda = of.exponent, of.mest_lambda

    def _part(self, name: str) -> torch.Tensor:
        if name not in self._flat:
            what = {"grad": "gradient"}.get(name, name)
            raise ValueError(f"this criterion needs the {what} of {self._of.name or 'the weight'}; it has none")
        return self._flat[name][self._start : self._stop].to(torch.float32, copy=True)

    @property
    def weight(self) -> torch.Tensor:
        return self._part("weight")

    @property
    def grad(self) -> torch.Tensor:
        return self._part("grad")

    @property
    def momentum(self) -> torch.Tensor:
        return self._part("momentum")

    @property
    def noise(self) -> torch.Tensor:
        start, stop = self._of.offset + self._start, self._of.offset + self._stop
        return to_uniform(hash_range(start, stop, self._key, self._of.weight.device))


Criterion = Callable[[Stretch], torch.Tensor]


def magnitude(at: Stretch) -> torch.Tensor:
    """Keeps the largest ``|w|`` (Zhu & Gupta 2017; the drop of RigL, Evci et al. 2020)."""
    return at.weight.abs_()


def soft_magnitude(at: Stretch) -> torch.Tensor:
    """Keeps weights drawn without replacement with probability in proportion to ``|w| ** exponent``.

    The drop of NeuroTrails (Grooten et al. 2025, arXiv 2505.17909). Drawn as an exponential race: with
    ``E ~ Exp(1)`` the ``m`` largest ``exponent * log|w| - log E`` are such a sample (Efraimidis & Spirakis 2006,
    algorithm A; ``-log E`` is Gumbel noise). Zeros score lowest.
    """
    # E = -log(1 - u), not -log(u): u is finest near 0, where E decides whether a small weight survives.
    race = at.noise.neg_().log1p_().neg_().log_()
    return at.weight.abs_().log_().mul_(at.exponent).sub_(race)


def taylor(at: Stretch) -> torch.Tensor:
    """Keeps the largest first-order effect on the loss, ``|w * g|`` (Molchanov et al. 2017)."""
    return at.weight.mul_(at.grad).abs_()


def mest(at: Stretch) -> torch.Tensor:
    """Keeps the largest ``|w| + lambda * |g|`` (MEST, Yuan et al. 2021)."""
    return at.weight.abs_().add_(at.grad.abs_(), alpha=at.mest_lambda)


def gradient(at: Stretch) -> torch.Tensor:
    """Grows where the dense gradient ``|g|`` is largest (RigL, Evci et al. 2020, section 3)."""
    return at.grad.abs_()


def momentum(at: Stretch) -> torch.Tensor:
    """Grows where the averaged dense gradient is largest (SNFS, Dettmers & Zettlemoyer 2019)."""
    return at.momentum.abs_()


def random(at: Stretch) -> torch.Tensor:
    """Grows anywhere, uniformly (SET, Mocanu et al. 2018)."""
    return at.noise


class Drop(NamedTuple):
    """A drop method: what scores the weights, and among which they compete.

    Attributes:
        score: the best are kept.
        by_sign: positive and negative weights each lose their share of the drops.
        over_all: the weights of all tensors compete; each tensor then grows as many as it lost.
    """

    score: Criterion
    by_sign: bool = False
    over_all: bool = False


DROP: dict[str, Drop] = {
    "magnitude": Drop(magnitude),
    "soft_magnitude": Drop(soft_magnitude),
    # Drops the smallest positive and the largest negative weights (SET, Mocanu et al. 2018).
    "set": Drop(magnitude, by_sign=True),
    "taylor": Drop(taylor),
    "mest": Drop(mest),
    # One threshold for the whole network (Han et al. 2015 prune so; as a drop: DSR, Mostafa & Wang 2019).
    "global_magnitude": Drop(magnitude, over_all=True),
}

# One criterion, or two that grow one after the other, the second one the ``random_share``.
GROW: dict[str, tuple[Criterion, ...]] = {
    "gradient": (gradient,),
    "random": (random,),
    "momentum": (momentum,),
    # The reference code of NeuroTrails has this mixture as "mix_growth".
    "gradient_random": (gradient, random),
}

REDISTRIBUTE = ("none", "gradient", "momentum")


# --------------------------------------------------------------------------------------------------- the update


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
        mask, weight, grad: the tensor as it is, see [`SparseWeight`].
        drop_fraction: share of the active weights that move, in [0, 1].
        drop: a name in `DROP`.
        grow: a name in `GROW`.
        regrow: "allow": every position outside the kept ones is a candidate, also one just dropped, which then has
            not moved (RigL's rule); "forbid": only positions that were inactive before, ``k`` capped at their number.
        target: active weights after the update; ``None`` keeps their number.
        fields: further fields of [`SparseWeight`], such as ``name``, ``seed`` and ``step``.

    Returns:
        The new bool mask, of the same shape.

    Raises:
        ValueError: an unknown name, a value out of range, tensors that do not match or do not have the structure, a
            missing gradient, or a weight or gradient that is not finite.
    """
    look_up(GROW, "grow", grow)
    state = SparseWeight(mask, weight, grad, **fields)
    target = state.active if target is None else target
    (kept,) = keep_weights([state], [target], drop_fraction=drop_fraction, drop=drop, regrow=regrow)
    return grow_weights(state, kept, target, grow=grow, regrow=regrow)


@torch.no_grad()
def keep_weights(
    weights: Sequence[SparseWeight],
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
    look_up(dict.fromkeys(REGROW), "regrow", regrow)
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction is {drop_fraction}; accepted: a number in [0, 1]")
    for weight, target in zip(weights, targets):
        _check(weight, target)
    moves = [move_counts(w.active, w.size, drop_fraction, regrow, target) for w, target in zip(weights, targets)]
    masks = [weight.mask.flatten() for weight in weights]
    if all(kept == weight.active for weight, (kept, _) in zip(weights, moves)):
        return [weight.mask.clone() for weight in weights]

    parts = [_score(weight, method.score, mask, "drop") for weight, mask in zip(weights, masks)]
    safe = [_unavoidable(*each, method, regrow) for each in zip(weights, parts, targets)]
    wanted = [kept - weight.count(sure)[0] for weight, (kept, _), sure in zip(weights, moves, safe)]
    if method.over_all:
        best = select_top(parts, sum(wanted), weights[0].reduce)
    elif method.by_sign:
        best = [_best_by_sign(*each) for each in zip(weights, parts, wanted)]
    else:
        best = [select_top([part], k, weight.reduce)[0] for weight, part, k in zip(weights, parts, wanted)]
    return [more.logical_or_(sure).view(weight.mask.shape) for weight, sure, more in zip(weights, safe, best)]


@torch.no_grad()
def grow_weights(
    weight: SparseWeight, kept: torch.Tensor, target: int, *, grow: str = "gradient", regrow: str = "allow"
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
        part = _score(weight, criterion, candidates & ~new if i else candidates, f"grow {i}" if i else "grow")
        new |= _best(weight, part, k)
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
        structure, transposed: see [`SparseWeight`].

    Raises:
        ValueError: ``active`` outside its range.
    """
    empty = torch.zeros(tuple(shape), dtype=torch.bool, device=device)
    weight = SparseWeight(empty, empty, name=name, seed=seed, structure=structure, transposed=transposed)
    if not 0 <= active <= empty.numel():
        raise ValueError(f"active is {active} for a tensor of shape {list(shape)}; accepted: 0 to {empty.numel()}")
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
    parts = [
        Part(sort_keys(score.flatten().to(torch.float32, copy=True)), noise_key(seed, 0, name, "saliency"))
        for name, score in scores.items()
    ]
    if structure == "unstructured":
        best = select_top(parts, active)
    else:
        ((name, score),) = scores.items()
        weight = SparseWeight(score.bool(), score, name=name, structure=structure, transposed=transposed)
        best = [_best(weight, parts[0], active // weight.group_count)]
    return {name: mask.view(score.shape) for (name, score), mask in zip(scores.items(), best)}


def redistribute(
    kept: Mapping[str, int], room: Mapping[str, int], total: int, shares: Mapping[str, float]
) -> dict[str, int]:
    """Targets of all tensors when what grows is divided in proportion to ``shares`` (Dettmers & Zettlemoyer 2019).

    Args:
        kept: weights that each tensor keeps.
        room: positions that each may grow.
        total: active weights of all tensors after the update.
        shares: mean ``|momentum|`` or ``|gradient|`` of each tensor's active weights.

    Returns:
        Targets with ``sum == total`` and ``kept <= target <= kept + room``.
    """
    grown = allocate(total - sum(kept.values()), shares, room)
    return {name: kept[name] + grown[name] for name in kept}


def _score(weight: SparseWeight, criterion: Criterion, candidates: torch.Tensor, purpose: str) -> Part:
    """The sort keys of a criterion among the candidates, bool ``[n]``."""
    key = noise_key(weight.seed, weight.step, weight.name, purpose)
    tensors = {"weight": weight.weight, "grad": weight.grad, "momentum": weight.momentum}
    flat = {name: tensor.detach().flatten() for name, tensor in tensors.items() if tensor is not None}
    keys = torch.empty(candidates.numel(), dtype=torch.int32, device=candidates.device)
    keys_of = _fused_keys if keys.is_cuda else _keys

    def score(start: int, stop: int) -> None:
        keys[start:stop] = keys_of(criterion, weight, flat, key, start, stop, candidates)

    sweep(score, stretches(keys, weight.offset))
    return Part(keys, noise_key(weight.seed, weight.step, weight.name, purpose + " ties"), weight.offset)


def _keys(
    criterion: Criterion,
    weight: SparseWeight,
    flat: Mapping[str, torch.Tensor],
    key: NoiseKey,
    start: int,
    stop: int,
    candidates: torch.Tensor,
) -> torch.Tensor:
    return sort_keys(criterion(Stretch(weight, flat, key, start, stop)), candidates[start:stop])


def _fused_keys(
    criterion: Criterion, weight: SparseWeight, flat: Mapping[str, torch.Tensor], key: NoiseKey, *rest: Any
):
    """[`_keys`] in one kernel: one after another, its forty small operations would be bound by a GPU's memory."""
    # As tensors, numbers that change at every update do not compile anew.
    numbers = tuple(torch.tensor(number, dtype=torch.int32, device=weight.weight.device) for number in key)
    try:
        return _compiled_keys()(criterion, weight, flat, numbers, *rest)
    except RuntimeError as error:
        keys = _keys(criterion, weight, flat, key, *rest)
        _warn_once(f"torch.compile failed ({type(error).__name__}): topology updates take several times as long")
        return keys


@cache
def _compiled_keys() -> Callable[..., torch.Tensor]:
    return torch.compile(_keys, dynamic=True)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _unavoidable(weight: SparseWeight, part: Part, target: int, method: Drop, regrow: str) -> torch.Tensor:
    """Weights that stay whatever the others score: bool ``[n]``; takes them, and what cannot stay, off the part.

    Where the target of a group sinks only its best can stay. Without regrowth a group that lost more weights than it
    has inactive ones could not be filled. A tensor that competes with itself alone is one group, and the number it
    keeps sees to both.
    """
    if weight.structure == "unstructured" and not method.over_all:
        return torch.zeros_like(part.keys, dtype=torch.bool)
    goal, now = target // weight.group_count, weight.active // weight.group_count
    if goal < now:
        only(part.keys, _best(weight, part, goal))
    sure = max(0, goal - (weight.group_length - now)) if regrow == "forbid" else 0
    safe = _best(weight, part, sure)
    only(part.keys, ~safe)
    return safe


def _best_by_sign(weight: SparseWeight, part: Part, k: int) -> torch.Tensor:
    """The ``k`` best candidates by magnitude, positive and negative ones each in proportion; zeros go first."""
    keys, flat = part.keys, weight.weight.detach().flatten()
    candidates = keys > INT32_MIN
    positive, negative = weight.count(candidates & (flat > 0), candidates & (flat < 0))
    zeros = max(0, k - positive - negative)
    dropped = positive + negative - (k - zeros)
    from_positive = round(dropped * positive / max(1, positive + negative))

    def turn(start: int, stop: int) -> None:
        keys[start:stop].bitwise_xor_((flat[start:stop] < 0).to(torch.int32).neg_())

    # Keys of magnitudes are from 0: inverting their bits puts negative weights behind, the largest last.
    sweep(turn, stretches(keys))
    only(keys, candidates)
    (chosen,) = select_top([part], positive - from_positive + zeros, weight.reduce)
    only(keys.bitwise_not_(), candidates)
    return chosen.logical_or_(select_top([part], negative - (dropped - from_positive), weight.reduce)[0])


def _best(weight: SparseWeight, part: Part, k: int | torch.Tensor) -> torch.Tensor:
    """The best ``k`` of each group, a number or int64 ``[groups]``: bool ``[n]``."""
    if weight.structure == "unstructured":
        return select_top([part], k, weight.reduce)[0]
    keys, end = weight.groups(part.keys), part.offset + len(part.keys)
    dtype = torch.int32 if end <= INT32_MAX else torch.int64
    index = weight.groups(torch.arange(part.offset, end, dtype=dtype, device=keys.device))
    rows = keys.reshape(-1, keys.shape[-1])
    each = torch.full((len(rows),), k, device=rows.device) if isinstance(k, int) else k
    chosen = torch.empty_like(part.keys, dtype=torch.bool)
    weight.groups(chosen).copy_(select_top_rows(rows, each, part.noise, index.reshape(rows.shape)).view(keys.shape))
    return chosen


def _round_at_random(weight: SparseWeight, counts: torch.Tensor) -> torch.Tensor:
    """Rounds ``[groups]`` up with the probability of their fractions: groups that miss one weight share it too."""
    first = weight.offset // weight.group_length
    key = noise_key(weight.seed, weight.step, weight.name, "share")
    chance = to_uniform(hash_range(first, first + len(counts), key, counts.device))
    return (counts + chance.double()).floor().long()  # in fp32 a chance near 1 would round up whole numbers


# ------------------------------------------------------------------------------------------------------- errors


def _check(weight: SparseWeight, target: int) -> None:
    label = weight.name or "the weight"
    for name, low, high in (("exponent", 0, math.inf), ("mest_lambda", 0, math.inf), ("random_share", 0, 1)):
        value = getattr(weight, name)
        if not low <= value <= high or (name == "exponent" and value == 0):
            accepted = {"exponent": "a number above 0", "mest_lambda": "a number from 0"}.get(
                name, "a number in [0, 1]"
            )
            raise ValueError(f"{name} is {value}; accepted: {accepted}")
    if weight.mask.dtype != torch.bool or weight.mask.shape != weight.weight.shape:
        raise ValueError(
            f"the mask of {label} is {weight.mask.dtype} {list(weight.mask.shape)}; "
            f"accepted: torch.bool {list(weight.weight.shape)}"
        )
    if not 0 <= target <= weight.size:
        raise ValueError(f"target is {target} for {weight.size} weights; accepted: 0 to {weight.size}")
    try:
        check_structure(weight.mask, weight.structure, weight.transposed)
    except ValueError as error:
        raise ValueError(f"the mask of {label}: {error}") from None
    if weight.structure != "unstructured" and target % weight.group_count:
        raise ValueError(
            f"target is {target} for {label}; structure {weight.structure} takes multiples of its "
            f"{weight.group_count} groups"
        )
    for kind, tensor in (("weight", weight.weight), ("gradient", weight.grad), ("momentum", weight.momentum)):
        if tensor is None:
            continue
        if tensor.shape != weight.weight.shape:
            raise ValueError(f"the {kind} of {label} is {list(tensor.shape)}; accepted: {list(weight.weight.shape)}")
        # The extremes of a tensor with NaN are NaN: one pass and no temporaries.
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.detach().aminmax()):
            raise ValueError(f"the {kind} of {label} has values that are not finite; accepted: finite numbers")


def look_up(choices: Mapping[str, Any], field: str, name: str) -> Any:
    """The entry of that name.

    Raises:
        ValueError: there is none; the message lists the accepted names and the nearest one.
    """
    if isinstance(name, str) and name in choices:
        return choices[name]
    nearest = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise ValueError(f"{field} is {name!r}; accepted: {', '.join(sorted(choices))}{hint}")


def _check_density(field: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{field} is {value!r}; accepted: a number in (0, 1]")
