"""Packed masks, and the rule that a weight outside its mask is exactly 0."""

import copy

import numpy as np
import pytest
import torch
from conftest import token_ids, trained
from torch import nn

from nt_hf import NeuroTrailsLlamaForCausalLM, apply_masks, check_masks, densify, freeze_topology
from nt_hf.models import masks as lib
from nt_hf.models.masks import (
    attach_masks,
    check_structure,
    get_mask,
    group_count,
    groups_of,
    maskable_modules,
    masked_modules,
    parse_structure,
    set_mask,
)

SHAPES = [(3, 8), (5, 13), (1, 1), (4, 7), (2, 16), (3, 2, 5), (4, 3, 3, 3)]


def random_mask(shape, density=0.5, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
class TestPacking:
    def test_the_bits_are_numpys_little_endian_ones(self, shape, density):
        mask = random_mask(shape, density)
        expected = np.packbits(mask.flatten(1).numpy(), axis=1, bitorder="little")
        assert lib.pack_mask(mask).dtype == torch.uint8
        assert np.array_equal(lib.pack_mask(mask).numpy(), expected)

    def test_unpacking_inverts_packing(self, shape, density):
        mask = random_mask(shape, density)
        unpacked = lib.unpack_mask(lib.pack_mask(mask), shape)
        assert unpacked.dtype == torch.bool and torch.equal(unpacked, mask)

    def test_shape_and_count(self, shape, density):
        mask = random_mask(shape, density)
        packed = lib.pack_mask(mask)
        assert tuple(packed.shape) == lib.packed_shape(shape)
        assert lib.count_active(packed) == int(mask.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_full_mask_is_all_ones_without_padding_bits(shape):
    assert torch.equal(lib.full_mask(shape), lib.pack_mask(torch.ones(shape, dtype=torch.bool)))


def test_counting_is_right_for_every_byte():
    every = torch.arange(256, dtype=torch.uint8)
    assert [lib.count_active(byte[None, None]) for byte in every] == [int(b).bit_count() for b in every]
    assert lib.count_active(every.repeat(1000)[None]) == 1000 * 1024


@pytest.mark.parametrize(
    "name",
    [
        "module.model.layers.0.q.weight",
        "_orig_mod.model.layers.0.q.weight",
        "module._orig_mod.model.layers.0._checkpoint_wrapped_module.q.weight",
        "_fsdp_wrapped_module.model.layers.0.q.weight",
    ],
)
def test_canonical_names_lack_wrappers(name):
    assert lib.canonical_name(name) == "model.layers.0.q.weight"


@pytest.mark.parametrize(
    "patterns, chosen",
    [
        ([], ""),
        (["*"], "abc"),
        (["*", "!b"], "ac"),
        (["!b", "*"], "abc"),
        (["*", "!*", "c"], "c"),
        (["[ab]"], "ab"),
        (["!a"], ""),
    ],
)
def test_the_last_fitting_pattern_decides(patterns, chosen):
    assert [name for name in "abc" if lib.matches(name, patterns)] == list(chosen)


# Which weights carry a mask


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.norm = nn.Embedding(6, 10), nn.Conv2d(1, 3, 3), nn.LayerNorm(10)
        self.inner, self.out = nn.Linear(10, 10), nn.Linear(10, 6, bias=False)
        self.out.weight = self.embed.weight


def test_masks_go_to_matrices_and_convolutions_and_once_to_a_shared_weight():
    net = Net()
    assert attach_masks(net, ["*"]) == ["embed.weight", "conv.weight", "inner.weight"] == list(maskable_modules(net))
    assert [key for key in net.state_dict() if "mask" in key] == [
        "embed.weight_mask", "conv.weight_mask", "inner.weight_mask",
    ]  # fmt: skip
    assert net.conv.weight_mask.shape == (3, 2) and lib.overall_density(net) == 1.0


def test_attaching_again_keeps_masks():
    net = Net()
    attach_masks(net, ["inner.*"])
    set_mask(net.inner, random_mask((10, 10)))
    before = net.inner.weight_mask.clone()
    assert attach_masks(net, ["*", "!conv.*", "!out.*"]) == ["embed.weight", "inner.weight"]
    assert torch.equal(net.inner.weight_mask, before)


@pytest.mark.parametrize("patterns", [["iner.*"], ["*", "!iner.*"], ["out.*"], ["norm.*"]])
def test_a_pattern_that_fits_no_weight_is_an_error(patterns):
    with pytest.raises(ValueError, match=r"fits none of the 3 weights .* embed.weight") as error:
        attach_masks(Net(), patterns)
    assert repr(patterns[-1]) in str(error.value)


def test_density_weighs_tensors_by_size():
    net = Net()
    assert lib.overall_density(net) == 1.0
    attach_masks(net, ["inner.*", "conv.*"])
    set_mask(net.inner, torch.eye(10).bool())
    assert lib.overall_density(net) == (10 + 27) / (100 + 27)


# The invariant


def test_setting_a_mask_zeros_the_weights_outside():
    net = Net()
    attach_masks(net, ["*"])
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] = torch.inf  # inf * 0 would be NaN, -1 * 0 would be -0.0
        net.inner.weight.fill_(-1)
    for module in masked_modules(net).values():
        mask = random_mask(module.weight.shape, 0.3)
        mask.view(-1)[0] = False
        set_mask(module, mask)
        assert torch.equal(get_mask(module), mask)
        assert not module.weight[~mask].any() and not module.weight[~mask].signbit().any()
    assert check_masks(net) == []


@pytest.mark.parametrize("value", [1.0, -1e-30, torch.nan, torch.inf])
def test_one_weight_outside_its_mask_is_found_and_mended(value):
    net = Net()
    attach_masks(net, ["*"])
    set_mask(net.inner, torch.eye(10).bool())
    with torch.no_grad():
        net.inner.weight[3, 4] = value
        net.conv.weight.fill_(value)  # within its mask
    assert check_masks(net) == ["inner.weight"]
    apply_masks(net)
    assert check_masks(net) == [] and net.inner.weight[3, 4] == 0
    assert torch.equal(net.conv.weight, torch.full_like(net.conv.weight, value)) or value != value


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(10, 1, dtype=torch.uint8),
        torch.ones(9, 2, dtype=torch.uint8),
        torch.ones(10, 2),
        torch.full((10, 2), 0xFF, dtype=torch.uint8),
    ],
    ids=["width", "height", "dtype", "padding bits"],
)
def test_a_mask_that_does_not_fit_its_weight_is_named(mask):
    net = Net()
    attach_masks(net, ["inner.*"])
    net.inner.weight_mask = mask
    with pytest.raises(ValueError, match=r"the mask of inner.weight"):
        check_masks(net)


