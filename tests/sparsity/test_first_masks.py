"""First masks: random, by saliency, from a checkpoint; and how many weights they leave active."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from sparse_nets import (
    NAMES,
    STRUCTURES,
    Net,
    Tower,
    adamw,
    assert_sound,
    counts_of,
    equal,
    loss_of,
    masks_of,
    snapshot,
    sparse,
    train,
)
from torch import nn

from nt_hf.models.masks import (
    attach_masks,
    check_masks,
    get_mask,
    masked_modules,
)
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks, target_counts, weight_uses
from nt_hf.sparsity.saliency import grasp, snip
from nt_hf.sparsity.sparsifier import Sparsifier

# --------------------------------------------------------------------------------------------- random first masks


def test_a_density_alone_is_refused():
    with pytest.raises(TypeError, match=r"config=0.5: accepted is a SparsityConfig, such as"):
        draw_masks(nn.Linear(4, 4), 0.5)


def test_draw_masks_meets_the_targets_and_zeros_the_rest():
    net, _, sparsifier = sparse(model=Tower, density=0.3)
    report = sparsifier.report()
    assert report.overall.active == round(0.3 * report.overall.size)
    assert all(row.active == row.target for row in report.tensors)
    assert [row.name for row in report.tensors] == ["embed.weight", "layers.0.weight", "layers.1.weight", "head.weight"]
    assert [row.name for row in report.groups] == ["embed", "layers", "head"]
    assert report.groups[1].active == report.tensors[1].active + report.tensors[2].active
    assert report.tensors[0].shape == (Tower.words, 16)
    assert check_masks(net) == []


def test_masks_follow_from_seed_and_name():
    first, again, other = (masks_of(sparse(model=Tower, seed=seed)[0]) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_first_weights_can_be_scaled_to_the_inputs_that_are_left():
    nets = {}
    for first_weights in ("dense", "fan_in"):
        torch.manual_seed(0)
        nets[first_weights] = net = Net()
        before = {name: module.weight.clone() for name, module in net.named_modules() if hasattr(module, "weight")}
        config = SparsityConfig(density=0.1, distribution="uniform", first_weights=first_weights, exclude=["heads.1.*"])
        draw_masks(net, config)
        assert check_masks(net) == []
    found = {name: module.weight for name, module in nets["fan_in"].named_modules() if hasattr(module, "weight")}
    masks, silent = masks_of(nets["fan_in"]), 0
    assert equal(masks, masks_of(nets["dense"]))
    for name, weight in before.items():
        if f"{name}.weight" not in masks:
            assert torch.equal(found[name], weight), name
            continue
        mask = masks[f"{name}.weight"]
        # Of GPT-2's Conv1D and of an embedding the columns are units, of all others the rows.
        units = range(mask.shape[1] if name in ("embed", "third") else mask.shape[0])
        for unit in units:
            chosen = (slice(None), unit) if name in ("embed", "third") else unit
            inputs = mask[chosen].numel()
            active = int(mask[chosen].sum())
            silent += not active
            expected = weight[chosen] * mask[chosen] * (math.sqrt(inputs / active) if active else 0)
            torch.testing.assert_close(found[name][chosen], expected, msg=f"{name} {unit}")
    assert silent


def test_outputs_start_as_large_as_without_masks():
    torch.manual_seed(0)
    inputs, spreads = torch.randn(500, 256), []
    for fields in ({"density": 1.0}, {"density": 0.1, "first_weights": "fan_in"}, {"density": 0.1}):
        layer = nn.Linear(256, 200, bias=False)
        draw_masks(layer, SparsityConfig(**fields))
        spreads.append(float(layer(inputs).detach().std()))
    assert spreads[1] == pytest.approx(spreads[0], rel=0.05) and spreads[2] < 0.4 * spreads[0]


def test_trained_weights_are_not_scaled():
    net = Net()
    net.config = SimpleNamespace(num_ensemble_heads=2, _name_or_path="trained/model")
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"^first_weights='fan_in': accepted is dense for trained weights \(the mod"):
        draw_masks(net, SparsityConfig(density=0.5, first_weights="fan_in"))
    assert equal(before, snapshot(net))


def test_excluded_weights_carry_no_mask():
    net, _, sparsifier = sparse(model=Tower, density=0.4, exclude=["embed.*", "head.*"])
    assert list(masked_modules(net)) == ["layers.0.weight", "layers.1.weight"]
    assert sparsifier.report().overall.density == pytest.approx(0.4, abs=1e-3)


def test_group_densities():
    _, _, sparsifier = sparse(model=Tower, density=0.3, densities={"layers.*": 0.2, "layers.1.*": 0.25, "embed.*": 1.0})
    report = sparsifier.report()
    densities = [row.density for row in report.tensors]
    assert densities[:3] == pytest.approx([1.0, 0.2, 0.25], abs=1e-3)
    assert report.overall.active == round(0.3 * report.overall.size)


def test_declared_masks_are_kept_and_noted():
    net = Tower()
    net.config = SimpleNamespace(masked_modules=["layers.*", "head.*"])
    attach_masks(net, net.config.masked_modules)
    draw_masks(net, SparsityConfig(density=0.5, exclude=["layers.1.*"]))
    assert list(masked_modules(net)) == ["layers.0.weight", "head.weight"]
    assert net.config.masked_modules == ["layers.*", "head.*", "!layers.1.*"]
    fresh = Tower()
    assert attach_masks(fresh, net.config.masked_modules) == list(masked_modules(net))


def test_undeclared_masks_are_noted():
    net = Tower()
    net.config = SimpleNamespace(masked_modules=[])
    draw_masks(net, SparsityConfig(density=0.5, exclude=["embed.*"]))
    assert net.config.masked_modules == ["*", "!embed.*"]


def test_a_dense_config_declares_nothing():
    net = Tower()
    net.config = SimpleNamespace(masked_modules=[])
    draw_masks(net, SparsityConfig())
    assert net.config.masked_modules == []
    assert masked_modules(net) == {}


def test_tied_weights_have_one_mask():
    net = Tower()
    net.head = nn.Linear(16, Tower.words, bias=False)
    net.head.weight = net.embed.weight
    draw_masks(net, SparsityConfig(density=0.5))
    assert list(masked_modules(net)) == ["embed.weight", "layers.0.weight", "layers.1.weight"]
    assert check_masks(net) == []


# ------------------------------------------------------------------------------------ by saliency, of a checkpoint


def linear(weight):
    module = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight))
    return module


def test_snip_by_hand():
    # One sample x = (1, 4), wanted 1: w = (3, 0.5) gives 5, so the gradient 2 * (5 - 1) * x is (8, 32).
    net = linear([[3.0, 0.5]])
    loss = lambda: (net(torch.tensor([[1.0, 4.0]])) - 1).square().mean()  # noqa: E731
    assert snip({"weight": net.weight}, loss)["weight"].tolist() == [[24, 16]]
    draw_masks(net, SparsityConfig(density=0.5, initial_masks="snip"), loss)
    assert get_mask(net).tolist() == [[True, False]]
    assert net.weight.tolist() == [[3, 0]]
    assert net.weight.grad is None
    # x = (1, 8) gives 7 and the gradient 12 * x: 36 and 48, though 3 is still the larger weight.
    net = linear([[3.0, 0.5]])
    loss = lambda: (net(torch.tensor([[1.0, 8.0]])) - 1).square().mean()  # noqa: E731
    draw_masks(net, SparsityConfig(density=0.5, initial_masks="snip"), loss)
    assert get_mask(net).tolist() == [[False, True]]


def test_grasp_by_hand():
    # The same: H = 2 x x^T = ((2, 8), (8, 32)), g = (8, 32), H g = (272, 1088), w * H g = (816, 544).
    net = linear([[3.0, 0.5]])
    loss = lambda: (net(torch.tensor([[1.0, 4.0]])) - 1).square().mean()  # noqa: E731
    assert grasp({"weight": net.weight}, loss)["weight"][0].tolist() == pytest.approx([816, 544], rel=1e-2)
    # A negative weight whose removal strengthens the gradient goes, however large: w = (-3, 2), g = 2 * 4 * (1, 4).
    net = linear([[-3.0, 2.0]])
    loss = lambda: (net(torch.tensor([[1.0, 4.0]])) - 1).square().mean()  # noqa: E731
    assert grasp({"weight": net.weight}, loss)["weight"][0].tolist() == pytest.approx([-816, 2176], rel=1e-2)
    assert net.weight.tolist() == [[-3, 2]]
    draw_masks(net, SparsityConfig(density=0.5, initial_masks="grasp"), loss)
    assert get_mask(net).tolist() == [[False, True]]


def test_grasp_against_the_whole_hessian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    bias = net[0].bias.detach()

    def loss_at(flat):
        hidden = torch.tanh(x @ flat[:12].view(3, 4).T + bias)
        return (hidden @ flat[12:].view(2, 3).T - y).square().mean()

    flat = torch.cat([net[0].weight.detach().flatten(), net[2].weight.detach().flatten()])
    hessian = torch.autograd.functional.hessian(loss_at, flat)
    step = 1e-4
    grad = torch.stack([(loss_at(flat + step * e) - loss_at(flat - step * e)) / (2 * step) for e in torch.eye(18)])
    expected = flat * (hessian @ grad)
    weights = {"0.weight": net[0].weight, "2.weight": net[2].weight}
    scores = grasp(weights, lambda: (net(x) - y).square().mean())
    torch.testing.assert_close(
        torch.cat([score.flatten() for score in scores.values()]), expected, rtol=1e-3, atol=1e-6
    )
    draw_masks(net, SparsityConfig(density=0.5, initial_masks="grasp"), lambda: (net(x) - y).square().mean())
    mask = torch.cat([mask.flatten() for mask in masks_of(net).values()])
    assert set(mask.nonzero().flatten().tolist()) == set(expected.argsort(descending=True)[:9].tolist())


def slow_saliency(method, net):
    """Scores by weight name, the Hessian's product by a second backward pass."""
    weights = {name: module.weight for name, module in masked_or_all(net).items()}
    grads = torch.autograd.grad(loss_of(net), list(weights.values()), create_graph=True)
    if method == "snip":
        return {name: (weight * grad).abs().detach() for (name, weight), grad in zip(weights.items(), grads)}
    products = torch.autograd.grad(grads, list(weights.values()), [grad.detach() for grad in grads])
    return {name: (weight * product).detach() for (name, weight), product in zip(weights.items(), products)}


