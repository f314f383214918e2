"""Sparse topologies as pure functions on tensors: how many weights each tensor keeps, which drop, which grow.

One update of one tensor is [`update_mask`]: **keep** the best ``active - k`` weights by a drop score, then **grow**
``k`` positions by a grow score. Nothing here knows modules or optimizers, and nothing draws from a random
generator: noise is a hash of (seed, step, name, flat index), so it is the same on every rank and device, repeats
after a resume, and can be computed for any part of a tensor.

A new criterion is one function from a [`Stretch`] to scores and one line in `DROP` or `GROW`; a new distribution is
one function from a shape to a share and one line in `DISTRIBUTIONS`.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

REGROW = ("allow", "forbid")

# Elements handled at a time. On a CPU the temporaries of a stretch stay in the cache; a GPU only needs them bounded.
_STRETCH = {"cpu": 2**17}
_STRETCH_DEVICE = 2**25

# Shift and width of the digits by which int32 values are ranked, from the top: few enough bins to stay in the cache.
_DIGITS = ((21, 11), (10, 11), (0, 10))

_INT32_MIN = -(2**31)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps CPU operations on the calling thread.

    Operations on a stretch take microseconds. Sharing each of them among threads makes them wait for one another, which
    on a busy machine costs several times what it gains; ``benchmarks/topology.py`` times an update.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------- densities


def uniform(shape: Sequence[int]) -> int:
    """Share of the active weights in proportion to the tensor's size: the same density everywhere."""
    return prod(shape)


def er(shape: Sequence[int]) -> int:
    """Erdős–Rényi: density in proportion to ``(n_in + n_out) / (n_in * n_out)`` (Mocanu et al. 2018, eq. 1)."""
    return sum(shape[:2]) * prod(shape[2:])


def erk(shape: Sequence[int]) -> int:
    """Erdős–Rényi-Kernel: as `er`, with the kernel's height and width in both sums (Evci et al. 2020, section 3).

    The density is in proportion to ``sum(shape) / prod(shape)``, so the active weights are to ``sum(shape)``. Of a
    two-dimensional weight it equals `er`.
    """
    return sum(shape)


DISTRIBUTIONS: dict[str, Callable[[Sequence[int]], int]] = {"uniform": uniform, "er": er, "erk": erk}


