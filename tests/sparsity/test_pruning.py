"""First masks of trained models: block by block, by Wanda, by SparseGPT, at OWL's densities."""

import copy
import logging

import pytest
import torch
from families import tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from nt_hf.models.auto import NeuroTrailsForCausalLM
from nt_hf.models.masks import attach_masks, check_structure, get_mask, is_transposed, maskable_modules, masked_modules
from nt_hf.models.wide_resnet import WideResNetConfig, WideResNetForImageClassification
from nt_hf.sparsity import pruning
from nt_hf.sparsity.block_replay import block_by_block
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.layer_inputs import Inputs, in_turn, input_rows, look_at, original_inputs, weight_rows
from nt_hf.sparsity.pruning import drift, owl_densities, prune, sparsegpt, wanda

SIZES = {"vocab_size": 60, "num_hidden_layers": 3, "pad_token_id": 0}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, **SIZES)
    ).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4)).eval()


def wide_resnet() -> WideResNetForImageClassification:
    torch.manual_seed(0)
    return WideResNetForImageClassification(WideResNetConfig(num_hidden_layers=3, width=1, num_labels=5)).eval()


def three_heads() -> nn.Module:
    return tiny_model("qwen3")


MODELS = {"llama": llama, "gpt2": gpt2, "wide_resnet": wide_resnet, "three heads": three_heads}


def batches_for(model: nn.Module, count: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    if model.config.model_type == "wide_resnet":
        return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)} for _ in range(count)]
    ids = torch.randint(1, 60, (count, 2, 12), generator=generator)
    return [{"input_ids": batch, "use_cache": False} for batch in ids]


def layer_and_inputs(kind: str = "linear", rows: int = 200) -> tuple[nn.Module, torch.Tensor]:
    """A layer of 24 inputs and 10 outputs, and correlated inputs ``[rows, 24]``."""
    torch.manual_seed(1)
    layer = nn.Linear(24, 10, bias=False) if kind == "linear" else Conv1D(10, 24)
    with torch.no_grad():
        layer.weight.normal_()
    return layer, torch.randn(rows, 24) @ torch.randn(24, 24) * torch.linspace(0.2, 3, 24)


def known(rows: torch.Tensor, products: bool) -> Inputs:
    inputs = Inputs(torch.zeros((24, 24) if products else 24))
    for part in rows.split(64):
        inputs.add(part, None)
    return inputs


# ------------------------------------------------------------------------------------------------- block by block


@pytest.mark.parametrize("name", MODELS)
def test_blocks_run_again_as_they_ran_in_the_model(name):
    model = MODELS[name]()
    blocks, batches = pruning.blocks_of(model), batches_for(MODELS[name]())
    expected: dict[nn.Module, list[torch.Tensor]] = {block: [] for block in blocks}
    hooks = [b.register_forward_hook(lambda block, _, out: expected[block].append(out)) for b in blocks]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    found: dict[nn.Module, list[torch.Tensor]] = {block: [] for block in blocks}
    for run in block_by_block(model, blocks, batches):
        block = run.block
        hook = block.register_forward_hook(lambda block, _, out: found[block].append(out))
        assert len(list(run.changed())) == len(batches)
        hook.remove()
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    for block in blocks:
        assert len(found[block]) == len(batches)
        for one, other in zip(found[block], expected[block]):
            assert torch.equal(first(one), first(other))