def masked_or_all(net):
    return {name: net.get_submodule(name.removesuffix(".weight")) for name in NAMES}


def assert_best(scores, masks, count):
    """The masks hold the ``count`` largest scores over all of them, which are approximate where GraSP is."""
    score = torch.cat([scores[name].flatten() for name in masks])
    mask = torch.cat([each.flatten() for each in masks.values()])
    assert mask.sum() == count
    ours, largest = score[mask].sort().values, score.sort().values[-count:]
    torch.testing.assert_close(ours, largest, rtol=1e-3, atol=1e-3 * float(score.abs().max()))


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_salient_weights_of_all_tensors_compete(method):
    torch.manual_seed(0)
    net = Net()
    scores, size = slow_saliency(method, net), sum(module.weight.numel() for module in masked_or_all(net).values())
    draw_masks(net, SparsityConfig(density=0.3, initial_masks=method), lambda: loss_of(net))
    assert_best(scores, masks_of(net), round(0.3 * size))
    assert_sound(net, "unstructured")


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_salient_weights_of_a_group_compete_alone(method):
    torch.manual_seed(0)
    net = Net()
    scores, size = slow_saliency(method, net), sum(module.weight.numel() for module in masked_or_all(net).values())
    densities = {"heads.*": 0.5, "embed.*": 1.0}
    draw_masks(net, SparsityConfig(density=0.4, densities=densities, initial_masks=method), lambda: loss_of(net))
    masks, total = masks_of(net), round(0.4 * size)
    alone = {"embed.weight": 192, "heads.0.weight": 192, "heads.1.weight": 192}
    for name, count in alone.items():
        assert_best({name: scores[name]}, {name: masks.pop(name)}, count)
    assert_best(scores, masks, total - sum(alone.values()))


