"""Random masks and one mask update: by hand, and on small tensors without a model."""

import itertools
from collections import Counter
from math import inf, nan, prod

import pytest
import torch

from nt_hf.sparsity import criteria, selection, update
from nt_hf.sparsity.criteria import MaskedWeight
from nt_hf.sparsity.update import keep_weights, move_counts, random_mask, update_mask


def tensors(shape=(40, 30), density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(shape, round(density * prod(shape)), seed=seed)
    weight = torch.randn(shape, generator=generator).masked_fill_(~mask, 0)
    return mask, weight, torch.randn(shape, generator=generator)


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
    with pytest.raises(ValueError, match=r"active=7: accepted is a whole number from 0 to 6"):
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
    with pytest.raises(ValueError, match="grow="):
        update_mask(mask, weight, grad, drop_fraction=0.5, grow="", seed=0)
    assert torch.get_num_threads() == threads


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


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "global"}, r"drop='global': accepted is magnitude, .*\(did you mean global_magnitude\?\)"),
        ({"drop": None}, r"drop=None: accepted is magnitude, soft_magnitude, set, taylor, mest"),
        ({"grow": "gradient_randon"}, r"grow='gradient_randon': .*\(did you mean gradient_random\?\)"),
        ({"grow": "magnitude"}, r"grow='magnitude': accepted is gradient, random, momentum, gradient_random$"),
        ({"regrow": "allowed"}, r"regrow='allowed': accepted is allow, forbid \(did you mean allow\?\)"),
        ({"drop_fraction": -0.1}, r"drop_fraction=-0\.1: accepted is a number in \[0, 1\]"),
        ({"drop_fraction": 1.0001}, r"drop_fraction=1\.0001: accepted"),
        ({"drop_fraction": nan}, r"drop_fraction=nan: accepted"),
        *(({"structure": name}, rf"structure is '{name}'; accepted: unstructured, constant_fan_in, or N:M with 1 <= N")
          for name in ("5:4", "0:4", "a:b", "2:4:1", "dense", "2:", ":4", "-2:4", "2.0:4", "")),
        ({"structure": "3:5"}, r"structure 3:5 needs input dimensions divisible by 5; one is 12, of a weight"),
        ({"structure": "2:4", "transposed": True}, r"input dimensions divisible by 4; one is 6, of a weight \[6, 12\]"),
        ({"structure": "2:4", "mask": bits("/".join(["111100001001"] * 6))},
         r"the mask of a\.weight: groups hold 0 to 4 active weights; structure 2:4 has as many in each"),
        ({"structure": "constant_fan_in", "transposed": True}, r"the mask of a\.weight: groups hold 0 to 6"),
        ({"structure": "4:6"}, r"the mask of a\.weight: groups of 6 hold 3 active weights; structure 4:6 has 4"),
        ({"structure": "constant_fan_in", "target": 37}, r"target=37: accepted .* is a multiple of the 6 groups"),
        ({"target": -1}, r"target=-1: accepted is a whole number from 0 to 72"),
        ({"target": 73}, r"target=73: accepted is a whole number from 0 to 72"),
        *(({kind: torch.full((6, 12), bad)}, rf"the {word} of a\.weight: not finite everywhere; accepted are fin")
          for bad in (nan, inf, -inf)
          for kind, word in (("weight", "weight"), ("grad", "gradient"), ("momentum", "momentum"))),
        ({"mask": torch.ones(6, 12)}, r"the mask of a\.weight: is torch\.float32 .* is torch\.bool \[6, 12\]"),
        ({"grad": torch.zeros(2, 2)}, r"the gradient of a\.weight: is \[2, 2\]; accepted is \[6, 12\]"),
        ({"momentum": torch.zeros(6, 11)}, r"the momentum of a\.weight: is \[6, 11\]; accepted is \[6, 12\]"),
        ({"grad": None}, r"the gradient of a\.weight: accepted is one, which"),
        ({"grad": None, "drop": "taylor", "grow": "random"}, r"the gradient of a\.weight: accepted is one, which"),
        ({"grad": None, "drop": "mest", "grow": "random"}, r"the gradient of a\.weight: accepted is one, which"),
        ({"grad": None, "grow": "gradient_random"}, r"the gradient of a\.weight: accepted is one, which"),
        ({"momentum": None, "grow": "momentum"}, r"the momentum of a\.weight: accepted is one, which"),
        ({"exponent": 0}, r"exponent=0: accepted is a number above 0"),
        ({"exponent": -1.0}, r"exponent=-1\.0: accepted is a number above 0"),
        ({"mest_lambda": -1.0}, r"mest_lambda=-1\.0: accepted is a number from 0"),
        ({"random_share": 1.5}, r"random_share=1\.5: accepted is a number in \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    mask = bits("/".join(["101010101010"] * 6))
    values = {"weight": torch.ones(6, 12), "grad": torch.ones(6, 12), "momentum": torch.ones(6, 12)}
    arguments = {"mask": mask, "drop_fraction": 0.5, "name": "a.weight"} | values | change
    with pytest.raises(ValueError, match=message):
        update_mask(**arguments)
