"""A ResNet and a ViT of Transformers made sparse, trained by hand, saved and loaded: nothing knows their layers."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from sparse_nets import assert_groups, equal, masks_of, tiny_vit
from sparse_nets import sparse as make_sparse
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from nt_hf.models.masks import attach_masks, check_masks, masked_modules
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks, target_counts
from nt_hf.sparsity.sparsifier import Sparsifier

STEPS, KINDS = 50, 4


def resnet():
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=KINDS, num_channels=3
    )
    return ResNetForImageClassification(config)


MODELS = {"resnet": resnet, "vit": tiny_vit}
STEM = {"resnet": "resnet.embedder.*", "vit": "vit.embeddings.*"}  # of 3 input channels

# How often a weight of each tensor is used for one image: pixels of its output, tokens with the class token.
USES = {
    "resnet": [16 * 16, 8 * 8, 8 * 8, 4 * 4, 4 * 4, 4 * 4, 1],
    "vit": [4 * 4, *[4 * 4 + 1] * 12, 1],
}


def fresh(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().train()


def batch(step):
    """Noisy images of four kinds."""
    kinds = torch.randn(KINDS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(step + 1)
    labels = torch.randint(KINDS, (8,), generator=noise)
    return {"pixel_values": kinds[labels] + 0.5 * torch.randn(8, 3, 32, 32, generator=noise), "labels": labels}


def loss_of(model, step=0):
    return model(**batch(step)).loss


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=5e-3)


def sparse(name, **fields):
    fields = {"density": 0.3, "update_interval": 6, "distribution": "erk"} | fields
    model = lambda: MODELS[name]().train()  # noqa: E731
    return make_sparse(None, model, adamw, STEPS, loss=lambda model: loss_of(model, step=STEPS), **fields)


def train(model, optimizer, sparsifier, first=0, last=STEPS):
    """Yields the loss and the update of each step while its gradients are alive, and takes the optimizer's step."""
    for step in range(first, last):
        torch.manual_seed(step)  # for dropout
        loss = loss_of(model, step)
        loss.backward()
        update = sparsifier.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item(), update
        optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------- training


METHODS = [
    {"distribution": "uniform"},
    {"distribution": "er", "drop": "magnitude", "grow": "random", "regrow": "forbid"},
    {"distribution": "erk"},
    {"distribution": "flops", "drop": "set", "grow": "gradient_random"},
    {"initial_masks": "snip", "drop": "global_magnitude", "redistribute": "momentum"},
    {"initial_masks": "grasp", "drop": "taylor"},
    {"density_start": 1.0, "drop": "mest"},
    {"structure": "constant_fan_in"},
    {"structure": "2:4", "density": 0.5},
    {"update_interval": 0},
]


def cases():
    """Every method on one of the models in turn, structures on both; the other combinations are slow."""
    for i, fields in enumerate(METHODS):
        for m, name in enumerate(MODELS):
            marks = [] if i % 2 == m or "structure" in fields else pytest.mark.slow
            yield pytest.param(name, fields, marks=marks, id="-".join(map(str, (name, *fields.values()))))


@pytest.mark.parametrize(("name", "fields"), cases())
def test_what_holds_at_every_step(name, fields):
    if fields.get("structure") == "2:4":
        fields = fields | {"exclude": [STEM[name]]}
    model, optimizer, sparsifier = sparse(name, **fields)
    config = sparsifier.config
    first = masks_of(model)
    assert len(first) == len(USES[name]) - bool(config.exclude)
    size = sum(mask.numel() for mask in first.values())
    per_tensor = {key: int(mask.sum()) for key, mask in first.items()}
    movable = config.redistribute != "none" or config.density_start is not None
    losses, updates = [], []
    for loss, update in train(model, optimizer, sparsifier):
        losses.append(loss)
        updates += [update] if update else []
        report, masks = sparsifier.report(), masks_of(model)
        assert [(row.name, row.active) for row in report.tensors] == [(key, int(m.sum())) for key, m in masks.items()]
        assert all(row.target == row.active for row in [*report.tensors, *report.groups, report.overall])
        if config.density_start is None:
            assert report.overall.active == sum(per_tensor.values())
        if not movable:
            assert {row.name: row.active for row in report.tensors} == per_tensor
        for key, module in masked_modules(model).items():
            dead = ~masks[key]
            assert not module.weight[dead].any()
            assert not module.weight.grad[dead].any()
            assert not any(optimizer.state[module.weight][moment][dead].any() for moment in ("exp_avg", "exp_avg_sq"))
            assert_groups(module, config.structure)
    assert check_masks(model) == []
    assert [update.step for update in updates] == ([] if config.update_interval == 0 else list(range(6, STEPS, 6)))
    # A structure rounds each tensor to whole groups.
    assert sparsifier.report().overall.active == pytest.approx(
        round(config.density * size), abs=0 if config.structure == "unstructured" else 0.02 * size
    )
    assert equal(first, masks_of(model)) == (not updates)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("name", MODELS)
def test_two_of_four_needs_inputs_in_fours(name):
    with pytest.raises(ValueError, match=r"structure 2:4 needs input dimensions divisible by 4; one is 3"):
        sparse(name, structure="2:4", density=0.5)


