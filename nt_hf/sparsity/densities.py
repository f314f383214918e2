"""How many weights of each tensor are active: distributions over the tensors, and how counts change during a run.

A new distribution is one function that gives a tensor's share, and one line in `DISTRIBUTIONS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from ..checks import check, integer, look_up, number


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


def owl(shape: Sequence[int], uses: int) -> int:
    """As `uniform`; the first masks of a trained model move density to blocks with outliers (see ``owl_densities``)."""
    return math.prod(shape)


Distribution = Callable[[Sequence[int], int], int | float | Fraction]
DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "er": er, "erk": erk, "flops": flops, "owl": owl}


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
        distribution: a name in `DISTRIBUTIONS`: "uniform", "er", "erk", "flops" or "owl".
        fixed: densities in (0, 1] of tensors that are not to follow the distribution; the rest takes what remains.
        uses: for "flops", how often a forward pass multiplies by each weight of a tensor; 1 where it is not given.

    Returns:
        The number of active weights of each tensor, in the order of ``shapes``.

    Raises:
        ValueError: a density outside (0, 1], an unknown distribution, ``fixed`` names no tensor of ``shapes``, or
            leaves a remainder that the other tensors cannot hold.
    """
    share_of = look_up(DISTRIBUTIONS, "distribution", distribution)
    check("density", density, number("(0, 1]"))
    fixed, uses = fixed or {}, uses or {}
    for name, value in fixed.items():
        check(f"densities: {name}", value, number("(0, 1]"))
        if name not in shapes:
            raise ValueError(f"densities={name!r}: accepted is {', '.join(shapes) or 'no tensor'}")

    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(sizes.values()))
    counts = {name: max(1, round(fixed[name] * sizes[name])) for name in sizes if name in fixed}
    shares = {name: share_of(shape, uses.get(name, 1)) for name, shape in shapes.items() if name not in fixed}
    budget = total - sum(counts.values())
    room = {name: sizes[name] for name in shares}
    if shares and not 0 < budget <= sum(room.values()):
        raise ValueError(
            f"densities: the fixed groups take {sum(counts.values())} of the {total} active weights of density "
            f"{density:g}, which leaves {budget} for the {sum(room.values())} other weights; accepted are 1 to "
            f"{sum(room.values())}"
        )
    if not shares and abs(budget) > len(counts):
        raise ValueError(
            f"density={density:g}: accepted is {sum(counts.values()) / sum(sizes.values()):g}, which densities give, "
            "for they cover every weight"
        )
    if not shares:  # settle what rounding each group left over
        sign = 1 if budget > 0 else -1
        adjustable = [name for name in counts if 1 <= counts[name] + sign <= sizes[name]]
        for name in sorted(adjustable, key=sizes.__getitem__, reverse=True)[: abs(budget)]:
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
    """Divides ``budget`` in proportion to ``shares``, none getting more than its ``room``; exact in total.

    What does not fit goes to the others in the same proportion; an infinite share takes all the room it has. Fractions
    are settled by largest remainder, in exact arithmetic, so the result does not depend on the platform.

    Args:
        budget: from 0 to the sum of ``room``.
        shares: at least 0, by name. Where those with room have none, they share equally.
        room: at least 0, by name.

    Raises:
        ValueError: infinite shares ask for more than the budget, or there is not enough room.
    """
    check("budget", budget, integer(0, sum(room.values())))
    allocated = {name: room[name] for name, share in shares.items() if share == math.inf}
    budget -= sum(allocated.values())
    if budget < 0:
        raise ValueError(
            f"{', '.join(allocated)}: cost nothing, would stay dense and need {-budget} more active weights than there "
            "are; accepted is a higher density, or to exclude them or give them one by densities"
        )
    open_shares = {name: Fraction(share) for name, share in shares.items() if name not in allocated}
    # Whatever would overflow its room is filled and leaves the rest, whose shares then grow: repeat until all fit.
    while budget:
        open_shares = {name: share for name, share in open_shares.items() if name not in allocated}
        if not any(open_shares.values()):
            open_shares = {name: Fraction(1) for name in open_shares}
        total_share = sum(open_shares.values())
        full = [name for name, share in open_shares.items() if budget * share >= room[name] * total_share]
        if not full:
            break
        for name in full:
            allocated[name] = room[name]
            budget -= room[name]
    else:
        return {name: allocated.get(name, 0) for name in shares}
    exact = {name: budget * share / total_share for name, share in open_shares.items()}
    allocated |= {name: math.floor(share) for name, share in exact.items()}
    left_over = budget - sum(allocated[name] for name in exact)
    for name in sorted(exact, key=lambda name: exact[name] % 1, reverse=True)[:left_over]:
        allocated[name] += 1
    return {name: allocated[name] for name in shares}


def structured_counts(
    counts: Mapping[str, int], shapes: Mapping[str, Sequence[int]], groups: Mapping[str, int]
) -> dict[str, int]:
    """The nearest counts that give every group of a tensor as many, with a total as near as possible.

    Args:
        counts: active weights of each tensor, as a distribution gives them.
        shapes: of the tensors.
        groups: how many groups of equal count each tensor has: its output units for constant fan-in.

    Raises:
        ValueError: a group would be left without an active weight.
    """
    per_group = {name: count // groups[name] for name, count in counts.items()}
    missing = sum(counts.values()) - sum(per_group[name] * groups[name] for name in per_group)
    for name in sorted(counts, key=lambda name: counts[name] % groups[name] / groups[name], reverse=True):
        if groups[name] <= 2 * missing and per_group[name] * groups[name] < math.prod(shapes[name]):
            per_group[name] += 1
            missing -= groups[name]
    for name, count in per_group.items():
        if count < 1:
            raise ValueError(
                f"the density of {name} {list(shapes[name])}: leaves {counts[name]} weights for {groups[name]} groups; "
                f"accepted is at least one each, density {groups[name] / math.prod(shapes[name]):.4g}"
            )
    return {name: count * groups[name] for name, count in per_group.items()}


def falling_counts(
    current: Mapping[str, int], first: Mapping[str, int], last: Mapping[str, int], progress: float
) -> dict[str, int]:
    """Counts ``progress`` of the way from the first to the last ones, exact in total, none above what it is now.

    Rounding from the start each time would let single weights wander from tensor to tensor.

    Args:
        current: counts so far, each between ``first`` and ``last``.
        first, last: counts at the begin and, nowhere larger, at the end of a density schedule.
        progress: from 0 to 1.
    """
    exact = {name: first[name] + Fraction(progress) * (last[name] - first[name]) for name in first}
    surplus = max(0, sum(current.values()) - round(sum(exact.values())))
    room = {name: current[name] - last[name] for name in current}
    fallen = allocate(surplus, {name: max(Fraction(0), current[name] - exact[name]) for name in current}, room)
    return {name: current[name] - fallen[name] for name in current}


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
