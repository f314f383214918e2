"""One update against a plain slow one, and what holds of every update whatever the shape, structure or method."""

import itertools
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor, inf, nan, prod

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nt_hf.models.masks import check_structure, group_count
from nt_hf.sparsity import criteria, densities, selection, update
from nt_hf.sparsity.criteria import MaskedWeight
from nt_hf.sparsity.densities import active_counts, allocate, falling_counts, redistribute, structured_counts
from nt_hf.sparsity.update import best_scores, grow_weights, keep_weights, random_mask, update_mask

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
KEPT_EXACTLY = ["magnitude", "set", "taylor", "mest"]  # what follows from the values alone, tensor by tensor


def quickly(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Chunks and samples so small that small tensors have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(selection._CHUNK, "cpu", 100)
        patch.setattr(selection, "_SAMPLE", 64)
        yield


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


# ------------------------------------------------------------------------------------------- what always holds


def assert_holds(case, drop, grow, regrow, fraction):
    mask, structure, transposed = (case.fields[name] for name in ("mask", "structure", "transposed"))
    before = {name: value.clone() for name, value in case.fields.items() if isinstance(value, torch.Tensor)}
    how = {"drop_fraction": fraction, "drop": drop, "regrow": regrow}
    (kept,) = keep_weights([case.state], [case.target], **how)
    new = grow_weights(case.state, kept, case.target, grow=grow, regrow=regrow)

    assert new.sum() == case.target
    assert new.dtype == kept.dtype == torch.bool
    assert new.shape == kept.shape == mask.shape
    assert not (kept & ~mask).any()
    assert not (kept & ~new).any()
    assert kept.sum() == slow_number_kept(case.slow(), case.target, fraction, regrow)
    assert torch.equal(new, case.update(grow=grow, **how))
    assert all(torch.equal(case.fields[name], value) for name, value in before.items())
    assert {int(new.flatten()[group].sum()) for group in case.groups} == {case.target // len(case.groups)}
    assert group_count(case.shape, structure, transposed) == len(case.groups)
    check_structure(new, structure, transposed)
    if regrow == "forbid":
        assert not (new & mask & ~kept).any()
    if case.target == mask.numel():
        assert new.all()
    if fraction == 0:
        assert not (new & ~mask).any() or case.target > mask.sum()
        assert not (mask & ~new).any() or case.target < mask.sum()


@pytest.mark.parametrize("structure", STRUCTURES)
@quickly(60)
@given(data=st.data())
def test_what_holds_of_every_update(structure, data):
    drop, grow = data.draw(st.sampled_from(list(criteria.DROP))), data.draw(st.sampled_from(list(criteria.GROW)))
    assert_holds(data.draw(cases([structure])), drop, grow, data.draw(regrows), data.draw(fractions))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_holds_of_every_combination(structure):
    shape, draws = (6, 8, 3), random.Random(structure)
    groups = slow_groups(shape, structure)
    least, length = map(int, structure.split(":")) if ":" in structure else (0, len(groups[0]))
    now = (least + length) // 2
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[[i for group in groups for i in draws.sample(group, now)]] = True
    goals = sorted({now, max(least, now // 2), min(length, now + 1), length})
    for drop, grow, regrow in itertools.product(criteria.DROP, criteria.GROW, criteria.REGROW):
        dtype = draws.choice((torch.float32, torch.bfloat16))
        weight, grad, momentum = (values.view(shape) for values in values_with_ties(draws, mask.numel(), dtype))
        fields = {"mask": mask, "weight": weight * mask, "grad": grad, "momentum": momentum, "structure": structure}
        case = Case(fields | {"transposed": False}, draws.choice(goals) * len(groups), shape, groups, 0)
        assert_holds(case, drop, grow, regrow, 0.4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_dense_tensor_stays_dense(structure):
    shape = (5, 8, 3)
    dense = torch.ones(shape, dtype=torch.bool)
    state = MaskedWeight(dense, torch.ones(shape), torch.ones(shape), torch.ones(shape), structure=structure)
    for drop, fraction, regrow in itertools.product(criteria.DROP, (0.3, 1), criteria.REGROW):
        (kept,) = keep_weights([state], [dense.numel()], drop_fraction=fraction, drop=drop, regrow=regrow)
        assert kept.all()
    for grow, regrow in itertools.product(criteria.GROW, criteria.REGROW):
        assert grow_weights(state, dense, dense.numel(), grow=grow, regrow=regrow).all()


@pytest.mark.parametrize("structure", ["unstructured", "constant_fan_in", "2:4"])
@pytest.mark.parametrize(("drop", "grow"), [("soft_magnitude", "gradient"), ("magnitude", "random")])
def test_other_steps_draw_differently(structure, drop, grow):
    mask = random_mask((16, 24), 192, seed=0, structure=structure)
    weight = torch.rand(16, 24).add_(1).masked_fill_(~mask, 0)
    how = {"drop_fraction": 0.5, "drop": drop, "grow": grow, "structure": structure}
    draws = [update_mask(mask, weight, torch.rand(16, 24), step=step, **how) for step in range(5)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


@pytest.mark.parametrize("drop", criteria.DROP)
@quickly(20)
@given(data=st.data())
def test_the_order_of_the_tensors_does_not_matter(drop, data):
    regrow, fraction = data.draw(regrows), data.draw(fractions)
    several = [data.draw(cases()) for _ in range(data.draw(st.integers(2, 4)))]
    states = [MaskedWeight(**case.fields | {"name": f"{i}.weight"}) for i, case in enumerate(several)]
    targets = [case.target for case in several]
    order = data.draw(st.permutations(range(len(several))))
    how = {"drop_fraction": fraction, "drop": drop, "regrow": regrow}
    first = keep_weights(states, targets, **how)
    second = keep_weights([states[i] for i in order], [targets[i] for i in order], **how)
    assert all(torch.equal(first[i], mask) for i, mask in zip(order, second))
    assert sum(int(mask.sum()) for mask in first) == sum(
        slow_number_kept(case.slow(), case.target, fraction, regrow) for case in several
    )
    for case, state, kept in zip(several, states, first):
        assert grow_weights(state, kept, case.target, grow="random", regrow=regrow).sum() == case.target
    if drop != "global_magnitude":
        alone = [keep_weights([state], [target], **how)[0] for state, target in zip(states, targets)]
        assert all(torch.equal(*pair) for pair in zip(first, alone))


@quickly(60)
@given(case=cases())
def test_a_random_mask_of_every_structure(case):
    fields = {name: case.fields[name] for name in ("structure", "transposed", "name", "seed")}
    mask = random_mask(case.shape, case.target, **fields)
    check_structure(mask, fields["structure"], fields["transposed"])
    assert mask.sum() == case.target
    assert torch.equal(mask, random_mask(case.shape, case.target, **fields))


def test_long_groups_get_exactly_what_they_miss(monkeypatch):
    # Beside a count of thousands fp32 has no room for noise close to 1.
    monkeypatch.setattr(update, "to_uniform", lambda bits: torch.full(bits.shape, 1 - 2**-24))
    mask = torch.zeros(3, 5000, dtype=torch.bool)
    state = MaskedWeight(mask, mask.float(), torch.rand(3, 5000), random_share=0.5, structure="constant_fan_in")
    for grow in criteria.GROW:
        assert grow == "momentum" or grow_weights(state, mask, 3 * 3000, grow=grow).sum(1).tolist() == [3000] * 3


@quickly(60)
@given(case=cases(values=distinct_values))
def test_best_scores_are_the_largest_of_each_group(case):
    scores, fields = case.fields["grad"], case.fields
    (mask,) = best_scores(
        {"a": scores}, case.target, seed=0, structure=fields["structure"], transposed=fields["transposed"]
    ).values()
    flat, each = scores.flatten().tolist(), case.target // len(case.groups)
    assert places(mask) == {i for group in case.groups for i in sorted(group, key=lambda i: -flat[i])[:each]}


# ------------------------------------------------------------------------------------------------------- shards


def sharded(case, cuts, change=None, **how):
    """The new mask, each shard's part found by a thread of its own that shares sums only."""
    barrier, values, parts = threading.Barrier(len(cuts), timeout=30), {}, {}
    rows = prod(case.shape[1:])

    def work(rank, start, stop):
        def reduce(counts):
            values[rank] = counts
            barrier.wait()
            total = sum(values[r] for r in range(len(cuts)))
            barrier.wait()
            return total

        fields = case.fields | {
            name: value[start:stop] for name, value in case.fields.items() if isinstance(value, torch.Tensor)
        }
        mask, weight, grad = (fields.pop(name) for name in ("mask", "weight", "grad"))
        fields |= {"target": case.target, "offset": start * rows, "reduce": reduce} | how
        try:
            parts[rank] = update_mask(mask, weight, grad, **fields)
        except threading.BrokenBarrierError:
            pass
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank, *cut)) for rank, cut in enumerate(cuts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return torch.cat([parts[rank] for rank in range(len(cuts))])


LONG = [(12, 16), (16, 12), (19, 1), (40, 4), (7, 8, 3), (4, 8, 2, 3)]


@pytest.mark.parametrize("drop", criteria.DROP)
@quickly(25)
@given(data=st.data())
def test_shards_find_the_mask_of_the_whole_tensor(drop, data):
    case, grow = data.draw(cases(shapes=LONG)), data.draw(st.sampled_from(list(criteria.GROW)))
    # Split along the first dimension a transposed weight's groups are cut, unless they lie along it.
    whole_groups = int(case.fields["structure"].split(":")[1]) if ":" in case.fields["structure"] else None
    step = 1 if not case.fields["transposed"] or case.fields["structure"] == "unstructured" else whole_groups
    assume(step is not None and (step == 1 or grow != "gradient_random"))
    bounds = st.integers(0, case.shape[0] // step).map(lambda row: row * step)
    inner = sorted(data.draw(st.lists(bounds, min_size=1, max_size=3)))
    cuts = list(itertools.pairwise([0, *inner, case.shape[0]]))
    how = {"drop": drop, "grow": grow, "regrow": data.draw(regrows), "drop_fraction": data.draw(fractions)}
    assert torch.equal(sharded(case, cuts, **how), case.update(**how))


@pytest.mark.parametrize("drop", ["set", "global_magnitude", "soft_magnitude"])
@pytest.mark.parametrize("structure", ["unstructured", "constant_fan_in", "2:4"])
def test_shards_of_a_large_tensor(drop, structure, monkeypatch):
    monkeypatch.setitem(selection._CHUNK, "cpu", 2**12)
    shape = (400, 64)
    mask = random_mask(shape, 400 * 32, seed=1, structure=structure)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name in ("weight", "grad", "momentum")}
    case = Case({"mask": mask, "structure": structure} | values, 400 * 48, shape, [], 0)
    how = {"drop": drop, "grow": "gradient_random", "regrow": "forbid", "drop_fraction": 0.3}
    assert torch.equal(sharded(case, [(0, 1), (1, 77), (77, 77), (77, 400)], **how), case.update(**how))


# ----------------------------------------------------------------------------------------- against the slow one


def assert_equals_slow(several, drop, grow, regrow, fraction, **fields):
    states = [MaskedWeight(**case.fields | {"name": f"{i}"} | fields) for i, case in enumerate(several)]
    slow = [case.slow() for case in several]
    for at in slow:
        at.mest_lambda = fields.get("mest_lambda", 1.0)
    targets = [case.target for case in several]
    kept = keep_weights(states, targets, drop_fraction=fraction, drop=drop, regrow=regrow)
    expected = slow_keep(slow, targets, fraction, drop, regrow)
    assert [places(mask) for mask in kept] == expected
    for state, at, target, mask, chosen in zip(states, slow, targets, kept, expected):
        new = grow_weights(state, mask, target, grow=grow, regrow=regrow)
        assert places(new) == slow_grow(at, chosen, target, grow, regrow)


@pytest.mark.parametrize("drop", KEPT_EXACTLY)
@pytest.mark.parametrize("structured", [False, True])
@quickly(60)
@given(data=st.data())
def test_an_update_equals_the_slow_one(drop, structured, data):
    dtypes = [torch.float32] if drop in ("taylor", "mest") else [torch.float32, torch.bfloat16]
    case = data.draw(cases(STRUCTURES[1:] if structured else STRUCTURES[:1], distinct_values, dtypes))
    mest_lambda = data.draw(st.sampled_from([0.0, 2.0**-11, 2.0**12]))
    grow = data.draw(st.sampled_from(list(SLOW_GROW)))
    assert_equals_slow([case], drop, grow, data.draw(regrows), data.draw(fractions), mest_lambda=mest_lambda)


@pytest.mark.parametrize("structured", [False, True])
@quickly(60)
@given(data=st.data())
def test_tensors_that_compete_equal_the_slow_ones(structured, data):
    kinds = STRUCTURES[1:] if structured else STRUCTURES[:1]
    several = [
        data.draw(cases(kinds, distinct_values, [torch.float32], [(7, 4), (6, 8), (8, 6), (4, 4, 2), (1, 4)]))
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    for i, case in enumerate(several):  # no ties between the tensors either
        case.fields["weight"] = case.fields["weight"] * 4 + i
        case.fields["weight"][~case.fields["mask"]] = 0
    assert_equals_slow(several, "global_magnitude", "gradient", data.draw(regrows), data.draw(fractions))


# A linear regression of 4 outputs on 10 inputs, in lists and in tensors, each with its own weights.
INPUTS, OUTPUTS, SAMPLES, RATE = 10, 4, 24, 0.05


def regression(seed):
    draws = random.Random(seed)
    x = [[draws.gauss(0, 1) for _ in range(INPUTS)] for _ in range(SAMPLES)]
    truth = [[draws.gauss(0, 1) * (draws.random() < 0.4) for _ in range(INPUTS)] for _ in range(OUTPUTS)]
    y = [[sum(a * b for a, b in zip(row, w)) + draws.gauss(0, 0.1) for w in truth] for row in x]
    first = [draws.gauss(0, 0.5) for _ in range(INPUTS * OUTPUTS)]
    return x, y, first, set(draws.sample(range(INPUTS * OUTPUTS), 20))


def slow_gradient(x, y, weight):
    grad = [0.0] * (INPUTS * OUTPUTS)
    for row, wanted in zip(x, y):
        for o in range(OUTPUTS):
            error = sum(row[i] * weight[o * INPUTS + i] for i in range(INPUTS)) - wanted[o]
            for i in range(INPUTS):
                grad[o * INPUTS + i] += 2 * error * row[i] / SAMPLES
    return grad


@pytest.mark.parametrize(("drop", "grow"), [("magnitude", "gradient"), ("set", "random"), ("taylor", "gradient")])
@pytest.mark.parametrize("regrow", criteria.REGROW)
def test_a_training_run_equals_the_slow_one_step_by_step(drop, grow, regrow):
    x, y, slow, old = regression(7)
    xs, ys = torch.tensor(x), torch.tensor(y)
    slow = [value if i in old else 0.0 for i, value in enumerate(slow)]
    weight = torch.tensor(slow).view(OUTPUTS, INPUTS)
    mask = torch.tensor([i in old for i in range(INPUTS * OUTPUTS)]).view(OUTPUTS, INPUTS)
    moved = 0
    for step in range(1, 61):
        grad, slow_grad = 2 / SAMPLES * (xs @ weight.T - ys).T @ xs, slow_gradient(x, y, slow)
        if step % 5 == 0:
            fraction = 0.4 * (1 - step / 61)
            target = 20 - step // 20
            at = Slow(old, slow, slow_grad, [], [list(range(INPUTS * OUTPUTS))])
            (kept,) = slow_keep([at], [target], fraction, drop, regrow)
            state = MaskedWeight(mask, weight, grad, step=step)
            (ours,) = keep_weights([state], [target], drop_fraction=fraction, drop=drop, regrow=regrow)
            assert places(ours) == kept
            mask = grow_weights(state, ours, target, grow=grow, regrow=regrow)
            new = slow_grow(at, kept, target, "gradient", regrow) if grow == "gradient" else places(mask)
            assert places(mask) == new
            assert len(new) == target
            assert kept <= new
            assert regrow == "allow" or not (new - kept) & old
            moved += len(new - old)
            old = new
            weight = weight.masked_fill(~mask, 0)
            slow = [value if i in old else 0.0 for i, value in enumerate(slow)]
        weight = weight - RATE * grad.masked_fill(~mask, 0)
        slow = [w - RATE * g * (i in old) for i, (w, g) in enumerate(zip(slow, slow_grad))]
    assert moved >= 10
    assert weight.flatten().tolist() == pytest.approx(slow, abs=1e-4)


# ----------------------------------------------------------------------------------------------- worked by hand


def bits(text):
    """A mask of the rows that ``/`` separates."""
    return torch.tensor([[bit == "1" for bit in row] for row in text.split("/")])


def rows_of(values):
    return torch.tensor([values] if not isinstance(values[0], list) else values, dtype=torch.float32)


def as_text(mask):
    return "/".join("".join(str(int(bit)) for bit in row) for row in mask)


@pytest.mark.parametrize(
    ("method", "mask", "weight", "grad", "fraction", "more", "expected"),
    [
        # RigL: 2 of 5 go (1 and -2), the largest gradients of the rest come: -8 at the dropped 1's place, 7.
        ("magnitude", "11111000", [1, -2, 3, 4, -5, 0, 0, 0], [-8, 0, 9, 9, 9, 1, 7, 2], 0.4, {}, "10111010"),
        ("magnitude", "11111000", [1, -2, 3, 4, -5, 0, 0, 0], [-8, 0, 9, 9, 9, 1, 7, 2], 0.4, {"regrow": "forbid"},
         "00111011"),
        # Down to 4: one more of them goes, and 2 of 4 move.
        ("magnitude", "11111000", [1, -2, 3, 4, -5, 0, 0, 0], [-8, 0, 9, 9, 9, 1, 7, 2], 0.5, {"target": 4},
         "10111000"),
        # Up to 7, nothing moves: 2 more, of the three that are left; forbid or not.
        ("magnitude", "11111000", [1, -2, 3, 4, -5, 0, 0, 0], [-8, 0, 9, 9, 9, 1, 7, 2], 0, {"target": 7}, "11111011"),
        # Up to 8 and half of 5 (2, halves to even) are to move: full all the same.
        ("magnitude", "11111000", [1, -2, 3, 4, -5, 0, 0, 0], [-8, 0, 9, 9, 9, 1, 7, 2], 0.5, {"target": 8},
         "11111111"),
        # SET: 4 positive and 2 negative, 3 go: 2 positive and 1 negative, though -1 and -2 are the smallest.
        ("set", "11111100", [3, 4, 5, 6, -1, -2, 0, 0], [0, 0, 0, 0, 0, 0, 5, 5], 0,
         {"target": 3},
         "00110100"),
        ("set", "11111100", [3, 4, 5, 6, -1, -2, 0, 0], [0, 0, 0, 0, 9, 0, 5, 5], 0.5, {}, "00111111"),
        # 3 of 5 go, 0 first, then 1 of 2 positive and 1 of 2 negative.
        ("set", "11111000", [9, 8, -1, -2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 3, 2, 1], 0.6, {}, "10010111"),
        # 2 of 5 go, both zeros.
        ("set", "11111000", [9, 1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 3, 2, 1], 0.4, {}, "11100110"),
        # No negative weight: the 2 smallest of 4.
        ("set", "11110000", [4, 1, 3, 2, 0, 0, 0, 0], [0, 0, 0, 0, 1, 5, 0, 6], 0.5, {}, "10100101"),
        # Taylor: |w g| is 8, 3, 6, 10 and 5: 3 and 5 go.
        ("taylor", "11111000", [8, 1, -2, 10, 5, 0, 0, 0], [1, 3, 3, -1, -1, 9, 8, 0], 0.4, {}, "10110110"),
        ("taylor", "11110000", [8, 1, 1, 1, 0, 0, 0, 0], [0, 1, 2, 3, 9, 1, 1, 8], 0.25, {"regrow": "forbid"},
         "01111000"),
        # MEST: |w| + |g| is 8, 4, 6 and 5; with lambda 3 it is 8, 10, 12 and 13; with lambda 0 it is 8, 1, 3 and 1.5.
        ("mest", "11110000", [8, 1, -3, 1.5, 0, 0, 0, 0], [0, 3, 3, -3.5, 9, 1, 1, 8], 0.5, {"regrow": "forbid"},
         "10101001"),
        ("mest", "11110000", [8, 1, -3, 1.5, 0, 0, 0, 0], [0, 3, 3, -3.5, 9, 1, 1, 8], 0.5,
         {"regrow": "forbid", "mest_lambda": 3.0}, "00111001"),
        ("mest", "11110000", [8, 1, -3, 1.5, 0, 0, 0, 0], [0, 3, 3, -3.5, 9, 1, 1, 8], 0.25,
         {"regrow": "forbid", "mest_lambda": 0.0}, "10111000"),
        # 2:4 keeps the best 2 of 4 over the whole row; what a group lost it grows: 2 in the second one.
        ("magnitude", "11001100", [7, 6, 0, 0, 1, 2, 0, 0], [9, 9, 9, 8, 1, 2, 3, 4], 0.5, {"structure": "2:4"},
         "11000011"),
        # A kernel-less row of three groups: the first loses one and grows at 8, the second loses one and takes it back.
        ("magnitude", "110011000011", [1, 6, 0, 0, 2, 5, 0, 0, 0, 0, 3, 4], [1, 0, 8, 2, 3, 0, 2, 1, 9, 9, 0, 0], 0.33,
         {"structure": "2:4"}, "011011000011"),
        ("magnitude", "110011000011", [1, 6, 0, 0, 2, 5, 0, 0, 0, 0, 3, 4], [1, 0, 8, 2, 3, 0, 2, 1, 9, 9, 0, 0], 0.33,
         {"structure": "2:4", "regrow": "forbid"}, "011001100011"),
        # 3:4 without regrowth: a group cannot lose more than its one inactive place takes up, so 4 and 7 stay.
        ("magnitude", "11101110", [4, 1, 2, 0, 7, 8, 9, 0], [0, 0, 0, 1, 0, 0, 0, 1], 1 / 3,
         {"structure": "3:4", "regrow": "forbid"}, "10110111"),
        # From dense to 2:4, to 3 of 4 first: the best of each group, however small.
        ("magnitude", "11111111", [9, 8, 7, 6, 1, 2, 3, 4], [0, 0, 0, 0, 0, 0, 0, 0], 0,
         {"structure": "2:4", "target": 6}, "11100111"),
        # Constant fan-in: 3 of 6 go, all 3 of the second row, which grows 3.
        ("magnitude", "11100/11100", [[9, 8, 7, 0, 0], [1, 2, 3, 0, 0]], [[9, 9, 9, 9, 9], [5, 0, 1, 4, 3]], 0.5,
         {"structure": "constant_fan_in"}, "11100/10011"),
        # Without regrowth the second row can lose 2 only, so 7 goes as well.
        ("magnitude", "11100/11100", [[9, 8, 7, 0, 0], [1, 2, 3, 0, 0]], [[9, 9, 9, 8, 9], [5, 0, 1, 4, 3]], 0.5,
         {"structure": "constant_fan_in", "regrow": "forbid"}, "11001/00111"),
        # Transposed, the columns are the units: one of each is left, and may move.
        ("magnitude", "11/10/01", [[5, 1], [4, 0], [0, 2]], [[0, 0], [1, 3], [2, 0]], 0.5,
         {"structure": "constant_fan_in", "transposed": True, "target": 2}, "10/01/00"),
        # 1:2 along the columns: 2 goes and its neighbour below grows.
        ("magnitude", "11/00/10/01", [[5, 2], [0, 0], [4, 0], [0, 3]], [[0, 0], [0, 1], [0, 0], [0, 0]], 0.25,
         {"structure": "1:2", "transposed": True}, "10/01/10/01"),
    ],
)  # fmt: skip
def test_by_hand(method, mask, weight, grad, fraction, more, expected):
    how = {"drop_fraction": fraction, "drop": method} | more
    assert as_text(update_mask(bits(mask), rows_of(weight), rows_of(grad), **how)) == expected


def test_set_by_hand_is_random_in_what_grows():
    mask, weight = bits("1111110000"), rows_of([3, 4, 5, 6, -1, -2, 0, 0, 0, 0])
    seen = Counter(
        as_text(update_mask(mask, weight, drop_fraction=0.5, drop="set", grow="random", regrow="forbid", step=step))
        for step in range(100)
    )
    three_of_four = ["".join(p) for p in sorted(set(itertools.permutations("1110")))]
    assert sorted(seen) == ["001101" + grown for grown in three_of_four]
    assert all(10 < count < 40 for count in seen.values())


@pytest.mark.parametrize(
    ("weights", "masks", "fraction", "regrow", "targets", "expected"),
    [
        # One of each three, so two of the six go, wherever they are: both in the second tensor.
        ([[9, 8, 7, 0], [1, 2, 3, 0]], ["1110", "1110"], 0.3, "allow", None, ["1110", "0010"]),
        # Without regrowth a tensor cannot lose more than its one inactive place takes up: 2 stays, 7 goes instead.
        ([[9, 8, 7, 0], [1, 2, 3, 0]], ["1110", "1110"], 0.3, "forbid", None, ["1100", "0110"]),
        # The first is to shrink to 1, so it keeps no more; the second keeps all it can.
        ([[9, 8, 7, 0, 0], [1, 2, 3, 0, 0]], ["11100", "11100"], 0, "allow", [1, 3], ["10000", "11100"]),
        # Each rounds its own share: none of 1 weight, 2 of 3; then the smallest 2 of all 4 go.
        ([[1, 0], [2, 3, 4, 0]], ["10", "1110"], 0.5, "allow", None, ["00", "0110"]),
    ],
)
def test_global_magnitude_by_hand(weights, masks, fraction, regrow, targets, expected):
    states = [MaskedWeight(bits(mask), rows_of(weight), name=mask) for mask, weight in zip(masks, weights)]
    targets = targets or [state.active for state in states]
    how = {"drop_fraction": fraction, "drop": "global_magnitude", "regrow": regrow}
    assert [as_text(mask) for mask in keep_weights(states, targets, **how)] == expected


# -------------------------------------------------------------------------------------------------- random draws


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
@quickly(40)
@given(data=st.data())
def test_gradient_random_takes_its_share_of_the_largest(share, data):
    case = data.draw(cases(["unstructured"], distinct_values, [torch.float32]))
    regrow, fraction = data.draw(regrows), data.draw(fractions)
    how = {"drop_fraction": fraction, "drop": "magnitude", "regrow": regrow}
    state = MaskedWeight(**case.fields, random_share=share)
    (kept,) = keep_weights([state], [case.target], **how)
    new = places(grow_weights(state, kept, case.target, grow="gradient_random", regrow=regrow))
    missing, grad = case.target - int(kept.sum()), state.grad.abs().flatten().tolist()
    barred = places(kept if regrow == "allow" else state.mask)
    ranked = sorted((i for i in range(state.size) if i not in barred), key=lambda i: -grad[i])
    greedy = set(ranked[: round((1 - share) * missing)])
    grown = new - places(kept)
    assert len(grown) == missing
    assert greedy <= grown
    assert grown - greedy <= set(ranked) - greedy
    if share == 0:
        assert new == places(grow_weights(state, kept, case.target, grow="gradient", regrow=regrow))


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "constant_fan_in"])
def test_a_random_share_of_none_is_the_gradient(structure):
    mask = random_mask((32, 40), 640, seed=0, structure=structure)
    weight, grad = torch.rand(32, 40), torch.rand(32, 40)
    how = {"drop_fraction": 0.6, "structure": structure}
    mixed = update_mask(mask, weight, grad, grow="gradient_random", random_share=0.0, **how)
    assert torch.equal(mixed, update_mask(mask, weight, grad, grow="gradient", **how))


def test_groups_share_in_the_random_growth():
    # 1000 groups miss one weight each: 3 in 10 draw it, the others take the largest gradient.
    mask = torch.zeros(1000, 8, dtype=torch.bool)
    grad = torch.arange(8.0).repeat(1000, 1)
    state = MaskedWeight(mask, torch.zeros(1000, 8), grad, random_share=0.3, structure="constant_fan_in")
    grown = grow_weights(state, mask, 1000, grow="gradient_random")
    assert (grown.sum(1) == 1).all()
    assert abs(int(grown[:, 7].sum()) - 1000 * (0.7 + 0.3 / 8)) < 60
    state = MaskedWeight(mask, torch.zeros(1000, 8), grad, random_share=0.5, structure="constant_fan_in")
    grown = grow_weights(state, mask, 6000, grow="gradient_random")
    assert grown[:, 5:].all()
    assert ((grown[:, :5].float().mean(0) - 0.6).abs() < 0.07).all()


# Of places drawn without replacement the squared deviations have n - 1 degrees of freedom, times n / (n - 1).
@pytest.mark.parametrize("grow", ["random", "gradient_random"])
def test_random_growth_is_uniform(grow):
    # 12 places of 16 are free and 4 of them grow: by one draw of 400 tensors, or of 4000 rows at a time.
    free, share = torch.arange(16) % 4 != 0, 4 / 12
    tall = torch.arange(16.0).repeat(4000, 1)
    rows = MaskedWeight(~free.repeat(4000, 1), tall, grad=tall, random_share=1.0, step=5, structure="constant_fan_in")
    in_rows = grow_weights(rows, rows.mask, 4000 * 8, grow=grow, regrow="forbid").sum(0)
    in_tensors = torch.zeros(16)
    for step in range(400):
        state = MaskedWeight(rows.mask[:1], tall[:1], tall[:1], random_share=1.0, step=step)
        in_tensors += grow_weights(state, state.mask, 8, grow=grow, regrow="forbid")[0]
    for seen, draws in ((in_rows[free], 4000), (in_tensors[free], 400)):
        assert seen.sum() == 4 * draws
        chi_squared = ((seen - draws * share) ** 2 / (draws * share * (1 - share))).sum() * 11 / 12
        assert chi_squared < 24.7  # 11 degrees of freedom, 1 %


@pytest.mark.parametrize(("exponent", "keep"), [(1.0, 4), (3.0, 3)])
def test_soft_magnitude_includes_each_set_as_often_as_successive_draws(exponent, keep):
    values = [0.5, -0.8, 1.0, -1.3, 1.7, 2.5]
    weight = rows_of([*values, 0, 0, 0, 0])
    mask = weight != 0
    force = [abs(value) ** exponent for value in values]
    expected = Counter()
    for order in itertools.permutations(range(6), keep):
        chance, left = 1.0, sum(force)
        for i in order:
            chance, left = chance * force[i] / left, left - force[i]
        expected[frozenset(order)] += chance
    assert sum(expected.values()) == pytest.approx(1)
    draws, seen = 600, Counter()
    for step in range(draws):
        state = MaskedWeight(mask, weight, exponent=exponent, seed=1, step=step)
        (kept,) = keep_weights([state], [6], drop_fraction=1 - keep / 6, drop="soft_magnitude")
        seen[frozenset(places(kept))] += 1
    # Rare sets together, so that each class expects at least five.
    rare = [chosen for chosen, chance in expected.items() if draws * chance < 5]
    classes = [[chosen] for chosen in expected if chosen not in rare] + [rare] * bool(rare)
    pairs = [(sum(seen[c] for c in group), draws * sum(expected[c] for c in group)) for group in classes]
    freedom = len(pairs) - 1
    chi_squared = sum((count - mean) ** 2 / mean for count, mean in pairs)
    assert chi_squared < freedom + 2.33 * (2 * freedom) ** 0.5 + 2  # about 1 %


# ------------------------------------------------------------------------------------------------------- counts


shapes_of_tensors = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    ),
    min_size=1,
)


@pytest.mark.parametrize("distribution", densities.DISTRIBUTIONS)
@quickly(100)
@given(shapes=shapes_of_tensors, density=st.floats(0.02, 1))
def test_counts_are_exact_and_fit(distribution, shapes, density):
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(sizes.values()))
    assume(total >= 1)
    counts = active_counts(shapes, density, distribution)
    assert sum(counts.values()) == total
    assert all(0 <= counts[name] <= sizes[name] for name in shapes)
    assert all(counts.values()) or total < len(shapes)
    assert list(counts) == list(shapes)
    if density == 1:
        assert counts == sizes


@quickly(100)
@given(shapes=shapes_of_tensors, density=st.floats(0.02, 1), data=st.data())
def test_counts_with_fixed_densities_fit(shapes, density, data):
    fixed = data.draw(st.dictionaries(st.sampled_from(sorted(shapes)), st.sampled_from([0.1, 0.5, 0.9, 1.0])))
    assume(fixed.keys() < shapes.keys())
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    try:
        counts = active_counts(shapes, density, fixed=fixed)
    except ValueError as error:
        assert "densities: the" in str(error)
        return
    assert sum(counts.values()) == round(density * sum(sizes.values()))
    assert all(0 <= counts[name] <= sizes[name] for name in shapes)
    assert all(counts[name] == max(1, round(value * sizes[name])) for name, value in fixed.items())


@quickly(100)
@given(sizes=st.lists(st.tuples(st.integers(10, 60), st.sampled_from([0.1, 0.5, 1.0])), min_size=1, max_size=8))
@example(sizes=[(60, 1.0), (13, 0.5), (17, 0.5)])  # 6.5 and 8.5 round down, and the largest is full
def test_fixed_densities_of_everything_fit(sizes):
    shapes = {str(i): (size, 1) for i, (size, _) in enumerate(sizes)}
    fixed = {str(i): density for i, (_, density) in enumerate(sizes)}
    density = sum(size * share for size, share in sizes) / sum(size for size, _ in sizes)
    counts = active_counts(shapes, density, fixed=fixed)
    assert sum(counts.values()) == round(density * sum(size for size, _ in sizes))
    assert all(0 < counts[name] <= prod(shape) for name, shape in shapes.items())


@quickly(100)
@given(shapes=shapes_of_tensors, density=st.floats(0.1, 1), data=st.data())
def test_flops_gives_every_tensor_as_many_multiplications(shapes, density, data):
    uses = {name: data.draw(st.integers(1, 50)) for name in shapes}
    assume(round(density * sum(map(prod, shapes.values()))) >= 1)
    counts = active_counts(shapes, density, "flops", uses=uses)
    assume(all(count > 1 for count in counts.values()))  # a tensor that would be left without a weight has got one
    open_ones = [name for name in shapes if counts[name] < prod(shapes[name])]
    for one, other in itertools.combinations(open_ones, 2):
        assert abs(counts[one] * uses[one] - counts[other] * uses[other]) < uses[one] + uses[other]
    for name in shapes:  # a full tensor would have had more than it holds
        if name not in open_ones and open_ones:
            assert (
                counts[name] * uses[name]
                <= max(counts[other] * uses[other] + uses[other] for other in open_ones) + (uses[name])
            )


def test_what_costs_nothing_stays_dense():
    shapes = {"embed": (10, 4), "a": (10, 10), "b": (10, 10)}
    counts = active_counts(shapes, 0.5, "flops", uses={"embed": 0, "a": 1, "b": 3})
    assert counts == {"embed": 40, "a": 60, "b": 20}
    with pytest.raises(ValueError, match="embed cost nothing, would stay dense and need 16 more active weights"):
        active_counts(shapes, 0.1, "flops", uses={"embed": 0})


allocations = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.tuples(st.one_of(st.just(0.0), st.just(1e-30), st.floats(0, 1e6), st.fractions(0, 9)), st.integers(0, 500)),
    min_size=1,
)


@quickly(100)
@given(each=allocations, data=st.data())
def test_allocation_is_exact_and_keeps_to_the_room(each, data):
    shares, room = ({name: pair[i] for name, pair in each.items()} for i in (0, 1))
    budget = data.draw(st.integers(0, sum(room.values())))
    given_ = allocate(budget, shares, room)
    assert sum(given_.values()) == budget
    assert list(given_) == list(shares)
    assert all(0 <= given_[name] <= room[name] for name in shares)
    open_ones = [name for name in shares if given_[name] < room[name]]
    for one, other in itertools.permutations(open_ones, 2):  # in proportion, but for one that a remainder brings
        assert (given_[one] - 1) * Fraction(shares[other]) <= (given_[other] + 1) * Fraction(shares[one])
    whole = sum(map(Fraction, shares.values()))
    if whole and all(budget * Fraction(shares[name]) <= room[name] * whole for name in shares):
        assert all(abs(given_[name] - budget * Fraction(shares[name]) / whole) < 1 for name in shares)
    if not budget:
        assert not any(given_.values())


@pytest.mark.parametrize("budget", [-1, 11])
def test_no_more_is_allocated_than_there_is_room(budget):
    with pytest.raises(ValueError, match=rf"budget is {budget}; accepted: 0 to 10, the room there is"):
        allocate(budget, {"a": 1, "b": 0}, {"a": 4, "b": 6})


@pytest.mark.parametrize(
    ("budget", "shares", "room", "expected"),
    [
        (10, {"a": 1, "b": 1}, {"a": 100, "b": 100}, {"a": 5, "b": 5}),
        (10, {"a": 3, "b": 1}, {"a": 100, "b": 100}, {"a": 8, "b": 2}),  # 7.5 and 2.5: the first of equal remainders
        (10, {"a": 3, "b": 1}, {"a": 4, "b": 100}, {"a": 4, "b": 6}),
        (10, {"a": 1, "b": 0}, {"a": 4, "b": 100}, {"a": 4, "b": 6}),
        (10, {"a": 0, "b": 0}, {"a": 4, "b": 100}, {"a": 4, "b": 6}),
        (10, {"a": inf, "b": 1}, {"a": 4, "b": 100}, {"a": 4, "b": 6}),
        (10, {"a": 1, "b": 1, "c": 1}, {"a": 100, "b": 100, "c": 100}, {"a": 4, "b": 3, "c": 3}),
    ],
)
def test_allocation_by_hand(budget, shares, room, expected):
    assert allocate(budget, shares, room) == expected


ends = st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(st.integers(0, 5000), st.integers(0, 5000)), min_size=1)


