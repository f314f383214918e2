"""Densities, noise, selection and one mask update, all without a model."""

from math import prod

import pytest
import torch

from nt_hf.sparsity import criteria, selection, update
from nt_hf.sparsity.densities import active_counts
from nt_hf.sparsity.update import move_counts, random_mask, update_mask

SHAPES = {"embed": (50, 16), "up": (48, 16), "down": (16, 48), "conv": (8, 4, 3, 3), "tiny": (2, 2), "row": (1, 7)}


def tensors(shape=(40, 30), density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(shape, round(density * prod(shape)), seed=seed)
    weight = torch.randn(shape, generator=generator).masked_fill_(~mask, 0)
    return mask, weight, torch.randn(shape, generator=generator)


# ---------------------------------------------------------------------------------------------------- densities


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
    with pytest.raises(ValueError, match=r"cover every weight and give density 0\.5; .* it is 0\.9"):
        active_counts({"a": (10, 10)}, 0.9, fixed={"a": 0.5})


@pytest.mark.parametrize(
    ("density", "fixed", "message"),
    [
        (0.2, {"embed": 1.0}, r"leaves -273 for the 1835 other weights; accepted: 1 to 1835"),
        (0.9, {"embed": 0.1}, r"leaves 2292 for the 1835 other weights"),
        (0.5, {"head": 0.1}, r"head is no tensor among embed, up"),
        (0.5, {"embed": 0.0}, r"the density of embed is 0\.0; accepted: a number in \(0, 1\]"),
        (0.0, {}, r"density is 0\.0; accepted: a number in \(0, 1\]"),
        (1.5, {}, r"density is 1\.5"),
        (float("nan"), {}, r"density is nan"),
        ("0.5", {}, r"density is '0\.5'"),
    ],
)
def test_impossible_densities(density, fixed, message):
    with pytest.raises(ValueError, match=message):
        active_counts(SHAPES, density, fixed=fixed)


# -------------------------------------------------------------------------------------------------- random masks


@pytest.mark.parametrize("shape", [(3, 5), (300, 1000), (4, 3, 3, 3)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_random_mask_has_the_exact_count(shape, share):
    active = round(share * prod(shape))
    mask = random_mask(shape, active, seed=1, name="a")
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert mask.sum() == active
    assert torch.equal(mask, random_mask(shape, active, seed=1, name="a"))


def test_random_masks_of_other_names_and_seeds_are_independent():
    first = random_mask((100, 100), 5000, seed=0, name="a")
    for other in (random_mask((100, 100), 5000, seed=0, name="b"), random_mask((100, 100), 5000, seed=1, name="a")):
        assert 0.46 < (first == other).float().mean() < 0.54


def test_random_mask_refuses_an_impossible_count():
    with pytest.raises(ValueError, match=r"active is 7 for a tensor of shape \[2, 3\]; accepted: 0 to 6"):
        random_mask((2, 3), 7, seed=0)


# --------------------------------------------------------------------------------------------------- the update


# One row: 0 1 2 3 4 5 6 7. Magnitude keeps the largest |w|, gradient grows at the largest |g|.
@pytest.mark.parametrize(
    ("mask", "weight", "grad", "fraction", "regrow", "expected"),
    [
        # 2 of 4 move; 1 and 3 are dropped, 5 and 7 grow.
        ("11110000", [4, -1, 3, 2, 0, 0, 0, 0], [0, 0, 0, 0, 1, 5, 0, -6], 0.5, "allow", "10100101"),
        # The dropped 1 has the largest gradient of all and is taken back.
        ("11110000", [4, -1, 3, 2, 0, 0, 0, 0], [0, 9, 0, 0, 1, 5, 0, -6], 0.5, "allow", "11100001"),
        ("11110000", [4, -1, 3, 2, 0, 0, 0, 0], [0, 9, 0, 0, 1, 5, 0, -6], 0.5, "forbid", "10100101"),
        # 3 are to move, one position is free: "forbid" moves one.
        ("11111110", [7, 6, 5, 4, 3, 2, 1, 0], [9, 9, 9, 9, 9, 9, 9, 1], 0.43, "forbid", "11111101"),
        ("11111110", [7, 6, 5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 3, 2, 1, 9], 0.43, "allow", "11111101"),
        # A weight that is zero although active goes first.
        ("11100000", [-1, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0], 1 / 3, "allow", "10110000"),
        # 0.1 of 4 rounds to none; all of 4 move.
        ("11110000", [4, 1, 3, 2, 0, 0, 0, 0], [9, 9, 9, 9, 9, 9, 9, 9], 0.1, "allow", "11110000"),
        ("11110000", [4, 1, 3, 2, 0, 0, 0, 0], [0, 0, 0, 0, 4, 3, 2, 1], 1.0, "allow", "00001111"),
        ("11111111", [4, 1, 3, 2, 1, 1, 1, 1], [0, 0, 0, 0, 4, 3, 2, 1], 0.5, "allow", "11111111"),
        ("00000000", [0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 4, 3, 2, 1], 0.5, "allow", "00000000"),
    ],
)
def test_magnitude_and_gradient_by_hand(mask, weight, grad, fraction, regrow, expected):
    mask = torch.tensor([[bit == "1" for bit in mask]])
    new = update_mask(
        mask,
        torch.tensor([weight], dtype=torch.float32),
        torch.tensor([grad], dtype=torch.float32),
        drop_fraction=fraction,
        drop="magnitude",
        regrow=regrow,
        seed=0,
    )
    assert "".join(str(int(bit)) for bit in new[0]) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((10, 100, 0.5), (5, 5)),
        ((10, 100, 0.0), (10, 0)),
        ((10, 100, 1.0), (0, 10)),
        ((10, 100, 0.25), (8, 2)),  # 2.5 rounds to even
        ((90, 100, 0.5, "forbid"), (80, 10)),
        ((100, 100, 0.5), (100, 0)),
        ((10, 100, 0.5, "allow", 6), (3, 3)),
        ((10, 100, 0.5, "allow", 14), (5, 9)),
        ((90, 100, 0.5, "forbid", 95), (85, 10)),
        ((90, 100, 0.5, "forbid", 60), (50, 10)),
        ((100, 100, 0.5, "forbid", 60), (60, 0)),
        ((90, 100, 0.5, "allow", 100), (45, 55)),
    ],
)
def test_move_counts(arguments, expected):
    assert move_counts(*arguments) == expected


@pytest.mark.parametrize("target", [0, 100, 600, 700, 1200])
@pytest.mark.parametrize("regrow", criteria.REGROW)
def test_a_moving_target_is_met_exactly(target, regrow):
    mask, weight, grad = tensors()
    new = update_mask(mask, weight, grad, drop_fraction=0.3, seed=0, regrow=regrow, target=target)
    assert new.sum() == target


def test_soft_magnitude_never_keeps_a_zero_before_a_weight():
    mask = torch.ones(1, 100, dtype=torch.bool)
    mask[0, 50:] = False
    weight = torch.full((1, 100), 1e-20).masked_fill_(~mask, 0)
    weight[0, :20] = 0
    grad = torch.zeros(1, 100)
    grad[0, 50:] = 1
    new = update_mask(mask, weight, grad, drop_fraction=0.4, seed=0)
    assert not new[0, :20].any()
    assert new[0, 20:50].all()


def test_zero_gradients_do_not_favour_the_first_rows():
    # A vocabulary of which a batch has seen one token: the gradients of all other rows are exactly 0.
    mask = random_mask((1000, 16), 8000, seed=0)
    grad = torch.zeros(1000, 16)
    grad[7] = 1
    new = update_mask(mask, torch.ones(1000, 16), grad, drop_fraction=0.5, regrow="forbid", seed=0)
    assert new[7].sum() >= (~mask)[7].sum()
    share = (new & ~mask).view(4, -1).sum(1) / 4000
    assert ((share - 0.25).abs() < 0.04).all()


def test_steps_names_and_seeds_draw_differently():
    mask, weight, _ = tensors()
    arguments = {"drop_fraction": 0.5, "grow": "random", "seed": 0}
    first = update_mask(mask, weight, None, **arguments)
    for change in ({"step": 1}, {"name": "a"}, {"seed": 1}):
        assert not torch.equal(first, update_mask(mask, weight, None, **arguments | change))


def test_tensors_need_not_be_contiguous():
    mask, weight, grad = tensors()
    new = update_mask(mask, weight, grad, drop_fraction=0.5, drop="magnitude", seed=0)
    turned = update_mask(mask.T, weight.T, grad.T, drop_fraction=0.5, drop="magnitude", seed=0)
    assert torch.equal(new, turned.T)


def test_the_number_of_threads_is_left_alone():
    threads = torch.get_num_threads()
    mask, weight, grad = tensors()
    update_mask(mask, weight, grad, drop_fraction=0.5, seed=0)
    with pytest.raises(ValueError, match="grow is"):
        update_mask(mask, weight, grad, drop_fraction=0.5, grow="", seed=0)
    assert torch.get_num_threads() == threads


def test_unknown_distribution():
    with pytest.raises(
        ValueError, match=r"distribution is 'erd'; accepted: er, erk, flops, uniform \(did you mean 'er"
    ):
        active_counts(SHAPES, 0.5, "erd")


def test_a_new_criterion_is_one_function_and_one_line(monkeypatch):
    def gradient_only(at):
        return at.grad.abs_()

    monkeypatch.setitem(criteria.DROP, "gradient_only", criteria.Drop(gradient_only))
    mask, weight, grad = tensors()
    state = criteria.MaskedWeight(mask, weight, grad)
    (kept,) = update.keep_weights([state], [600], drop_fraction=0.5, drop="gradient_only")
    assert grad[kept].abs().min() >= grad[mask & ~kept].abs().max()


@pytest.mark.slow
def test_fused_scores_choose_the_same():
    # As on a GPU; here it needs a C++ compiler. Rounding may move a weight at the boundary.
    mask, weight, grad = tensors((300, 1000), 0.9)
    for step in (1, 2):
        state = criteria.MaskedWeight(mask, weight, grad, name="a", step=step)
        for criterion in (criteria.soft_magnitude, criteria.gradient):
            eager = update._score(state, criterion, mask.flatten(), "drop")
            key = selection.noise_key(0, step, "a", "drop")
            flat = {"weight": weight.flatten(), "grad": grad.flatten()}
            fused = update._fused_keys(criterion, state, flat, key, 0, mask.numel(), mask.flatten())
            chosen = [selection.select_top([selection.Scores(k, (1, 2))], 200_000)[0] for k in (eager.keys, fused)]
            assert (chosen[0] != chosen[1]).sum() <= 2
    assert update._warn_once.cache_info().currsize == 0
