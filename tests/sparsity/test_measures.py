"""What a topology update tells of the masks: groups, dead units, gradients, overlap of heads."""

import itertools

import pytest
import torch
from sparse_nets import loss_of, masks_of, sparse
from torch import nn

from nt_hf.models.masks import masked_modules, pack_mask
from nt_hf.sparsity import criteria
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.measures import group_of, head_overlap, masks_by_head
from nt_hf.sparsity.sparsifier import Sparsifier


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers"),
        ("model.heads.0.layers.1.self_attn.q_proj.weight", "model.heads"),
        ("lm_heads.0.weight", "lm_heads"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("0.weight", "0.weight"),
        ("weight", "weight"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group


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