@pytest.mark.parametrize("method", ["snip", "grasp"])
@pytest.mark.parametrize("structure", ["2:4", "constant_fan_in"])
def test_salient_weights_of_a_structure(method, structure):
    torch.manual_seed(0)
    net = Net()
    scores = slow_saliency(method, net)
    config = SparsityConfig(density=0.5, distribution="uniform", structure=structure, initial_masks=method)
    draw_masks(net, config, lambda: loss_of(net))
    assert_sound(net, structure)
    assert counts_of(net) == target_counts(net, config)
    for name, mask in masks_of(net).items():
        score, mask = (each.T if name == "third.weight" else each for each in (scores[name], mask))
        score, mask = (each.movedim(1, -1) if structure == "2:4" else each for each in (score, mask))
        length = 4 if structure == "2:4" else score[0].numel()
        for values, chosen in zip(score.reshape(-1, length), mask.reshape(-1, length)):
            assert values[chosen].min() >= values[~chosen].max() - 1e-3 * score.abs().max()


def test_saliency_leaves_no_trace():
    torch.manual_seed(0)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    draw_masks(net, SparsityConfig(density=0.5, initial_masks="grasp"), lambda: loss_of(net))
    assert all(parameter.grad is None for parameter in net.parameters())
    for name, mask in masks_of(net).items():
        assert torch.equal(net.get_parameter(name), before[name].masked_fill(~mask, 0))
    assert torch.equal(net.heads[0].bias, before["heads.0.bias"])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("file", ["directory", "shards", "file", "wrapped"])