@quickly(100)
@given(both=ends, progress=st.lists(st.floats(0, 1), max_size=20))
def test_falling_counts_are_exact_and_never_rise(both, progress):
    first, last = ({name: each(pair) for name, pair in both.items()} for each in (max, min))
    now = falling_counts(first, first, last, 0.0)
    assert now == first
    for share in sorted(progress):
        before, now = now, falling_counts(now, first, last, share)
        exact = {name: first[name] + Fraction(share) * (last[name] - first[name]) for name in first}
        assert sum(now.values()) == round(sum(exact.values()))
        assert all(last[name] <= now[name] <= before[name] for name in now)
        assert all(abs(now[name] - exact[name]) <= len(now) for name in now)
    assert falling_counts(now, first, last, 1.0) == last


@quickly(100)
@given(
    tensors=st.dictionaries(
        st.sampled_from("abcdefgh"), st.tuples(st.integers(1, 60), st.integers(1, 30), st.floats(0, 1)), min_size=1
    )
)
def test_structured_counts_are_multiples_and_near(tensors):
    shapes = {name: (groups, length) for name, (groups, length, _) in tensors.items()}
    groups = {name: shape[0] for name, shape in shapes.items()}
    wanted = {name: max(groups[name], round(share * prod(shapes[name]))) for name, (_, _, share) in tensors.items()}
    counts = structured_counts(wanted, shapes, groups)
    assert list(counts) == list(wanted)
    for name, count in counts.items():
        assert count % groups[name] == 0
        assert groups[name] <= count <= prod(shapes[name])
        assert floor(wanted[name] / groups[name]) * groups[name] <= count <= wanted[name] + groups[name]
    full = any(counts[name] == prod(shapes[name]) for name in counts)
    assert abs(sum(counts.values()) - sum(wanted.values())) <= max(groups.values()) / 2 or full


