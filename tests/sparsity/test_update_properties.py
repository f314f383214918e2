"""One update against a plain slow one, and what holds of every update whatever the shape, structure or method."""

import itertools
import random
import threading
from collections import Counter
from math import prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from update_cases import (
    SLOW_GROW,
    STRUCTURES,
    Case,
    Slow,
    cases,
    distinct_values,
    fractions,
    places,
    quickly,
    regrows,
    slow_groups,
    slow_grow,
    slow_keep,
    slow_number_kept,
    values_with_ties,
)

from nt_hf.models.masks import check_structure, group_count
from nt_hf.sparsity import criteria, selection, update
from nt_hf.sparsity.criteria import MaskedWeight
from nt_hf.sparsity.update import best_scores, grow_weights, keep_weights, random_mask, update_mask

KEPT_EXACTLY = ["magnitude", "set", "taylor", "mest"]  # what follows from the values alone, tensor by tensor


@pytest.fixture(autouse=True, scope="module")
def small():
    """Chunks and samples so small that small tensors have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(selection._CHUNK, "cpu", 100)
        patch.setattr(selection, "_SAMPLE", 64)
        yield


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


# -------------------------------------------------------------------------------------------------- random draws


def rows_of(values):
    return torch.tensor([values] if not isinstance(values[0], list) else values, dtype=torch.float32)


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
