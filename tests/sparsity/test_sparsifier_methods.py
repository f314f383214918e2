"""The sparsifier with every method on small modules of every kind: what holds at every step, and first masks."""

import copy
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
    masked_modules,
    set_mask,
)
from nt_hf.sparsity import criteria, optimizer_state
from nt_hf.sparsity import sparsifier as sparsifier_module
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks
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