# ---------------------------------------------------------------------------------------------- the first masks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "flops"])
def test_distributions(name, distribution):
    model, _, _ = sparse(name, distribution=distribution, density=0.2)
    shares = {}
    for (key, mask), uses in zip(masks_of(model).items(), USES[name]):
        outputs, inputs, *kernel = mask.shape
        shares[key] = {
            "uniform": mask.numel(),
            "er": (outputs + inputs) * torch.Size(kernel).numel(),
            "erk": outputs + inputs + sum(kernel),
            "flops": 1 / uses,
        }[distribution]
    active = {key: int(mask.sum()) for key, mask in masks_of(model).items()}
    partial = [key for key, mask in masks_of(model).items() if active[key] < mask.numel()]
    assert len(partial) > 1
    # Tensors that are not full have active weights in proportion to their shares, but for rounding.
    scale = sum(active[key] for key in partial) / sum(shares[key] for key in partial)
    assert all(abs(active[key] - scale * shares[key]) < 1.5 for key in partial)
    assert all(scale * shares[key] > active[key] - 1.5 for key in active)
    assert sum(active.values()) == round(0.2 * sum(mask.numel() for mask in masks_of(model).values()))


@pytest.mark.parametrize(
    ("name", "saliency"),
    [
        ("resnet", "snip"),
        ("vit", "snip"),
        ("vit", "grasp"),
        ("resnet", "grasp"),
    ],
)
def test_saliency(name, saliency):
    model = fresh(name).eval()  # without dropout, and batch norm by its running statistics
    model.set_attn_implementation("eager")
    attach_masks(model, ["*"])
    modules = masked_modules(model)
    weights = [module.weight for module in modules.values()]
    before = copy.deepcopy(model.state_dict())

    logits = model(batch(0)["pixel_values"]).logits
    chosen = nn.functional.one_hot(batch(0)["labels"], KINDS)
    loss = -(logits.log_softmax(1) * chosen).sum(1).mean()  # with a second derivative
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    if saliency == "snip":
        scores = [(weight * grad).abs() for weight, grad in zip(weights, grads)]
    else:
        products = torch.autograd.grad(sum((grad * grad.detach()).sum() for grad in grads), weights)
        scores = [weight * product for weight, product in zip(weights, products)]
    scores = torch.cat([score.detach().flatten() for score in scores])

    draw_masks(model, SparsityConfig(density=0.3, initial_masks=saliency), loss=lambda: loss_of(model))
    mask = torch.cat([mask.flatten() for mask in masks_of(model).values()])
    assert mask.sum() == round(0.3 * len(mask))
    best = torch.zeros_like(mask)
    best[scores.topk(int(mask.sum())).indices] = True
    assert int((mask & best).sum()) > 0.99 * int(mask.sum())
    for key, value in model.state_dict().items():
        if not key.endswith("weight_mask"):
            kept = masks_of(model).get(key)
            assert torch.equal(value, before[key] if kept is None else before[key].masked_fill(~kept, 0))


# --------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(tmp_path, name):
    model, optimizer, sparsifier = sparse(name)
    list(train(model, optimizer, sparsifier, last=20))
    # By the model's own names: those that a ViT has by default are older ones, which only from_pretrained knows.
    model.save_pretrained(tmp_path, save_original_format=False)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()

    # A stock model knows no masks, but has the weights, zeros included.
    dense = type(model).from_pretrained(tmp_path)
    assert masked_modules(dense) == {}
    assert all(torch.equal(value, saved[key]) for key, value in dense.state_dict().items())
    images = batch(0)["pixel_values"]
    assert torch.equal(dense(images).logits, copy.deepcopy(model).eval()(images).logits)

    # With masks attached it takes them too, and training goes on as if nothing had happened.
    loaded = dense.train()
    attach_masks(loaded, ["*"])
    loaded.load_state_dict(saved)
    assert equal(masks_of(loaded), masks_of(model))
    assert check_masks(loaded) == []
    again = torch.optim.AdamW(loaded.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = Sparsifier(loaded, again, sparsifier.config, STEPS)
    resumed.load_state_dict(sparsifier.state_dict())
    assert list(train(loaded, again, resumed, first=20, last=30)) == list(
        train(model, optimizer, sparsifier, first=20, last=30)
    )
    assert equal(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_names_of_any_format_are_read_by_a_class_that_has_masks(tmp_path, name):
    model, optimizer, sparsifier = sparse(name, exclude=[STEM[name]])
    list(train(model, optimizer, sparsifier, last=8))
    model.save_pretrained(tmp_path)

    class Masked(type(model)):
        def __init__(self, config):
            super().__init__(config)
            attach_masks(self, ["*", f"!{STEM[name]}"])

    loaded, told = Masked.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert equal(loaded.state_dict(), model.state_dict())
    assert check_masks(loaded) == []


@pytest.mark.parametrize("name", MODELS)
def test_masks_of_a_checkpoint(tmp_path, name):
    model, optimizer, sparsifier = sparse(name)
    list(train(model, optimizer, sparsifier, last=8))
    model.save_pretrained(tmp_path, save_original_format=False)
    other = fresh(name, seed=1)
    weights = copy.deepcopy(other.state_dict())
    draw_masks(other, SparsityConfig(density=0.3, initial_masks=str(tmp_path)))
    assert equal(masks_of(other), masks_of(model))
    for key, mask in masks_of(other).items():
        assert torch.equal(other.state_dict()[key], weights[key].masked_fill(~mask, 0))
    assert target_counts(other, sparsifier.config) == {key: int(mask.sum()) for key, mask in masks_of(other).items()}
