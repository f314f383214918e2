"""How many weights of each tensor are active: by hand, and what holds of every distribution."""

import itertools
from fractions import Fraction
from math import floor, inf, prod

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

import nt_hf.models.wide_resnet  # noqa: F401 (which Transformers lacks)
from nt_hf.models.masks import attach_masks, masked_modules
from nt_hf.sparsity import densities
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.densities import active_counts, allocate, falling_counts, redistribute, structured_counts
from nt_hf.sparsity.first_masks import target_counts

SHAPES = {"embed": (50, 16), "up": (48, 16), "down": (16, 48), "conv": (8, 4, 3, 3), "tiny": (2, 2), "row": (1, 7)}


def quickly(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------------------------------------------- by hand


# Worked by hand. ERK gives active weights in proportion to sum(shape): a 10, b 16, c 4. At density 0.5 of 92 weights,
# c's 46 * 4 / 30 = 6.1 exceeds its 4; the other 42 go 10 : 16, that is 16.15 and 25.85.
@pytest.mark.parametrize(
    ("shapes", "density", "distribution", "expected"),
    [
        ({"a": (4, 6), "b": (8, 8), "c": (2, 2)}, 0.5, "erk", {"a": 16, "b": 26, "c": 4}),
        ({"a": (4, 6), "b": (8, 8), "c": (2, 2)}, 0.5, "er", {"a": 16, "b": 26, "c": 4}),
        ({"a": (4, 6), "b": (8, 8), "c": (2, 2)}, 0.5, "uniform", {"a": 12, "b": 32, "c": 2}),
        # c is capped first (16.4 of its 16), which lifts b (3.85) to its full 4.
        ({"a": (3, 3), "b": (2, 2), "c": (16, 1)}, 26 / 29, "erk", {"a": 6, "b": 4, "c": 16}),
        # Convolutions: 34 weights as 11 : 13; er leaves the kernel out of the sums, 5 * 9 : 9 * 4.
        ({"k3": (2, 3, 3, 3), "k2": (4, 5, 2, 2)}, 0.25, "erk", {"k3": 16, "k2": 18}),
        ({"k3": (2, 3, 3, 3), "k2": (4, 5, 2, 2)}, 0.25, "er", {"k3": 19, "k2": 15}),
        ({"a": (10, 10), "b": (10, 10)}, 1.0, "erk", {"a": 100, "b": 100}),
        ({"a": (3, 1), "b": (3, 1), "c": (3, 1)}, 4 / 9, "uniform", {"a": 2, "b": 1, "c": 1}),
        # Nothing is left without a weight while there is one for each.
        ({"big": (100, 100), "small": (1, 2)}, 10 / 10002, "uniform", {"big": 9, "small": 1}),
        ({}, 0.5, "erk", {}),
    ],
)
def test_counts_worked_by_hand(shapes, density, distribution, expected):
    assert active_counts(shapes, density, distribution) == expected


def test_erk_at_130m_leaves_the_blocks_almost_dense():
    # The reference's sizes: 12 blocks, 8 of them in each of 3 heads; method.md reports attention 1.0 and MLP 0.98.
    block = {f"{name}_proj": (768, 768) for name in "qkvo"} | {
        "gate": (2048, 768),
        "up": (2048, 768),
        "down": (768, 2048),
    }
    shapes = {f"{i}.{name}": shape for i in range(4 + 3 * 8) for name, shape in block.items()}
    shapes |= {"embed": (32000, 768)} | {f"lm_heads.{h}": (32000, 768) for h in range(3)}
    counts = active_counts(shapes, 0.9)
    assert counts["0.q_proj"] == 768 * 768
    assert counts["0.up"] / (768 * 2048) == pytest.approx(0.98, abs=0.005)


def test_fixed_groups_keep_their_density_and_the_rest_takes_the_remainder():
    counts = active_counts(SHAPES, 0.5, "erk", {"embed": 1.0, "conv": 0.25})
    assert counts["embed"] == 800
    assert counts["conv"] == 72
    assert sum(counts.values()) == round(0.5 * sum(map(prod, SHAPES.values())))


def test_groups_over_everything_must_agree_with_the_density():
    shapes = {"a": (3, 1), "b": (3, 1), "c": (3, 1), "d": (3, 1)}
    assert sum(active_counts(shapes, 0.5, fixed=dict.fromkeys(shapes, 0.5)).values()) == 6  # each would round to 2
    with pytest.raises(ValueError, match=r"density=0\.9: accepted is 0\.5, .* cover every weight"):
        active_counts({"a": (10, 10)}, 0.9, fixed={"a": 0.5})


@pytest.mark.parametrize(
    ("density", "fixed", "message"),
    [
        (0.2, {"embed": 1.0}, r"leaves -273 for the 1835 other weights; accepted are 1 to 1835"),
        (0.9, {"embed": 0.1}, r"leaves 2292 for the 1835 other weights"),
        (0.5, {"head": 0.1}, r"densities='head': accepted is embed, up"),
        (0.5, {"embed": 0.0}, r"densities: embed=0\.0: accepted is a number in \(0, 1\]"),
        (0.0, {}, r"density=0\.0: accepted is a number in \(0, 1\]"),
        (1.5, {}, r"density=1\.5"),
        (float("nan"), {}, r"density=nan"),
        ("0.5", {}, r"density='0\.5'"),
    ],
)
def test_impossible_densities(density, fixed, message):
    with pytest.raises(ValueError, match=message):
        active_counts(SHAPES, density, fixed=fixed)


def test_unknown_distribution():
    with pytest.raises(ValueError, match=r"^distribution='erd': accepted is uniform, .* \(did you mean er"):
        active_counts(SHAPES, 0.5, "erd")


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
    with pytest.raises(ValueError, match="embed: cost nothing, would stay dense and need 16 more active weights"):
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
    with pytest.raises(ValueError, match=rf"budget={budget}: accepted is a whole number from 0 to 10"):
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
    with pytest.raises(ValueError, match=r"the density of a \[10, 4\]: leaves 4 weights for 10 groups; .* 0\.25"):
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


# ------------------------------------------------------------------------------------------- RigL's distribution

NETWORKS = {
    "ResNet-50": lambda: AutoConfig.for_model("resnet", num_labels=1000),
    "WRN-28-10": lambda: AutoConfig.for_model("wide_resnet", num_labels=100),
    "ViT-S": lambda: AutoConfig.for_model(
        "vit", hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    ),
}


def rigl_densities(shapes, density):
    """Erdős–Rényi-Kernel densities as Evci et al. 2020 (section 3, point 1) define them.

    In proportion to (n_in + n_out + height + width) / (n_in * n_out * height * width), of a linear layer to
    (n_in + n_out) / (n_in * n_out). What would exceed 1 is made dense, and the factor is solved for the others again.
    """
    raw = {name: sum(shape) / prod(shape) for name, shape in shapes.items()}
    dense = set()
    while True:
        budget = density * sum(map(prod, shapes.values())) - sum(prod(shapes[name]) for name in dense)
        factor = budget / sum(raw[name] * prod(shapes[name]) for name in shapes if name not in dense)
        exceeding = {name for name in shapes if name not in dense and factor * raw[name] > 1}
        if not exceeding:
            return {name: 1.0 if name in dense else factor * raw[name] for name in shapes}
        dense |= exceeding


@pytest.mark.parametrize("density", [0.2, 0.1])
@pytest.mark.parametrize("network", NETWORKS)
def test_erk_is_that_of_rigl(network, density):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(NETWORKS[network]())
    modules = [x for x in model.modules() if isinstance(x, (nn.Linear, nn.Conv2d))]
    attach_masks(model, ["*"])
    counts = target_counts(model, SparsityConfig(density=density, distribution="erk"))
    shapes = {name: tuple(module.weight.shape) for name, module in masked_modules(model).items()}
    assert len(shapes) == len(modules)
    expected = rigl_densities(shapes, density)
    assert len(set(expected.values())) > 3
    off = {name: abs(counts[name] - expected[name] * prod(shape)) for name, shape in shapes.items()}
    assert max(off.values()) < 1, max(off, key=off.get)