def test_masks_of_a_checkpoint(structure, file, tmp_path):
    source = sparse(structure=structure, seed=5)[0]
    state = {name: value.clone() for name, value in source.state_dict().items()}
    if file == "shards":
        for i, names in enumerate((list(state)[::2], list(state)[1::2])):
            save_file({name: state[name] for name in names}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    else:
        prefix = "module._orig_mod." if file == "wrapped" else ""
        save_file({prefix + name: value for name, value in state.items()}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors" if file == "file" else tmp_path
    torch.manual_seed(1)
    net = Net()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    config = SparsityConfig(density=0.5, structure=structure, initial_masks=str(path), update_interval=5)
    draw_masks(net, config)
    assert equal(masks_of(net), masks_of(source))
    for name, mask in masks_of(net).items():
        assert torch.equal(net.get_parameter(name), weights[name].masked_fill(~mask, 0))
    list(train(net, optimizer := adamw(net), Sparsifier(net, optimizer, config, 26), last=11))
    assert_sound(net, structure)


def test_masks_of_a_checkpoint_that_do_not_fit(tmp_path):
    source = sparse()[0]
    state = {name: value.clone() for name, value in source.state_dict().items()}
    missing = {name: value for name, value in state.items() if name != "second.weight_mask"}
    cut = state | {"third.weight_mask": state["third.weight_mask"][:, :1].clone()}
    for name, tensors in (("missing", missing), ("cut", cut), ("whole", state)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "empty").mkdir()
    config = SparsityConfig(density=0.5, initial_masks=str(tmp_path))
    for path, structure, message in (
        (
            "missing.safetensors",
            "unstructured",
            r"the mask of second\.weight is missing; accepted is \[8, 5\]",
        ),
        ("cut.safetensors", "unstructured", r"third\.weight has the packed shape \[24, 1\]; accepted is \[24, 2\]"),
        ("whole.safetensors", "2:4", r"initial_masks='.*': embed\.weight: groups hold \d to \d active weights"),
        ("whole.safetensors", "constant_fan_in", r"initial_masks='.*': embed\.weight: groups hold \d to \d active"),
        ("text.safetensors", "unstructured", r"initial_masks=.*text\.safetensors is not safetensors"),
        ("", "unstructured", r"initial_masks=.*text\.safetensors is not safetensors"),
        ("empty", "unstructured", r"initial_masks='.*empty': the mask of embed\.weight is missing"),
    ):
        net = Net()
        attach_masks(net, ["*"])
        before = snapshot(net)
        with pytest.raises(ValueError, match=message):
            draw_masks(net, replace(config, initial_masks=str(tmp_path / path), structure=structure))
        assert equal(snapshot(net), before)


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_saliency_needs_a_loss(method):
    with pytest.raises(ValueError, match=rf"initial_masks='{method}': accepted is draw_masks\(.*, loss=\.\.\.\)"):
        draw_masks(Net(), SparsityConfig(density=0.5, initial_masks=method))


def test_saliency_of_a_loss_that_is_not_finite():
    net = Net()
    with pytest.raises(ValueError, match=r"the saliency of .*weight: not finite on this batch; accepted"):
        draw_masks(net, SparsityConfig(density=0.5, initial_masks="snip"), lambda: loss_of(net) * math.nan)


# --------------------------------------------------------------------------------------------------- first counts


def test_flops_counts_what_a_batch_uses():
    torch.manual_seed(0)
    net = Net()
    draw_masks(net, SparsityConfig(density=0.4, distribution="flops"), lambda: loss_of(net))
    # 8 rows of 8 words: a position of a convolution's output, or a row, is one use.
    uses = {"embed": 0, "first": 64, "second": 8 * 3 * 8, "third": 8, "heads.0": 8, "heads.1": 8}
    uses = {f"{name}.weight": count for name, count in uses.items()}
    assert weight_uses(masked_modules(net), lambda: loss_of(net)) == uses
    counts = counts_of(net)
    assert get_mask(net.embed).all()
    assert sum(counts.values()) == round(0.4 * sum(module.weight.numel() for module in masked_modules(net).values()))
    open_ones = [n for n, module in masked_modules(net).items() if counts[n] < module.weight.numel() and uses[n]]
    assert len(open_ones) >= 3
    for one, other in itertools.combinations(open_ones, 2):
        assert abs(counts[one] * uses[one] - counts[other] * uses[other]) < uses[one] + uses[other]


def test_flops_of_a_module_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    net = Twice()
    draw_masks(net, SparsityConfig(density=0.3, distribution="flops"), lambda: net(torch.ones(5, 40)).sum())
    assert counts_of(net) == {"a.weight": 320, "b.weight": 640}


def test_flops_of_convolutions_needs_a_batch():
    with pytest.raises(ValueError, match=r"distribution='flops': how often first\.weight is used is unknown; accepted"):
        draw_masks(Net(), SparsityConfig(density=0.5, distribution="flops"))
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 20))
    draw_masks(net, SparsityConfig(density=0.6, distribution="flops"))
    assert counts_of(net) == {"0.weight": 80, "1.weight": 64}