@pytest.mark.parametrize("name", MODELS)
def test_a_block_sees_the_output_of_the_changed_ones_before_it(name):
    model, batches = MODELS[name](), batches_for(MODELS[name]())
    blocks = pruning.blocks_of(model)
    seen = []
    for run in block_by_block(model, blocks, batches):
        block = run.block
        hook = block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        list(run.changed())
        hook.remove()
        with torch.no_grad():
            for weight in block.parameters():
                weight.mul_(0.9)
    with torch.no_grad():  # the last block itself was changed after it was looked at
        for weight in blocks[-1].parameters():
            weight.div_(0.9)
    expected = []
    blocks[-1].register_forward_hook(lambda _, args, out: expected.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for one, other in zip(seen[-len(batches) :], expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_models_whose_blocks_cannot_be_run_alone_are_refused():
    class Between(nn.Module):
        def __init__(self, twice: bool):
            super().__init__()
            self.layers, self.twice = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), twice

        def forward(self, x):
            x = self.layers[0](x)
            return self.layers[0](x) if self.twice else self.layers[1](x * 2)

    for twice, message in ((False, "what an earlier one returned, as it is"), (True, "blocks that are called once")):
        model = Between(twice)
        with pytest.raises(NotImplementedError, match=f"^Linear: accepted are .*{message}"):
            list(block_by_block(model, list(model.layers), [{"x": torch.ones(1, 4)}]))


# -------------------------------------------------------------------------------------------------------- methods


def test_wanda_keeps_the_largest_products_of_every_output_unit():
    layer, rows = layer_and_inputs()
    mask = wanda(layer, 10 * 7, "unstructured", known(rows, products=False))
    scores = layer.weight.detach().abs() * rows.norm(dim=0)
    for row, chosen in zip(scores, mask):
        assert chosen.sum() == 7 and row[chosen].min() > row[~chosen].max()
    more = wanda(layer, 10 * 7 + 4, "unstructured", known(rows, products=False))
    assert more.sum() == 74 and (more | mask).equal(more)
    eighth = scores.sort(descending=True).values[:, 7]
    assert set((more.sum(1) == 8).nonzero()[:, 0].tolist()) == set(eighth.topk(4).indices.tolist())


def eliminated(weights: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Optimal brain surgeon from left to right by its definition, with an inverse of its own for every column."""
    weights = weights.double().clone()
    for column in range(weights.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = torch.where(mask[:, column], 0, weights[:, column]) / inverse[0, 0]
        weights[:, column:] -= error[:, None] * inverse[0]
    return weights * mask


@pytest.mark.parametrize("columns", [128, 5], ids=["one stretch", "stretches of 5"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_sparsegpt_makes_up_for_what_it_prunes_as_the_definition_says(monkeypatch, columns, kind):
    monkeypatch.setattr(pruning, "COLUMNS", columns)
    layer, rows = layer_and_inputs(kind)
    before = weight_rows(layer).clone()
    mask = sparsegpt(layer, 120, "unstructured", known(rows, products=True))
    hessian = (rows.T @ rows).double() / len(rows)
    hessian += torch.eye(24) * pruning.DAMPING * hessian.diagonal().mean()
    assert mask.shape == layer.weight.shape and mask.sum() == 120
    rows_mask = weight_rows(layer, mask)
    expected = eliminated(before, hessian, rows_mask)
    torch.testing.assert_close(weight_rows(layer).double(), expected, rtol=1e-3, atol=1e-3)


def test_what_earlier_blocks_changed_is_made_up_for_by_least_squares(monkeypatch):
    monkeypatch.setattr(pruning, "DAMPING", 1e-9)
    layer, original = layer_and_inputs(rows=300)
    changed = original @ (torch.eye(24) + 0.1 * torch.randn(24, 24)) + 0.1 * torch.randn(300, 24)
    inputs = Inputs(torch.zeros(24, 24))
    for part, before in zip(changed.split(64), original.split(64)):
        inputs.add(part, before)
    weights = layer.weight.detach()
    best = torch.linalg.lstsq(changed.double(), (original @ weights.T).double()).solution.T
    torch.testing.assert_close((weights + drift(weights, inputs)).double(), best, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["llama", "three heads"])
def test_the_original_inputs_are_those_of_the_model_as_it_was(name):
    model, batches = MODELS[name](), batches_for(MODELS[name]())
    unchanged, gaps = MODELS[name](), []
    expected = {}
    for run in block_by_block(unchanged, pruning.blocks_of(unchanged), batches):
        layers = {n: m for n, m in run.block.named_modules() if isinstance(m, nn.Linear)}
        watched = look_at(run, in_turn(run, layers), products=True)
        expected[run.number] = {n: inputs.sums.diagonal() for n, inputs in watched.items()}
    for run in block_by_block(model, pruning.blocks_of(model), batches):
        layers = {n: m for n, m in run.block.named_modules() if isinstance(m, nn.Linear)}
        watched = look_at(run, in_turn(run, layers), products=True, originals=original_inputs(run, layers))
        for n, inputs in watched.items():
            if not gaps:  # nothing has changed before the first block
                torch.testing.assert_close(inputs.crossed, inputs.sums)
            bound = (expected[run.number][n] * inputs.sums.diagonal()).sqrt()  # Cauchy and Schwarz
            assert (inputs.crossed.diagonal() <= bound * (1 + 1e-4) + 1e-6).all(), n
        gaps.append(run.number)
        with torch.no_grad():
            for weight in run.block.parameters():
                weight.mul_(0.9)


def test_each_method_changes_the_outputs_less_than_the_simpler_one():
    errors = []
    for method in ("magnitude", "wanda", "sparsegpt"):
        layer, rows = layer_and_inputs(rows=400)
        before = rows @ layer.weight.T.detach()
        pruner = pruning.PRUNERS[method]
        mask = pruner.mask(layer, 120, "unstructured", known(rows, bool(pruner.products)))
        errors.append(float((rows @ (layer.weight.detach() * mask).T - before).square().mean()))
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.5 * errors[2]


@pytest.mark.parametrize("structure", ["unstructured", "constant_fan_in", "2:4"])
@pytest.mark.parametrize("method", pruning.PRUNERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "three heads"])
def test_masks_have_the_density_and_the_structure(name, method, structure):
    model = MODELS[name]()
    exclude = ["*embed*", "*wte*", "*wpe*", "*lm_head*"]
    exclude = [glob for glob in exclude if any(glob.strip("*") in n for n, _ in model.named_parameters())]
    config = SparsityConfig(
        density=0.5, distribution="uniform", structure=structure, initial_masks=method, exclude=exclude
    )
    before = {n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "weight")}
    draw_masks(model, config, batches=batches_for(model))
    masked = masked_modules(model)
    assert len(masked) > 10
    for module in masked.values():
        mask = get_mask(module)
        assert abs(mask.float().mean() - 0.5) < 0.02
        assert not module.weight[~mask].any()
        assert (module.weight[mask] == 0).sum() <= 1  # what a weight makes up for can cancel it
        check_structure(mask, structure, is_transposed(module))
    changed = {n for n, m in model.named_modules() if hasattr(m, "weight") and hasattr(m, "weight_mask")
               and not torch.equal(m.weight.detach(), before[n] * get_mask(m))}  # fmt: skip
    assert bool(changed) == (method == "sparsegpt")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_convolutions_are_pruned_by_their_patches(method):
    model = wide_resnet()
    within = {module for block in pruning.blocks_of(model) for module in block.modules()}
    exclude = [name for name, module in maskable_modules(model).items() if module not in within]
    config = SparsityConfig(density=0.5, distribution="uniform", initial_masks=method, exclude=exclude)
    draw_masks(model, config, batches=batches_for(model))
    densities = [float(get_mask(module).float().mean()) for module in masked_modules(model).values()]
    assert len(densities) >= 6 and all(abs(density - 0.5) < 0.01 for density in densities)


def test_a_convolution_is_a_linear_layer_of_its_patches():
    conv, x = nn.Conv2d(3, 6, 3, padding=1, stride=2, bias=False), torch.randn(2, 3, 8, 8)
    rows = input_rows(conv, x)
    outputs = (rows @ weight_rows(conv).T).view(2, 4, 4, 6).movedim(-1, 1)
    torch.testing.assert_close(outputs, conv(x))


def test_blocks_with_outliers_stay_denser_by_owl():
    model, batches = llama(), batches_for(llama())
    with torch.no_grad():  # a few inputs of the second block are far larger
        model.model.layers[1].input_layernorm.weight[:2] = 60
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    modules = {f"{name}.weight": model.get_submodule(name) for name in names}
    densities = owl_densities(model, modules, 0.4, batches)
    first, second, third = (densities[f"{name}.weight"] for name in names)
    assert second > first and second > third and abs(sum(densities.values()) / 3 - 0.4) < 1e-6
    assert max(densities.values()) - min(densities.values()) == pytest.approx(2 * pruning.SPREAD)
    config = SparsityConfig(
        density=0.4, distribution="owl", initial_masks="wanda", exclude=["model.embed_tokens.*", "lm_head.*"]
    )
    draw_masks(model, config, batches=batches)
    counts = {name: float(get_mask(module).float().mean()) for name, module in masked_modules(model).items()}
    total = sum(int(get_mask(module).sum()) for module in masked_modules(model).values())
    assert total == round(0.4 * sum(module.weight.numel() for module in masked_modules(model).values()))
    assert counts["model.layers.1.self_attn.q_proj.weight"] > counts["model.layers.0.self_attn.q_proj.weight"]


def test_layers_that_take_one_tensor_share_what_is_known_of_it():
    model, batches = llama(), batches_for(llama())
    run = next(_passes := block_by_block(model, pruning.blocks_of(model), batches))
    modules = {name: module for name, module in run.block.named_modules() if isinstance(module, nn.Linear)}
    inputs = look_at(run, in_turn(run, modules), products=True)
    assert inputs["self_attn.q_proj"] is inputs["self_attn.v_proj"] is not inputs["self_attn.o_proj"]
    assert inputs["mlp.gate_proj"] is inputs["mlp.up_proj"]
    assert [sorted(name.partition(".")[2] for name in layers) for layers in in_turn(run, modules)] == [
        ["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    assert inputs["mlp.down_proj"].count == inputs["self_attn.q_proj"].count == 3 * 2 * 12


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("fields", "with_batches", "message"),
    [
        ({"initial_masks": "wanda"}, False, r"^initial_masks='wanda': accepted is draw_masks\(model, config, batches="),
        ({"distribution": "owl"}, False, r"^distribution='owl': accepted is draw_masks\(model, config, batches=...\)$"),
        ({"initial_masks": "wanda"}, True, "^initial_masks=wanda: model.embed_tokens.weight lies outside the blocks; "),
    ],
)
def test_what_cannot_be_pruned_is_one_line_and_leaves_no_masks(fields, with_batches, message):
    model = llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        draw_masks(model, SparsityConfig(density=0.5, **fields), batches=batches_for(model) if with_batches else None)
    assert not masked_modules(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_batches_that_are_not_finite_are_named():
    model = wide_resnet()
    modules = {"stage": next(m for n, m in pruning.blocks_of(model)[0].named_modules() if isinstance(m, nn.Conv2d))}
    attach_masks(model, ["*"])
    batches = [{"pixel_values": torch.full((1, 3, 16, 16), torch.nan)}]
    with pytest.raises(ValueError, match=r"^stage: its inputs are not finite on the calibration batches$"):
        prune(model, modules, {"stage": 10}, "wanda", "unstructured", batches)


def test_random_masks_over_trained_weights_warn_and_name_better_ones(tmp_path, caplog):
    model = llama()
    model.save_pretrained(tmp_path)
    config = SparsityConfig(density=0.5, exclude=["model.embed_tokens.*", "lm_head.*"])
    with caplog.at_level(logging.WARNING, "nt_hf"):
        draw_masks(model, config)
        assert "trained weights" not in caplog.text
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        gradual = SparsityConfig(density=0.5, density_start=1.0, exclude=config.exclude)
        draw_masks(copy.deepcopy(loaded), gradual)  # of which the first masks are full
        assert "trained weights" not in caplog.text
        draw_masks(copy.deepcopy(loaded), config)
        assert caplog.text.count("random masks over the trained weights") == 1
        trails = NeuroTrailsForCausalLM.from_stock(loaded, num_ensemble_heads=2, blocks_in_head=1)
        draw_masks(trails, SparsityConfig(density=0.5, exclude=["model.embed_tokens.*", "lm_heads.*"]))
    assert caplog.text.count("random masks over the trained weights") == 2
    assert "sparsegpt, wanda or magnitude" in caplog.text


@pytest.mark.parametrize("structure", ["constant_fan_in", "2:4"])
def test_owl_and_structures(structure):
    model = llama()
    exclude = ["model.embed_tokens.*", "lm_head.*"]
    fields = {"distribution": "owl", "initial_masks": "wanda", "structure": structure, "exclude": exclude}
    draw_masks(model, SparsityConfig(density=0.5, **fields), batches=batches_for(model))
    masks = [(get_mask(module), is_transposed(module)) for module in masked_modules(model).values()]
    for mask, transposed in masks:
        check_structure(mask, structure, transposed)
    active = sum(int(mask.sum()) for mask, _ in masks) / sum(mask.numel() for mask, _ in masks)
    assert abs(active - 0.5) < 0.01


def test_convolutions_cannot_be_n_m_by_sparsegpt():
    model = wide_resnet()
    within = {module for block in pruning.blocks_of(model) for module in block.modules()}
    exclude = [name for name, module in maskable_modules(model).items() if module not in within]
    config = SparsityConfig(density=0.5, structure="2:4", initial_masks="sparsegpt", exclude=exclude)
    with pytest.raises(ValueError, match=r"^initial_masks=sparsegpt: .* with structure=2:4 are linear layers$"):
        draw_masks(model, config, batches=batches_for(model))
    assert not masked_modules(model)


def test_a_layer_that_runs_twice_in_its_block_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = nn.Sequential(Twice(), Twice())
    run = next(block_by_block(model, list(model), [{"input": torch.randn(2, 4)}]))
    with pytest.raises(ValueError, match=r"^a: runs twice in its block; accepted is to exclude it$"):
        in_turn(run, {"a": run.block.layer})