def active_counts(
    shapes: Mapping[str, Sequence[int]],
    density: float,
    distribution: str = "erk",
    fixed: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Distributes ``round(density * total size)`` active weights over tensors, exactly.

    A tensor whose share exceeds its size stays dense and the rest is rescaled, until all fit. Fractions are settled by
    largest remainder, in integers, so the result does not depend on the platform. No tensor is left without an active
    weight as long as the budget holds one for each.

    Args:
        shapes: the shape of each tensor by name, output dimension first, as torch stores weights.
        density: share of active weights among all, in (0, 1].
        distribution: a name in `DISTRIBUTIONS`: "uniform", "er" or "erk".
        fixed: densities in (0, 1] of tensors that are not to follow the distribution; the rest takes what remains.

    Returns:
        The number of active weights of each tensor, in the order of ``shapes``.

    Raises:
        ValueError: a density outside (0, 1], an unknown distribution, ``fixed`` names no tensor of ``shapes``, or
            leaves a remainder that the other tensors cannot hold.
    """
    share_of = look_up(DISTRIBUTIONS, "distribution", distribution)
    _check_density("density", density)
    fixed = fixed or {}
    for name, value in fixed.items():
        _check_density(f"densities: the density of {name}", value)
        if name not in shapes:
            raise ValueError(f"densities: {name} is no tensor among {', '.join(shapes) or 'none'}")

    sizes = {name: prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(sizes.values()))
    counts = {name: max(1, round(fixed[name] * sizes[name])) for name in sizes if name in fixed}
    shares = {name: share_of(shape) for name, shape in shapes.items() if name not in fixed}
    budget = total - sum(counts.values())
    room = sum(sizes[name] for name in shares)
    if shares and not 0 < budget <= room:
        raise ValueError(
            f"densities: the fixed groups take {sum(counts.values())} of the {total} active weights of density "
            f"{density:g}, which leaves {budget} for the {room} other weights; accepted: 1 to {room}"
        )
    if not shares and abs(budget) > len(counts):
        raise ValueError(
            f"densities: the groups cover every weight and give density "
            f"{sum(counts.values()) / sum(sizes.values()):g}; density must be the same, it is {density:g}"
        )
    for name in sorted(counts, key=sizes.__getitem__, reverse=True)[: abs(budget) if not shares else 0]:
        counts[name] += 1 if budget > 0 else -1  # what rounding each group left over

    while full := [name for name, share in shares.items() if budget * share >= sizes[name] * sum(shares.values())]:
        for name in full:
            counts[name] = sizes[name]
            budget -= sizes[name]
            del shares[name]
    if shares:
        whole = sum(shares.values())
        counts |= {name: budget * share // whole for name, share in shares.items()}
        left_over = budget - sum(counts[name] for name in shares)
        for name in sorted(shares, key=lambda name: budget * shares[name] % whole, reverse=True)[:left_over]:
            counts[name] += 1

    adjustable = [name for name in counts if name not in fixed]
    for name in adjustable:
        richest = max(adjustable, key=counts.__getitem__)
        if counts[name] == 0 and counts[richest] > 1:
            counts[name] += 1
            counts[richest] -= 1
    return {name: counts[name] for name in shapes}


@_one_thread()
def random_mask(
    shape: Sequence[int], active: int, *, seed: int, name: str = "", device: torch.device | str | None = None
) -> torch.Tensor:
    """Bool mask of ``shape`` with exactly ``active`` positions set, drawn uniformly.

    Args:
        shape: of the weight.
        active: number of positions to set, from 0 to the size.
        seed: of the hashed noise; with ``name`` it determines the mask.
        name: canonical name of the parameter, so that tensors of one shape get different masks.
        device: where the mask is built; it is the same on every device.

    Raises:
        ValueError: ``active`` outside its range.
    """
    size = prod(shape)
    if not 0 <= active <= size:
        raise ValueError(f"active is {active} for a tensor of shape {list(shape)}; accepted: 0 to {size}")
    keys = torch.empty(size, dtype=torch.int32, device=device)
    noise = noise_key(seed, 0, name, "init")
    for start, stop in _stretches(size, keys.device):
        keys[start:stop] = hash_bits(torch.arange(start, stop, device=device), noise)
    return _largest(keys, active, noise_key(seed, 0, name, "init ties")).view(tuple(shape))


# ----------------------------------------------------------------------------------------------------- criteria


class Stretch:
    """What a criterion sees: a stretch of a flattened tensor, every field fp32 ``[n]`` and free to overwrite.

    Attributes:
        weight: the weights.
        grad: their gradients; asking for them raises a `ValueError` where there are none.
        noise: uniform numbers in (0, 1), a hash of the element's place.
        exponent: of soft magnitude.
    """

    def __init__(self, tensors: "_Tensors", start: int, stop: int):
        self._tensors, self._start, self._stop = tensors, start, stop
        self.exponent = tensors.exponent

    @property
    def weight(self) -> torch.Tensor:
        return self._tensors.weight[self._start : self._stop].to(torch.float32, copy=True)

    @property
    def grad(self) -> torch.Tensor:
        if self._tensors.grad is None:
            raise ValueError(f"this criterion needs the gradient of {self._tensors.name or 'the weight'}; it has none")
        return self._tensors.grad[self._start : self._stop].to(torch.float32, copy=True)

    @property
    def noise(self) -> torch.Tensor:
        return hash_uniform(
            torch.arange(self._start, self._stop, device=self._tensors.weight.device), self._tensors.key
        )


@dataclass(frozen=True)
class _Tensors:
    """The flat tensors of one update and the key of its noise."""

    weight: torch.Tensor
    grad: torch.Tensor | None
    key: tuple[int, int]
    exponent: float
    name: str


Criterion = Callable[[Stretch], torch.Tensor]


def magnitude(at: Stretch) -> torch.Tensor:
    """Keeps the largest ``|w|`` (Zhu & Gupta 2017; the drop of SET and RigL)."""
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


def gradient(at: Stretch) -> torch.Tensor:
    """Grows where the dense gradient ``|g|`` is largest (RigL, Evci et al. 2020, section 3)."""
    return at.grad.abs_()


def random(at: Stretch) -> torch.Tensor:
    """Grows anywhere, uniformly (SET, Mocanu et al. 2018)."""
    return at.noise


DROP: dict[str, Criterion] = {"magnitude": magnitude, "soft_magnitude": soft_magnitude}
GROW: dict[str, Criterion] = {"gradient": gradient, "random": random}


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


@torch.no_grad()
@_one_thread()
def update_mask(
    mask: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor | None,
    *,
    drop_fraction: float,
    drop: str = "soft_magnitude",
    grow: str = "gradient",
    seed: int,
    step: int = 0,
    name: str = "",
    regrow: str = "allow",
    exponent: float = 3.0,
    target: int | None = None,
) -> torch.Tensor:
    """One topology update: keeps the best ``active - k`` weights, then grows ``k`` positions.

    The selection is exact; ties are broken by hashed noise, never by index. The kept weights are a subset of the
    active ones, and without a ``target`` their number does not change. See [`move_counts`] for ``k``.

    Args:
        mask: bool, any shape; True where a weight is active.
        weight: of the mask's shape, any floating dtype; scores are computed in fp32.
        grad: the dense gradient, of the same shape; ``None`` where no criterion needs it.
        drop_fraction: share of the active weights that move, in [0, 1].
        drop: a name in `DROP`: "magnitude" or "soft_magnitude".
        grow: a name in `GROW`: "gradient" or "random".
        seed: with ``step`` and ``name``, it determines all noise of the update.
        step: of the run, so that updates differ.
        name: canonical name of the parameter, so that tensors differ.
        regrow: "allow": every position outside the kept ones is a candidate, also one just dropped, which then has
            not moved (RigL's rule); "forbid": only positions that were inactive before, ``k`` capped at their number.
        exponent: of soft magnitude.
        target: active weights after the update; ``None`` keeps their number.

    Returns:
        The new bool mask, of the same shape.

    Raises:
        ValueError: an unknown name, a value out of range, tensors that do not match, a missing gradient, or a weight
            or gradient that is not finite.
    """
    keep_score, grow_score = look_up(DROP, "drop", drop), look_up(GROW, "grow", grow)
    if regrow not in REGROW:
        raise ValueError(f"regrow is {regrow!r}; accepted: {', '.join(REGROW)}")
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction is {drop_fraction}; accepted: a number in [0, 1]")
    if not exponent > 0:
        raise ValueError(f"exponent is {exponent}; accepted: a number above 0")
    if target is not None and not 0 <= target <= mask.numel():
        raise ValueError(f"target is {target} for {mask.numel()} weights; accepted: 0 to {mask.numel()}")
    label = name or "the weight"
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"the mask of {label} is {mask.dtype} {list(mask.shape)}; accepted: torch.bool {list(weight.shape)}"
        )
    _check_finite(f"the weight of {label}", weight)
    if grad is not None:
        if grad.shape != weight.shape:
            raise ValueError(f"the gradient of {label} is {list(grad.shape)}; accepted: {list(weight.shape)}")
        _check_finite(f"the gradient of {label}", grad)

    def best(criterion: Criterion, candidates: torch.Tensor, k: int, purpose: str) -> torch.Tensor:
        key = noise_key(seed, step, name, purpose)
        flat_grad = None if grad is None else grad.flatten()
        tensors = _Tensors(weight.flatten(), flat_grad, key, exponent, name)
        keys = torch.empty(weight.numel(), dtype=torch.int32, device=weight.device)
        for start, stop in _stretches(keys.numel(), keys.device):
            keys[start:stop] = _sort_key(criterion(Stretch(tensors, start, stop)), candidates[start:stop])
        return _largest(keys, k, noise_key(seed, step, name, purpose + " ties"))

    old = mask.flatten()
    active = int(torch.count_nonzero(old))
    kept, grown = move_counts(active, mask.numel(), drop_fraction, regrow, target)
    new = best(keep_score, old, kept, "drop") if kept < active else old.clone()
    if grown:
        new |= best(grow_score, ~new if regrow == "allow" else ~old, grown, "grow")
    return new.view(mask.shape)


# ---------------------------------------------------------------------------------------------------- selection


@_one_thread()
def select_top(
    scores: torch.Tensor, k: int, *, candidates: torch.Tensor | None = None, key: tuple[int, int]
) -> torch.Tensor:
    """Bool mask of the ``k`` largest scores, exact, with ties broken by hashed noise.

    A radix selection: histograms of the bits, digit by digit from the top, give the ``k``-th largest score, and equal
    scores are settled by the same method on their noise. Three linear passes and no sort, and a sharded tensor would
    have to reduce its histograms only.

    Args:
        scores: fp32, any shape; infinities are ordered, NaN is an error.
        k: how many to choose, at most the number of candidates.
        candidates: bool, of the same shape: the positions to choose from; ``None`` for all.
        key: of the noise that breaks ties, from [`noise_key`].

    Returns:
        Bool mask of the shape of ``scores`` with exactly ``k`` positions set.

    Raises:
        ValueError: ``k`` out of range, or a score that is NaN.
    """
    limit = scores.numel() if candidates is None else int(torch.count_nonzero(candidates))
    if not 0 <= k <= limit:
        raise ValueError(f"k is {k} for {limit} candidates; accepted: 0 to {limit}")
    if scores.isnan().any():
        raise ValueError("scores are NaN in places; accepted: numbers and infinities")
    keys = _sort_key(
        scores.flatten().to(torch.float32, copy=True), None if candidates is None else candidates.flatten()
    )
    return _largest(keys, k, key).view(scores.shape)


def _sort_key(scores: torch.Tensor, candidates: torch.Tensor | None) -> torch.Tensor:
    """int32 keys in the order of the fp32 scores; what is no candidate comes last. Overwrites ``scores``."""
    bits = scores.add_(0.0).view(torch.int32)  # adding 0 turns -0.0 into 0.0: they are equal, their bits are not
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards by their bits
    return keys if candidates is None else keys.masked_fill_(~candidates, _INT32_MIN)  # below -inf; only NaN maps there


def _largest(keys: torch.Tensor, k: int, tie_key: tuple[int, int]) -> torch.Tensor:
    """Bool ``[n]``: the ``k`` largest of int32 ``keys``, equal ones by the noise of ``tie_key``."""
    if k == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    threshold, tied_wanted = _kth_largest(keys, k)
    chosen = keys > threshold
    tied = (keys == threshold).nonzero().squeeze(1)
    if tied_wanted < len(tied):
        noise = torch.empty_like(tied, dtype=torch.int32)
        for start, stop in _stretches(len(tied), keys.device):
            noise[start:stop] = hash_bits(tied[start:stop], tie_key)
        threshold, last_wanted = _kth_largest(noise, tied_wanted)
        # 31 bits of noise rarely tie at the boundary; where they do, the order of positions settles the few.
        chosen[tied[noise == threshold][:last_wanted]] = True
        tied = tied[noise > threshold]
    chosen[tied] = True
    return chosen


def _kth_largest(values: torch.Tensor, k: int) -> tuple[int, int]:
    """The ``k``-th largest of int32 values ``[n]``, and how many equal to it are among the ``k`` largest."""
    prefix = None  # the upper bits of the value sought, as far as known
    for shift, bits in _DIGITS:
        histogram = torch.zeros(2**bits, dtype=torch.int64, device=values.device)
        for start, stop in _stretches(len(values), values.device):
            part = values[start:stop]
            if prefix is None:
                digits = (part >> shift) + 2 ** (bits - 1)  # the first digit carries the sign
            else:
                digits = (part[(part >> (shift + bits)) == prefix] >> shift) & (2**bits - 1)
            histogram += torch.bincount(digits, minlength=2**bits)
        digit, k = _bin_of(histogram, k)
        prefix = digit - 2 ** (bits - 1) if prefix is None else prefix * 2**bits + digit
    return prefix, k


def _bin_of(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the ``k``-th largest element, and that element's rank (from 1) within the bin."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    return len(histogram) - 1 - place, k - (int(from_top[place - 1]) if place else 0)


def _stretches(size: int, device: torch.device) -> Iterator[tuple[int, int]]:
    length = _STRETCH.get(device.type, _STRETCH_DEVICE)
    return ((start, min(start + length, size)) for start in range(0, size, length))


# -------------------------------------------------------------------------------------------------------- noise


def noise_key(seed: int, step: int, name: str, purpose: str) -> tuple[int, int]:
    """Two 32-bit numbers that stand for (seed, step, name, purpose); the same in every process."""
    digest = hashlib.blake2b(f"{seed}\0{step}\0{name}\0{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def hash_bits(index: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """31 random bits for each flat index: int32 of the index's shape, at least 0.

    A counter-based generator: the index times an odd number plus an offset, both from the key, through the
    mixer "lowbias32" (C. Wellons, *Prospecting for hash functions*, 2018). Integer arithmetic modulo 2**32, hence the
    same on every device.

    Args:
        index: int64, flat positions in the tensor.
        key: from [`noise_key`].
    """
    # The right shifts of int32 are arithmetic, so each is followed by a mask.
    x = index.to(torch.int32).mul_(key[0] | 1).add_(key[1])
    x += (index >> 32).to(torch.int32).mul_(0x1E3779B1)  # a tensor of more than 2**32 weights does not repeat
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x & 0x7FFFFFFF


def hash_uniform(index: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Uniform fp32 numbers in (0, 1), neither end included, for each flat index; see [`hash_bits`]."""
    # fp32 has more steps near 0 than near 1: the smallest value is 2**-32, the largest would round to 1.
    return hash_bits(index, key).to(torch.float32).add_(0.5).mul_(2**-31).clamp_(max=1 - 2**-24)


# ------------------------------------------------------------------------------------------------------- errors


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


def _check_finite(what: str, tensor: torch.Tensor) -> None:
    # The extremes of a tensor with NaN are NaN: one pass and no temporaries.
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise ValueError(f"{what} has values that are not finite; accepted: finite numbers")
