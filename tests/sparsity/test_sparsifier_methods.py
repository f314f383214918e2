"""The sparsifier with every method on small modules of every kind: what holds at every step, and first masks."""

import copy
import itertools
import math

import pytest
import torch
from sparse_nets import (
    NAMES,
    STRUCTURES,
    Net,
    adamw,
    assert_sound,
    counts_of,
    equal,
    loss_of,
    masks_of,
    rprop,
    sgd,
    snapshot,
    sparse,
    train,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from nt_hf.models.masks import (
    attach_masks,
    check_masks,
    count_active,
    get_mask,
    group_count,
    is_transposed,
    masked_modules,
    pack_mask,
    set_mask,
)
from nt_hf.sparsity import criteria, optimizer_state
from nt_hf.sparsity import sparsifier as sparsifier_module
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks, target_counts
from nt_hf.sparsity.measures import head_overlap, masks_by_head
from nt_hf.sparsity.schedules import SCHEDULES
from nt_hf.sparsity.sparsifier import Sparsifier

# ---------------------------------------------------------------------------------------------------- every method


def methods():
    """Drops, growths and structures: a Latin square, in which each meets each, and the other combinations as slow.

    One update in every combination is looked at in test_update_properties.
    """
    structures = [*STRUCTURES, "redistributed"]
    for d, drop in enumerate(criteria.DROP):
        for g, grow in enumerate(criteria.GROW):
            for s, structure in enumerate(structures):
                regrow, redistribute = criteria.REGROW[(d // 2 + g) % 2], "none"
                if structure == "redistributed":
                    structure, redistribute = "unstructured", criteria.REDISTRIBUTE[1 + d % 2]
                marks = [] if s == (d + g) % len(structures) else pytest.mark.slow
                yield pytest.param(drop, grow, structure, redistribute, regrow, marks=marks)


@pytest.mark.parametrize(("drop", "grow", "structure", "redistribute", "regrow"), methods())
def test_what_holds_at_every_step_of_every_method(drop, grow, structure, redistribute, regrow):
    last = 21 if redistribute == "none" else 11
    fields = {"structure": structure, "redistribute": redistribute, "regrow": regrow, "drop_fraction": 0.3}
    net, optimizer, sparsifier = sparse(drop=drop, grow=grow, **fields, optimizer=sgd)
    first, moved = counts_of(net), 0
    for update in train(net, optimizer, sparsifier, last=last):
        assert_sound(net, structure)
        counts = {name: count_active(module.weight_mask) for name, module in masked_modules(net).items()}
        assert sum(counts.values()) == sum(first.values())
        assert counts == first or redistribute != "none"
        if update:
            assert [row.target for row in sparsifier.report().tensors] == list(counts.values())
            assert check_masks(net) == []
            moved += update.dropped
    assert moved >= 20
    assert_sound(net, structure)
    assert check_masks(net) == []
    assert sparsifier.steps == last


@pytest.mark.parametrize("redistribute", ["gradient", "momentum"])
@pytest.mark.parametrize("regrow", criteria.REGROW)
@pytest.mark.parametrize("drop", ["soft_magnitude", "global_magnitude"])
def test_redistribution_moves_counts_but_not_the_total(redistribute, regrow, drop):
    net, optimizer, sparsifier = sparse(redistribute=redistribute, regrow=regrow, drop=drop)
    first, seen = counts_of(net), []
    for update in train(net, optimizer, sparsifier):
        if update:
            seen.append(counts_of(net))
    sizes = {name: module.weight.numel() for name, module in masked_modules(net).items()}
    for counts in seen:
        assert sum(counts.values()) == sum(first.values())
        assert all(0 < counts[name] <= sizes[name] for name in counts)
    assert len({tuple(counts.values()) for counts in (first, *seen)}) == 5
    assert all(row.target == row.active for row in sparsifier.report().tensors)
    assert sum(abs(seen[-1][name] - first[name]) for name in first) > 50


@pytest.mark.parametrize("of", ["gradient", "momentum"])
def test_what_grows_follows_the_mean_gradient_of_the_active_weights(of):
    net, optimizer, sparsifier = sparse(redistribute=of, grow="random", drop="magnitude", drop_fraction=0.2)
    averages = {name: torch.zeros_like(module.weight) for name, module in masked_modules(net).items()}
    before = counts_of(net)
    for step in range(5):
        loss_of(net, step).backward()
        for name, module in masked_modules(net).items():
            averages[name] = 0.9 * averages[name] + 0.1 * module.weight.grad
        values = {name: module.weight.grad.clone() for name, module in masked_modules(net).items()}
        values = averages if of == "momentum" else values
        shares = {name: values[name][mask].abs().mean().item() for name, mask in masks_of(net).items()}
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    fraction = 0.005 + 0.195 * (1 + math.cos(math.pi * 5 / 26)) / 2
    moved = {name: round(fraction * count) for name, count in before.items()}
    for name, count in counts_of(net).items():
        grown = count - (before[name] - moved[name])
        assert grown == pytest.approx(sum(moved.values()) * shares[name] / sum(shares.values()), abs=1)


def test_a_share_that_has_no_room_goes_to_the_others():
    net, optimizer, sparsifier = sparse(
        redistribute="gradient", density=0.9, drop_fraction=0.5, drop_schedule="constant"
    )
    for update in train(net, optimizer, sparsifier):
        if update:
            counts = counts_of(net)
            assert sum(counts.values()) == sparsifier.report().overall.target
            assert all(counts[name] <= module.weight.numel() for name, module in masked_modules(net).items())
    assert any(counts[name] == module.weight.numel() for name, module in masked_modules(net).items())


# ------------------------------------------------------------------------------------------- a density that falls


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("start", [1.0, 0.8])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "cubic"])
def test_gradual_pruning_reaches_the_final_counts(structure, start, schedule):
    fields = {"density_start": start, "density_schedule": schedule, "structure": structure}
    net, optimizer, sparsifier = sparse(**fields, drop_fraction=0.2, update_interval=3, total_steps=18)
    first, last = target_counts(net, sparsifier.config, start), target_counts(net, sparsifier.config)
    assert counts_of(net) == first
    totals = [sum(first.values())]
    for update in train(net, optimizer, sparsifier, last=18):
        assert_sound(net, structure)
        if not update:
            continue
        counts, value = counts_of(net), SCHEDULES[schedule](sparsifier.steps, 0, 15, 0.0, 1.0)
        totals.append(sum(counts.values()))
        wanted = {name: first[name] + value * (last[name] - first[name]) for name in first}
        if structure == "unstructured":
            assert abs(totals[-1] - sum(wanted.values())) <= 0.5
        for name, module in masked_modules(net).items():
            groups = group_count(module.weight.shape, structure, is_transposed(module))
            assert abs(counts[name] - wanted[name]) <= (2 if structure == "unstructured" else groups / 2)
        assert update.density == totals[-1] / sum(module.weight.numel() for module in masked_modules(net).values())
        assert [row.target for row in sparsifier.report().tensors] == list(counts.values())
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[1] if structure != "2:4" else totals[0] > totals[-1]
    assert counts_of(net) == last
    assert update is None


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("drop", ["magnitude", "set", "global_magnitude"])
def test_pruning_without_a_drop_fraction_regrows_nothing(structure, drop):
    fields = {"density_start": 1.0, "structure": structure, "drop": drop, "drop_schedule": "constant"}
    net, optimizer, sparsifier = sparse(**fields, drop_fraction=0, drop_fraction_end=0, update_interval=2)
    before = masks_of(net)
    for update in train(net, optimizer, sparsifier, last=26):
        after = masks_of(net)
        assert not any((after[name] & ~before[name]).any() for name in after)
        assert update is None or (update.grown, update.requested) == (0, 0)
        before = after
    assert counts_of(net) == target_counts(net, sparsifier.config)


@pytest.mark.parametrize(
    "fields",
    [
        {"density": 0.1, "distribution": "erk"},
        {"density": 0.3, "structure": "constant_fan_in"},
        {"density": 0.5, "structure": "2:4", "density_schedule": "linear"},
    ],
)
def test_counts_of_a_tensor_never_rise_while_the_density_falls(fields):
    # What rounding leaves over must not wander from tensor to tensor, which would grow weights.
    fields = {"density_start": 0.9, "update_interval": 1, "drop_fraction": 0, "drop_fraction_end": 0} | fields
    net, _, sparsifier = sparse(**fields, drop="magnitude", total_steps=40)
    before = counts_of(net)
    for module in masked_modules(net).values():
        module.weight.grad = torch.zeros_like(module.weight)
    for _ in range(39):
        sparsifier.step()
        after = counts_of(net)
        assert all(after[name] <= before[name] for name in after)
        before = after


def test_magnitude_pruning_keeps_the_largest_weights():
    fields = {"density_start": 1.0, "drop": "magnitude", "drop_fraction": 0, "drop_fraction_end": 0}
    net, optimizer, sparsifier = sparse(**fields, update_interval=4)
    for step in range(4):
        loss_of(net, step).backward()
        weights = {name: module.weight.detach().clone() for name, module in masked_modules(net).items()}
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    for name, mask in masks_of(net).items():
        assert not mask.all()
        assert weights[name][mask].abs().min() >= weights[name][~mask].abs().max()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_a_schedule_counts_stay(structure):
    net, optimizer, sparsifier = sparse(structure=structure, density_schedule="cubic")
    first = counts_of(net)
    for _ in train(net, optimizer, sparsifier):
        assert counts_of(net) == first


def test_redistribution_under_a_falling_density():
    net, optimizer, sparsifier = sparse(density=0.3, density_start=0.8, redistribute="gradient", drop_fraction=0.3)
    first, last = (sum(target_counts(net, sparsifier.config, density).values()) for density in (0.8, 0.3))
    for update in train(net, optimizer, sparsifier, last=26):
        if update:
            wanted = first + SCHEDULES["cubic"](sparsifier.steps, 0, 25, 0.0, 1.0) * (last - first)
            assert abs(sum(counts_of(net).values()) - wanted) <= 0.5
    assert sum(counts_of(net).values()) == last


def test_dense_and_fixed_groups_under_a_falling_density():
    densities = {"embed.*": 1.0, "heads.*": 0.6}
    net, optimizer, sparsifier = sparse(density=0.5, density_start=0.9, densities=densities)
    rows = {row.name: row for row in sparsifier.report().tensors}
    assert rows["embed.weight"].density == 1
    assert rows["heads.0.weight"].density == pytest.approx(0.9, abs=2e-3)
    for _ in train(net, optimizer, sparsifier, last=26):
        assert get_mask(net.embed).all()
    rows = {row.name: row for row in sparsifier.report().tensors}
    assert rows["heads.0.weight"].density == pytest.approx(0.6, abs=2e-3)
    assert sparsifier.report().overall.density == pytest.approx(0.5, abs=1e-3)


# ------------------------------------------------------------------------------------------- exponent and momentum


@pytest.mark.parametrize("end", [None, 1.0, 9.0])
def test_the_exponent_goes_in_a_line_over_the_window(end, monkeypatch):
    seen = {}

    class Spy(criteria.MaskedWeight):
        def __init__(self, *args, **fields):
            super().__init__(*args, **fields)
            seen.setdefault(fields["step"], set()).add(fields["exponent"])

    monkeypatch.setattr(sparsifier_module, "MaskedWeight", Spy)
    net, optimizer, sparsifier = sparse(drop_exponent_end=end, update_start=0.2, update_end=0.8, total_steps=50)
    list(train(net, optimizer, sparsifier, last=45))
    expected = {step: 3.0 + ((end or 3.0) - 3.0) * (step - 10) / 30 for step in range(10, 40, 5)}
    assert sorted(seen) == list(expected)
    for step, exponents in seen.items():
        assert list(exponents) == [pytest.approx(expected[step])]


def test_another_exponent_keeps_other_weights():
    runs = [sparse(drop_exponent=exponent, regrow="forbid") for exponent in (0.5, 9.0)]
    means = []
    for net, optimizer, sparsifier in runs:
        for update in train(net, optimizer, sparsifier, last=4):
            assert update is None
        loss_of(net, 4).backward()
        before, weights = masks_of(net), {n: m.weight.detach().abs() for n, m in masked_modules(net).items()}
        weights = {name: weight.clone() for name, weight in weights.items()}
        sparsifier.step()
        dropped = torch.cat([weights[name][before[name] & ~mask] for name, mask in masks_of(net).items()])
        means.append(dropped.mean())
    assert means[1] < 0.7 * means[0]


@pytest.mark.parametrize(
    ("fields", "needed"),
    [({"grow": "momentum"}, True), ({"redistribute": "momentum"}, True), ({"redistribute": "gradient"}, False)],
)
def test_momentum_is_averaged_where_it_is_needed(fields, needed):
    net, optimizer, sparsifier = sparse(**fields)
    averages = {name: torch.zeros_like(module.weight) for name, module in masked_modules(net).items()}
    for step in range(7):
        loss_of(net, step).backward()
        for name, module in masked_modules(net).items():
            averages[name] = 0.9 * averages[name] + 0.1 * module.weight.grad
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    state = sparsifier.state_dict()
    assert any(key.startswith("momentum.") for key in state) == needed
    for name, average in averages.items() if needed else ():
        torch.testing.assert_close(state[f"momentum.{name}"], average)


@pytest.mark.parametrize(
    ("fields", "optimizer", "stop"),  # between updates and at one
    [
        ({}, adamw, 15),
        ({}, sgd, 12),
        ({}, rprop, 10),
        ({}, rprop, 14),
        ({"grow": "momentum"}, adamw, 12),
        ({"redistribute": "momentum", "grow": "random"}, adamw, 15),
        ({"density_start": 0.9, "drop_exponent_end": 1.0}, sgd, 12),
        ({"density_start": 1.0, "structure": "2:4", "grow": "momentum"}, adamw, 15),
        ({"redistribute": "gradient", "density_start": 0.9, "drop": "global_magnitude"}, adamw, 14),
        ({"structure": "constant_fan_in", "grow": "gradient_random", "drop": "set"}, sgd, 10),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(fields, optimizer, stop):
    net, whole, sparsifier = sparse(**fields, optimizer=optimizer)
    expected = list(train(net, whole, sparsifier, last=26))
    first, before, first_sparsifier = sparse(**fields, optimizer=optimizer)
    done = list(train(first, before, first_sparsifier, last=stop))
    saved = snapshot(first, before), copy.deepcopy(first_sparsifier.state_dict())

    torch.manual_seed(99)
    second = Net()
    attach_masks(second, ["*"])
    second.load_state_dict(saved[0][0])
    after = optimizer(second)
    after.load_state_dict(saved[0][1])
    resumed = Sparsifier(second, after, sparsifier.config, 26)
    resumed.load_state_dict(saved[1])
    done += train(second, after, resumed, first=stop, last=26)
    assert done == expected
    assert any(update.grown_kept for update in done[stop:] if update)
    if optimizer is rprop:  # what it keeps of dead weights, which binding it clears, is not 0
        whole = after = None
    assert equal(snapshot(net, whole), snapshot(second, after))
    assert equal(sparsifier.state_dict(), resumed.state_dict())


def test_a_state_without_the_momentum_is_refused():
    state = sparse()[2].state_dict()
    with pytest.raises(ValueError, match=r"momentum\.embed\.weight is missing \(6 such entries\)"):
        sparse(grow="momentum")[2].load_state_dict(state)
    state = sparse(grow="momentum")[2].state_dict()
    with pytest.raises(ValueError, match=r"momentum\.embed\.weight is unknown"):
        sparse()[2].load_state_dict(state)
    state["momentum.third.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"does not fit the mask of third\.weight: .*momentum \[3\], not \[24, 16\]"):
        sparse(grow="momentum")[2].load_state_dict(state)


# --------------------------------------------------------------------------------------------------- what is measured


def units(name, mask):
    """The mask's output and input units, as lists of lists of truth values."""
    flat = mask.T if name == "third.weight" else mask
    outputs = [row.flatten().tolist() for row in flat]
    inputs = [flat[:, i].flatten().tolist() for i in range(flat.shape[1])]
    return outputs, inputs


@pytest.mark.parametrize("regrow", criteria.REGROW)
def test_measures_equal_slow_ones(regrow):
    net, optimizer, sparsifier = sparse(density=0.12, distribution="uniform", regrow=regrow, drop_fraction=0.3)
    net.first.weight.requires_grad_(False)
    before, last_grown, updates = masks_of(net), None, 0
    for step in range(21):
        loss_of(net, step).backward()
        grads = {name: m.weight.grad.clone() for name, m in masked_modules(net).items() if m.weight.grad is not None}
        update = sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        if not update:
            continue
        updates += 1
        after = masks_of(net)
        active = sum(float((grad.double() ** 2)[before[name]].sum()) for name, grad in grads.items()) ** 0.5
        inactive = sum(float((grad.double() ** 2)[~before[name]].sum()) for name, grad in grads.items()) ** 0.5
        assert update.grad_norm_active == pytest.approx(active, rel=1e-4)
        assert update.grad_norm_inactive == pytest.approx(inactive, rel=1e-4)
        outputs, inputs = zip(*(units(name, mask) for name, mask in after.items()))
        assert update.dead_rows == sum(not any(unit) for unit in itertools.chain(*outputs)) > 0
        assert update.dead_columns == sum(not any(unit) for unit in itertools.chain(*inputs)) > 0
        one, other = (set(map(tuple, after[f"heads.{i}.weight"].nonzero().tolist())) for i in (0, 1))
        assert update.head_overlap == len(one & other) / len(one | other)
        grown = {name: after[name] & ~before[name] for name in after}
        if last_grown is None:
            assert update.grown_kept is None
        else:
            kept = sum(int((last_grown[name] & after[name]).sum()) for name in after)
            assert update.grown_kept == kept / sum(int(mask.sum()) for mask in last_grown.values())
            assert 0 < update.grown_kept < 1
        assert torch.equal(after["first.weight"], before["first.weight"])
        before, last_grown = after, grown
    assert updates == 4


def test_overlap_of_masks_made_by_hand():
    one = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    other = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    third = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    packed = [pack_mask(mask) for mask in (one, other, third)]
    assert head_overlap([{"up": packed[0]}, {"up": packed[1]}]) == 2 / 4
    three = [{"up": mask} for mask in packed]
    assert head_overlap(three) == pytest.approx((2 / 4 + 1 / 3 + 1 / 3) / 3)
    # The parts of a head count together; other shapes, other names and no active weight do not.
    more = [head | {"lm_head": packed[0]} for head in three]
    assert head_overlap(more) == pytest.approx((5 / 7 + 4 / 6 + 4 / 6) / 3)
    assert head_overlap([{"a": packed[0]}, {"b": packed[0]}]) is None
    assert head_overlap([{"a": packed[0]}, {"a": packed[0][:1]}]) is None
    assert head_overlap([{"a": packed[0] * 0}, {"a": packed[0] * 0}]) is None
    assert head_overlap([{"a": packed[0]}]) is None
    assert head_overlap([{}, {}]) is head_overlap([]) is None


def test_a_model_without_heads_has_no_overlap():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = SparsityConfig(density=0.5, update_interval=1)
    draw_masks(net, config)
    sparsifier = Sparsifier(net, torch.optim.SGD(net.parameters()), config, 10)
    net(torch.ones(1, 8)).sum().backward()
    assert sparsifier.step().head_overlap is None and masks_by_head(net) == []


# ------------------------------------------------------------------------------------------------------ optimizers


class Matrices(nn.Module):
    """Two-dimensional weights only, for Muon."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24, bias=False), Conv1D(16, 24)
        self.b.bias = None

    def forward(self, x):
        return self.a(x).relu() @ self.b.weight


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_dead_weights_stay_at_zero(name, grow):
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    net = Matrices()
    config = SparsityConfig(density=0.3, update_interval=10, grow=grow)
    draw_masks(net, config)
    optimizer = OPTIMIZERS[name](net.parameters())
    sparsifier = Sparsifier(net, optimizer, config, 201)
    weights, moved = dict(masked_modules(net)), 0
    x = torch.randn(200, 8, 16)
    for step in range(200):
        (net(x[step]) - x[step]).square().mean().backward()
        update = sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        moved += update.dropped if update else 0
        for module in weights.values():
            assert torch.count_nonzero(module.weight[~get_mask(module)]) == 0
    assert moved > 50
    assert sparsifier.report().overall.active == round(0.3 * 768)
    assert all(torch.isfinite(module.weight).all() and module.weight.any() for module in weights.values())


def distances(second_moments, monkeypatch):
    """How far grown weights and old active ones move in 50 Adam steps under gradients that are noise."""
    monkeypatch.setattr(optimizer_state, "_SECOND_MOMENTS", second_moments)
    net = nn.Linear(120, 100, bias=False)
    config = SparsityConfig(
        density=0.5, drop="magnitude", regrow="forbid", drop_schedule="constant", update_interval=600
    )
    draw_masks(net, config)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    sparsifier = Sparsifier(net, optimizer, config, 1000)
    generator = torch.Generator().manual_seed(0)
    before = get_mask(net)
    for step in range(1, 650):
        net.weight.grad = torch.randn(net.weight.shape, generator=generator)
        if step == 600:
            assert sparsifier.step().grown > 1000
            first, after = net.weight.detach().clone(), get_mask(net)
        else:
            sparsifier.step()
        optimizer.step()
    moved = (net.weight.detach() - first).abs()
    return moved[after & ~before].mean() / moved[after & before].mean()


def test_noise_does_not_move_grown_weights_much_further(monkeypatch):
    assert distances(optimizer_state._SECOND_MOMENTS, monkeypatch) < 1.5
    assert distances((), monkeypatch) > 1.5  # what it is for: with a second moment of 0


# --------------------------------------------------------------------------------------------------- errors at updates


@pytest.mark.parametrize("drop", ["soft_magnitude", "global_magnitude"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda net: setattr(net.heads[1].weight, "grad", None), r"step 10: heads\.1\.weight has no gradient at a top"),
        (lambda net: net.heads[1].weight.grad[0].fill_(math.nan), r"the gradient of heads\.1\.weight: not finite"),
        (lambda net: net.heads[1].weight.grad[3, 3].fill_(math.inf), r"the gradient of heads\.1\.weight: not finite"),
        (lambda net: net.heads[1].weight.data[0].fill_(-math.inf), r"the weight of heads\.1\.weight: not finite"),
    ],
)
def test_an_error_at_an_update_changes_nothing(spoil, message, drop):
    net, optimizer, sparsifier = sparse(drop=drop)
    list(train(net, optimizer, sparsifier, last=9))
    loss_of(net, 9).backward()
    spoil(net)
    before, report = snapshot(net, optimizer), sparsifier.report()
    with pytest.raises(ValueError, match=message):
        sparsifier.step()
    assert equal(snapshot(net, optimizer), before)
    assert sparsifier.report() == report


@pytest.mark.parametrize("fields", [{}, {"redistribute": "gradient"}, {"density_start": 0.9}, {"structure": "2:4"}])
@pytest.mark.parametrize("drop", ["soft_magnitude", "global_magnitude"])
def test_frozen_weights_keep_their_masks(fields, drop):
    net, optimizer, sparsifier = sparse(drop=drop, **fields)
    frozen = ["second.weight", "heads.0.weight"]
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    before, weights = masks_of(net), {name: net.get_parameter(name).clone() for name in frozen}
    assert any(update for update in train(net, optimizer, sparsifier))
    after = masks_of(net)
    assert [name for name in NAMES if torch.equal(after[name], before[name])] == frozen
    assert all(torch.equal(net.get_parameter(name), weight) for name, weight in weights.items())
    assert all(row.target == row.active for row in sparsifier.report().tensors)


def test_a_changed_structure_is_refused():
    net, optimizer, _ = sparse()
    with pytest.raises(
        ValueError, match=r"the mask of embed\.weight: groups hold \d to \d active weights; structure 2:4"
    ):
        Sparsifier(net, optimizer, SparsityConfig(density=0.5, structure="2:4"), 26)
    set_mask(net.embed, torch.ones_like(net.embed.weight, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"the mask of first\.weight: groups hold"):
        Sparsifier(net, optimizer, SparsityConfig(density=0.5, structure="constant_fan_in"), 26)
