"""Updates to try: tensors of every shape and structure as hypothesis draws them, and a plain slow update."""

import itertools
import random
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod

import torch
from hypothesis import settings
from hypothesis import strategies as st

from nt_hf.sparsity import criteria
from nt_hf.sparsity.criteria import MaskedWeight
from nt_hf.sparsity.update import update_mask

SHAPES = [
    (1, 1),
    (1, 17),
    (19, 1),
    (7, 13),
    (12, 16),
    (16, 12),
    (8, 3),
    (3, 4, 5),
    (2, 8, 7),
    (4, 8, 2, 3),
    (5, 4, 3, 3),
]
STRUCTURES = ["unstructured", "constant_fan_in", "1:2", "2:4", "3:4", "4:4"]


def quickly(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


# --------------------------------------------------------------------------------------- a plain slow update


@dataclass
class Slow:
    """A tensor as lists: its places are the flat indices."""

    old: set
    weight: list
    grad: list
    momentum: list
    groups: list = field(default_factory=list)
    structured: bool = False
    mest_lambda: float = 1.0


def slow_groups(shape, structure, transposed=False):
    """The flat indices of each group that is to hold as many active weights as any other."""
    groups = {}
    for flat, (first, second, *kernel) in enumerate(itertools.product(*map(range, shape))):
        into, out = (first, second) if transposed else (second, first)
        key = {"unstructured": (), "constant_fan_in": (out,)}.get(structure)
        key = (out, *kernel, into // int(structure.split(":")[1])) if key is None else key
        groups.setdefault(key, []).append(flat)
    return list(groups.values())


SLOW_DROP = {
    "magnitude": lambda at, i: abs(at.weight[i]),
    "set": lambda at, i: abs(at.weight[i]),
    "global_magnitude": lambda at, i: abs(at.weight[i]),
    "taylor": lambda at, i: abs(at.weight[i] * at.grad[i]),
    "mest": lambda at, i: abs(at.weight[i]) + at.mest_lambda * abs(at.grad[i]),
}
SLOW_GROW = {"gradient": lambda at, i: abs(at.grad[i]), "momentum": lambda at, i: abs(at.momentum[i])}


def slow_number_kept(at, target, fraction, regrow):
    active, size = len(at.old), len(at.weight)
    staying = min(active, target)
    kept = staying - (0 if staying == size else round(fraction * staying))
    return max(kept, target - (size - active)) if regrow == "forbid" else kept


def slow_keep(tensors, targets, fraction, drop, regrow):
    """Walks down one ranking of all candidates; a group keeps what it could not replace and no more than its target."""
    number = sum(slow_number_kept(at, target, fraction, regrow) for at, target in zip(tensors, targets))
    kept, rest = [set() for _ in tensors], []
    for t, (at, target) in enumerate(zip(tensors, targets)):
        goal = target // len(at.groups)
        for group in at.groups:
            ranked = sorted((i for i in group if i in at.old), key=lambda i: -SLOW_DROP[drop](at, i))
            least, most = 0, len(ranked)
            if at.structured or drop == "global_magnitude":
                least = max(0, goal - (len(group) - len(ranked))) if regrow == "forbid" else 0
                most = min(most, goal)
            kept[t] |= set(ranked[:least])
            rest += [(SLOW_DROP[drop](at, i), t, i) for i in ranked[least:most]]
    number -= sum(map(len, kept))
    rest.sort(reverse=True)
    if drop == "set":
        signs = [[one for one in rest if tensors[0].weight[one[2]] * sign > 0] for sign in (1, -1)]
        zeros = [one for one in rest if tensors[0].weight[one[2]] == 0]
        nonzero = len(signs[0]) + len(signs[1])
        dropped = max(0, nonzero - number)
        of_positive = round(Fraction(dropped * len(signs[0]), max(1, nonzero)))
        best = signs[0][: len(signs[0]) - of_positive] + signs[1][: len(signs[1]) - (dropped - of_positive)]
        best += zeros[: number - len(best)]
    else:
        best = rest[:number]
    for _, t, i in best:
        kept[t].add(i)
    return kept


def slow_grow(at, kept, target, grow, regrow):
    new = set(kept)
    for group in at.groups:
        wanted = target // len(at.groups) - len(kept.intersection(group))
        candidates = [i for i in group if i not in (kept if regrow == "allow" else at.old)]
        new |= set(sorted(candidates, key=lambda i: -SLOW_GROW[grow](at, i))[:wanted])
    return new


# ------------------------------------------------------------------------------------------------- what is drawn


@dataclass
class Case:
    """A tensor, its structure and what an update is to make of it."""

    fields: dict
    target: int
    shape: tuple
    groups: list
    seed: int

    @property
    def state(self):
        return MaskedWeight(**self.fields)

    def slow(self):
        values = {name: self.fields[name].flatten().tolist() for name in ("weight", "grad", "momentum")}
        structured = self.fields["structure"] != "unstructured"
        return Slow(places(self.fields["mask"]), **values, groups=self.groups, structured=structured)

    def update(self, **change):
        fields = self.fields | change
        mask, weight, grad = (fields.pop(name) for name in ("mask", "weight", "grad"))
        return update_mask(mask, weight, grad, **{"target": self.target} | fields)


def places(mask):
    return set(mask.flatten().nonzero().squeeze(1).tolist())


def primes(count):
    found = []
    for number in itertools.count(2):
        if len(found) == count:
            return found
        if all(number % prime for prime in found if prime * prime <= number):
            found.append(number)


PRIMES = primes(400)


def distinct_values(draw, n, dtype):
    """Weights, gradients and momenta without ties, nor have ``|w * g|`` and, with lambda 2**-11, ``|w| + lambda |g|``.

    All are exact in fp32: products of primes, and in bf16 whole numbers up to 256.
    """
    ranges = [PRIMES[200 : 200 + n], PRIMES[:n], range(1, n + 1)]
    if dtype == torch.bfloat16:
        ranges = [range(1, n + 1)] * 3
    for values in ranges:
        values = [value * draw.choice((1, -1)) for value in draw.sample(values, n)]
        yield torch.tensor(values, dtype=dtype)


def values_with_ties(draw, n, dtype):
    """Normal values, rounded now and then, some of the active weights exactly 0."""
    generator = torch.Generator().manual_seed(draw.randrange(2**30))
    digits = draw.choice((0, 1, 6))
    for _ in range(3):
        yield torch.randn(n, generator=generator).round(decimals=digits).to(dtype)


@st.composite
def cases(draw, structures=STRUCTURES, values=values_with_ties, dtypes=(torch.float32, torch.bfloat16), shapes=SHAPES):
    structure = draw(st.sampled_from(structures))
    length = int(structure.split(":")[1]) if ":" in structure else 1
    fitting = [
        (shape, transposed)
        for shape in shapes
        for transposed in ([False, True] if len(shape) == 2 else [False])
        if shape[0 if transposed else 1] % length == 0
    ]
    shape, transposed = draw(st.sampled_from(fitting))
    groups = slow_groups(shape, structure, transposed)
    least = int(structure.split(":")[0]) if ":" in structure else 0
    counts = st.integers(least, len(groups[0]))
    now = draw(counts)
    goal = draw(st.one_of(st.just(now), counts))
    seed = draw(st.integers(0, 2**20))
    draws = random.Random(seed)
    old = [i for group in groups for i in draws.sample(group, now)]
    mask = torch.zeros(prod(shape), dtype=torch.bool)
    mask[old] = True
    weight, grad, momentum = (each.view(shape) for each in values(draws, prod(shape), draw(st.sampled_from(dtypes))))
    mask = mask.view(shape)
    fields = {"mask": mask, "weight": weight.masked_fill(~mask, 0), "grad": grad, "momentum": momentum}
    fields |= {"name": "a.weight", "seed": seed, "step": 3, "structure": structure, "transposed": transposed}
    return Case(fields, goal * len(groups), shape, groups, seed)


fractions = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
regrows = st.sampled_from(criteria.REGROW)