def test_a_group_is_not_left_without_a_weight():
    with pytest.raises(ValueError, match=r"the density of a \[10, 4\] leaves 4 weights for 10 groups; .*density 0\.25"):
        structured_counts({"a": 4}, {"a": (10, 4)}, {"a": 10})


@quickly(100)
@given(
    each=st.dictionaries(
        st.sampled_from("abcdefgh"),
        st.tuples(st.integers(0, 300), st.integers(0, 300), st.floats(0, 1e4)),
        min_size=1,
    ),
    data=st.data(),
)
def test_redistribution_is_exact_and_fits(each, data):
    kept, room, shares = ({name: of[i] for name, of in each.items()} for i in range(3))
    total = sum(kept.values()) + data.draw(st.integers(0, sum(room.values())))
    targets = redistribute(kept, room, total, shares)
    assert sum(targets.values()) == total
    assert all(kept[name] <= targets[name] <= kept[name] + room[name] for name in kept)


def test_redistribution_by_hand():
    # 30 of 90 grow, as 1 : 4: 6 and 24; with room for 10 only the others take 14 more.
    assert redistribute({"a": 30, "b": 30}, {"a": 99, "b": 99}, 90, {"a": 0.5, "b": 2.0}) == {"a": 36, "b": 54}
    assert redistribute({"a": 30, "b": 30}, {"a": 99, "b": 10}, 90, {"a": 0.5, "b": 2.0}) == {"a": 50, "b": 40}


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "global"}, r"drop is 'global'; accepted: global_magnitude, .*\(did you mean 'global_magnitude'\?\)"),
        ({"drop": None}, r"drop is None; accepted: global_magnitude, magnitude, mest"),
        ({"grow": "gradient_randon"}, r"grow is 'gradient_randon'; .*\(did you mean 'gradient_random'\?\)"),
        ({"grow": "magnitude"}, r"grow is 'magnitude'; accepted: gradient, gradient_random, momentum, random$"),
        ({"regrow": "allowed"}, r"regrow is 'allowed'; accepted: allow, forbid \(did you mean 'allow'\?\)"),
        ({"drop_fraction": -0.1}, r"drop_fraction is -0\.1; accepted: a number in \[0, 1\]"),
        ({"drop_fraction": 1.0001}, r"drop_fraction is 1\.0001; accepted"),
        ({"drop_fraction": nan}, r"drop_fraction is nan; accepted"),
        *(({"structure": name}, rf"structure is '{name}'; accepted: unstructured, constant_fan_in, or N:M with 1 <= N")
          for name in ("5:4", "0:4", "a:b", "2:4:1", "dense", "2:", ":4", "-2:4", "2.0:4", "")),
        ({"structure": "3:5"}, r"structure 3:5 needs input dimensions divisible by 5; one is 12, of a weight"),
        ({"structure": "2:4", "transposed": True}, r"input dimensions divisible by 4; one is 6, of a weight \[6, 12\]"),
        ({"structure": "2:4", "mask": bits("/".join(["111100001001"] * 6))},
         r"the mask of a\.weight: groups hold 0 to 4 active weights; structure 2:4 has as many in each"),
        ({"structure": "constant_fan_in", "transposed": True}, r"the mask of a\.weight: groups hold 0 to 6"),
        ({"structure": "4:6"}, r"the mask of a\.weight: groups of 6 hold 3 active weights; structure 4:6 has 4"),
        ({"structure": "constant_fan_in", "target": 37}, r"target is 37 for a\.weight; .* multiples of its 6 groups"),
        ({"target": -1}, r"target is -1 for 72 weights; accepted: 0 to 72"),
        ({"target": 73}, r"target is 73 for 72 weights; accepted: 0 to 72"),
        *(({kind: torch.full((6, 12), bad)}, rf"the {word} of a\.weight has values that are not finite; accepted: fin")
          for bad in (nan, inf, -inf)
          for kind, word in (("weight", "weight"), ("grad", "gradient"), ("momentum", "momentum"))),
        ({"mask": torch.ones(6, 12)}, r"the mask of a\.weight is torch\.float32 .*; accepted: torch\.bool \[6, 12\]"),
        ({"grad": torch.zeros(2, 2)}, r"the gradient of a\.weight is \[2, 2\]; accepted: \[6, 12\]"),
        ({"momentum": torch.zeros(6, 11)}, r"the momentum of a\.weight is \[6, 11\]; accepted: \[6, 12\]"),
        ({"grad": None}, r"needs the gradient of a\.weight; it has none"),
        ({"grad": None, "drop": "taylor", "grow": "random"}, r"needs the gradient of a\.weight; it has none"),
        ({"grad": None, "drop": "mest", "grow": "random"}, r"needs the gradient of a\.weight; it has none"),
        ({"grad": None, "grow": "gradient_random"}, r"needs the gradient of a\.weight; it has none"),
        ({"momentum": None, "grow": "momentum"}, r"needs the momentum of a\.weight; it has none"),
        ({"exponent": 0}, r"exponent is 0; accepted: a number above 0"),
        ({"exponent": -1.0}, r"exponent is -1\.0; accepted: a number above 0"),
        ({"mest_lambda": -1.0}, r"mest_lambda is -1\.0; accepted: a number from 0"),
        ({"random_share": 1.5}, r"random_share is 1\.5; accepted: a number in \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    mask = bits("/".join(["101010101010"] * 6))
    values = {"weight": torch.ones(6, 12), "grad": torch.ones(6, 12), "momentum": torch.ones(6, 12)}
    arguments = {"mask": mask, "drop_fraction": 0.5, "name": "a.weight"} | values | change
    with pytest.raises(ValueError, match=message):
        update_mask(**arguments)
