"""A density that falls while a net trains: gradual pruning, with and without regrowth."""

import pytest
import torch
from sparse_nets import STRUCTURES, assert_sound, counts_of, loss_of, masks_of, sparse, train

from nt_hf.models.masks import get_mask, group_count, is_transposed, masked_modules
from nt_hf.sparsity.first_masks import target_counts
from nt_hf.sparsity.schedules import SCHEDULES


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