@pytest.mark.parametrize("rows", [4, 6, 9])
def test_resizing_keeps_old_rows_and_activates_new_ones(rows):
    net = Net()
    attach_masks(net, ["embed.*"])
    mask = random_mask((6, 10))
    set_mask(net.embed, mask)
    net.embed.weight = nn.Parameter(torch.cat([net.embed.weight, torch.ones(3, 10)])[:rows])
    lib.resize_mask(net.embed)
    expected = torch.cat([mask, torch.ones(3, 10, dtype=torch.bool)])[:rows]
    assert torch.equal(get_mask(net.embed), expected) and check_masks(net) == []


class RevivesZeros(torch.optim.SGD):
    """As Muon does: every weight moves, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "revives_zeros": lambda p: RevivesZeros(p, 0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_topology_holds_under_any_optimizer(model, make):
    masks = {name: module.weight_mask.clone() for name, module in masked_modules(model).items()}
    before = {name: module.weight.detach().clone() for name, module in masked_modules(model).items()}
    optimizer = make(model.parameters())
    batch = token_ids()[: 4 * 32].view(4, 32)

    def steps():
        for _ in range(3):
            model.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimizer.step()

    handle = freeze_topology(model, optimizer)
    steps()
    assert check_masks(model) == []
    for name, module in masked_modules(model).items():
        assert torch.equal(module.weight_mask, masks[name]) and not torch.equal(module.weight, before[name])
    handle.remove()
    steps()
    assert check_masks(model)  # Each of these optimizers would have broken the masks.


def test_freezing_a_model_that_violates_its_masks_mends_it(model):
    with torch.no_grad():
        for module in masked_modules(model).values():
            module.weight.add_(1)
    freeze_topology(model, torch.optim.SGD(model.parameters(), 0.1))
    assert check_masks(model) == []


def test_densify_gives_the_masks_up_for_good(model, prompts, tmp_path):
    expected = model(**prompts).logits
    densify(model)
    assert not masked_modules(model) and model.config.masked_modules == [] and lib.overall_density(model) == 1.0
    model.save_pretrained(tmp_path)
    loaded = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path)
    assert not masked_modules(loaded) and not any("mask" in key for key in loaded.state_dict())
    assert torch.equal(loaded(**prompts).logits, expected)


@pytest.mark.parametrize("variant", ["neurotrails", "full_ensemble", "tied"])
def test_training_with_masks_kept_zeros_outside_and_weights_inside(variant):
    model = trained(variant)
    assert check_masks(model) == []
    for name, module in masked_modules(model).items():
        assert (module.weight[get_mask(module)] != 0).float().mean() > 0.9, name
        assert get_mask(module).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_masks_move_with_the_model_but_keep_their_type(model):
    model = copy.deepcopy(model).half().double()
    assert {module.weight_mask.dtype for module in masked_modules(model).values()} == {torch.uint8}


# --------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize(("structure", "sizes"), [("unstructured", None), ("constant_fan_in", None), ("2:4", (2, 4)),
                                                  ("1:16", (1, 16)), ("4:4", (4, 4))])  # fmt: skip
def test_structures_by_name(structure, sizes):
    assert parse_structure(structure) == sizes


@pytest.mark.parametrize("structure", ["", "5:4", "0:4", "2:0", "2:4:8", "a:b", "-2:4", "dense", 124, None])
def test_what_is_no_structure(structure):
    with pytest.raises(ValueError, match=r"structure is .*; accepted: unstructured, constant_fan_in, or N:M"):
        parse_structure(structure)


@pytest.mark.parametrize(
    ("rows", "structure", "transposed", "error"),
    [
        (["1100", "0110"], "2:4", False, None),
        (["1111", "1111"], "2:4", False, None),  # on its way from dense
        (["1100", "0111"], "2:4", False, "groups hold 2 to 3 active weights"),
        (["1000", "0001"], "2:4", False, "groups of 4 hold 1 active weights; structure 2:4 has 2"),
        (["1110", "0111"], "constant_fan_in", False, None),
        (["1110", "0110"], "constant_fan_in", False, "groups hold 2 to 3 active weights"),
        (["1010", "0101"], "constant_fan_in", True, None),
        (["1010", "0101"], "1:2", True, None),
        (["1100", "1100"], "1:2", True, "groups hold 0 to 2 active weights"),
        (["1010", "0000"], "unstructured", False, None),
    ],
)
def test_a_mask_is_checked_for_its_structure(rows, structure, transposed, error):
    mask = torch.tensor([[bit == "1" for bit in row] for row in rows])
    if error is None:
        check_structure(mask, structure, transposed)
    else:
        with pytest.raises(ValueError, match=error):
            check_structure(mask, structure, transposed)


def test_groups_of_a_convolution_lie_along_its_input_channels():
    weight = torch.arange(2 * 4 * 3).view(2, 4, 3)
    assert groups_of(weight, "2:4")[0, 0].tolist() == [[0, 3, 6, 9]]
    assert groups_of(weight, "1:2")[1, 2].tolist() == [[14, 17], [20, 23]]
    assert groups_of(weight, "constant_fan_in")[1].tolist() == list(range(12, 24))
    assert [group_count((2, 4, 3), s) for s in ("unstructured", "constant_fan_in", "2:4", "1:2")] == [1, 2, 6, 12]


def test_groups_need_a_divisible_input_dimension():
    with pytest.raises(ValueError, match=r"2:4 needs input dimensions divisible by 4; one is 6, of a weight \[8, 6\]"):
        groups_of(torch.zeros(8, 6), "2:4")
    assert groups_of(torch.zeros(8, 6), "2:4", transposed=True).shape == (6, 2, 4)