REFUSED = [
    ({"structure": "2:4", "density": 0.4}, r"density=0\.4, .*: accepted with structure=2:4 is density=0\.5"),
    ({"structure": "2:4", "densities": {"embed.*": 1.0}}, r"densities=.*: accepted with structure=2:4 is density=0\.5"),
    ({"structure": "1:3", "density": 0.333}, r"structure 1:3 needs input dimensions divisible by 3; one is 8, of a"),
    ({"structure": "2:16"}, r"structure 2:16 needs input dimensions divisible by 16; one is 8, of a weight \[24, 8\]"),
    ({"structure": "constant_fan_in", "density": 0.01},
     r"the density of .*weight \[.*\]: leaves \d+ weights for \d+ groups; accepted is at least one each, .* 0\.\d"),
    ({"densities": {"decoder.*": 0.5}}, r"densities='decoder\.\*': fits none of the 6 weights"),
    ({"densities": {"embed.*": 1.0, "heads.*": 1.0}, "density": 0.2}, r"densities: the fixed groups take 960 of the"),
    ({"initial_masks": "snip"}, r"initial_masks='snip': accepted is draw_masks"),
    ({"distribution": "flops"}, r"distribution='flops': how often first\.weight is used is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_refused_config_leaves_the_masks(fields, message):
    net = sparse()[0]
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        draw_masks(net, SparsityConfig(**{"density": 0.5} | fields))
    assert equal(snapshot(net), before)


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_refused_config_leaves_a_fresh_model(fields, message):
    net = Net()
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        draw_masks(net, SparsityConfig(**{"density": 0.5} | fields))
    assert equal(snapshot(net), before)


@pytest.mark.parametrize("structure", ["2:4", "1:4", "1:2", "4:4", "3:8"])
def test_counts_of_n_of_m(structure):
    n, m = map(int, structure.split(":"))
    net = Net()
    attach_masks(net, [name for name in NAMES if name != "second.weight" or m <= 4])
    config = SparsityConfig(density=n / m, structure=structure)
    for name, count in target_counts(net, config).items():
        assert count == net.get_parameter(name).numel() * n // m
    for name, count in target_counts(net, config, 0.9).items():
        assert count == net.get_parameter(name).numel() * max(n, round(0.9 * m)) // m
