"""Image classifiers with heads: each trail is its stock model, and everything that decoders have."""

import contextlib
import copy
import pickle
import subprocess
import sys

import pytest
import torch
from image_families import (
    MASKED,
    ImageParity,
    all_image_families,
    image_outcome,
    images,
    parity,
    tiny_model,
)
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments

import nt_hf
from nt_hf import NeuroTrailsForCausalLM, NeuroTrailsForImageClassification, SparsityConfig, draw_masks
from nt_hf.models.auto import class_of_family
from nt_hf.sparsity.measures import head_overlap, masks_by_head

FAMILIES = (
    "resnet basic", "resnet bottleneck", "wide_resnet", "vit", "deit", "convnext", "convnextv2", "regnet", "beit",
    "vit_msn", "ijepa", "bit", "dinov2", "dinov2_with_registers",
)  # fmt: skip
#: Stages, a list of blocks of different widths, a list of equal ones, modules between stages, an encoder's list.
SOME = ("resnet basic", "wide_resnet", "vit", "convnext", "dinov2")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_trail_is_its_stock_model(family):
    model, batch = tiny_model(family, **MASKED), images()
    result = parity(model)
    assert result.exact, result
    output = model(**batch, output_head_logits=True)
    assert torch.allclose(output.logits, output.head_logits.mean(0), atol=1e-6)
    assert not torch.equal(output.head_logits[0], output.head_logits[1])


@pytest.mark.slow
def test_every_image_classifier_of_transformers_is_exact_or_refused():
    results = {}
    for family in all_image_families():
        try:
            results[family] = image_outcome(family)
        except Exception as error:  # it needs a package that is not installed
            results[family] = error
    works = {family: result for family, result in results.items() if isinstance(result, ImageParity)}
    assert not {family: result for family, result in works.items() if not result.exact}
    assert works.keys() >= {family.split()[0] for family in FAMILIES}
    assert len([result for result in results.values() if isinstance(result, Exception)]) < 3, results


@pytest.mark.parametrize("family", SOME)
def test_gradients_are_those_of_a_plain_loss(family):
    model, batch = tiny_model(family).train(), images(6)
    before = copy.deepcopy(model.state_dict())
    loss = model(**batch).loss
    loss.backward()
    used = [(name, weight) for name, weight in model.named_parameters() if weight.grad is not None]
    assert {name for name, _ in model.named_parameters()} - dict(used).keys() <= {"model.embeddings.mask_token"}
    gradients = {name: weight.grad.clone() for name, weight in used}
    after = {name: value.clone() for name, value in model.named_buffers()}
    model.load_state_dict(before)
    model.zero_grad()
    logits = model(batch["pixel_values"], output_head_logits=True).head_logits
    plain = torch.stack([nn.functional.cross_entropy(x, batch["labels"]) for x in logits]).mean()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, weight in used:
        assert torch.allclose(gradients[name], weight.grad, rtol=1e-4, atol=1e-7), name
    for name, value in model.named_buffers():  # statistics of batch norms, each head's own
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("family", ["resnet basic", "wide_resnet"])
def test_each_head_has_its_own_statistics(family):
    model = tiny_model(family, blocks_in_head=1).train()
    model(**images(6))
    norms = [[x for x in head.modules() if isinstance(x, nn.BatchNorm2d)] for head in model.model.heads]
    assert norms[0] and all(not torch.equal(a.running_mean, b.running_mean) for a, b in zip(*norms[:2]))


@pytest.mark.parametrize("family", SOME)
def test_a_checkpoint_comes_back(family, tmp_path):
    model, batch = tiny_model(family, **MASKED), images()
    model.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "sparse", sparse=True)
    expected = model(**batch, output_head_logits=True)
    for kind in ("dense", "sparse"):
        for loader in (NeuroTrailsForImageClassification, AutoModelForImageClassification):
            again = loader.from_pretrained(tmp_path / kind)
            assert type(again) is type(model) and torch.equal(again(**batch).logits, expected.logits)
    two = NeuroTrailsForImageClassification.from_pretrained(tmp_path / "sparse", heads=[2, 0])
    assert torch.equal(two(**batch, output_head_logits=True).head_logits, expected.head_logits[[2, 0]])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).logits, expected.logits)


CODE = """
import sys
sys.modules["nt_hf"] = None  # not installed
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.slow
def test_a_checkpoint_carries_its_code(tmp_path):
    model, batch = tiny_model("wide_resnet", **MASKED), images()
    model.save_pretrained(tmp_path / "model")
    torch.save(batch["pixel_values"], tmp_path / "pixels")
    arguments = [str(tmp_path / name) for name in ("model", "pixels", "out")]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CODE, *arguments], check=True, env=environment, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "out"), model(**batch).logits)


@pytest.mark.parametrize("family", SOME)
def test_every_way_in(family, tmp_path):
    batch = images()
    stock = tiny_model(family).extract_trail(0)
    stock.save_pretrained(tmp_path)
    expected = stock(batch["pixel_values"]).logits
    for source in (stock, tmp_path):
        model = NeuroTrailsForImageClassification.from_stock(source, num_ensemble_heads=2, blocks_in_head=2).eval()
        assert torch.equal(model(**batch, output_head_logits=True).head_logits, expected.expand(2, *expected.shape))
    other = tiny_model(family, seed=2).extract_trail(0)
    full = NeuroTrailsForImageClassification.from_stocks([stock, other]).eval()
    found = full(**batch, output_head_logits=True).head_logits
    assert torch.equal(found, torch.stack([expected, other(batch["pixel_values"]).logits]))
    owners: dict[int, set[str]] = {}
    for name, weight in full.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), set()).add(name.removeprefix("model.").split(".")[1])
    assert all(len(heads) == 1 for heads in owners.values())


@pytest.mark.parametrize("family", SOME)
def test_a_batch_for_each_head_and_some_heads(family):
    model, batch = tiny_model(family), images()
    some = model(**batch, output_head_logits=True, active_heads=[2, 0]).head_logits
    assert torch.equal(some, model(**batch, output_head_logits=True).head_logits[[2, 0]])
    model.train()
    for module in model.modules():  # whose statistics would depend on the batch
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    rows = torch.stack([batch["pixel_values"], batch["pixel_values"].flip(0), batch["pixel_values"].flip(1)])
    labels = torch.stack([batch["labels"], batch["labels"].flip(0), batch["labels"]])
    losses = model(pixel_values=rows, labels=labels).head_losses
    for head in range(3):
        alone = model(pixel_values=rows[head], labels=labels[head]).head_losses[head]
        assert losses[head].item() == pytest.approx(alone.item(), rel=1e-5)


def test_soft_labels_and_uncertainty():
    model, batch = tiny_model("vit"), images()
    hard = model(**batch).head_losses
    soft = model(batch["pixel_values"], labels=nn.functional.one_hot(batch["labels"], 7).float())
    assert torch.allclose(soft.head_losses, hard, atol=1e-6)
    measured = model(batch["pixel_values"], output_uncertainty=True).uncertainty
    assert measured.mutual_information.shape == (4,) and (measured.mutual_information > 0).all()


def test_half_precision_and_compiled():
    model, batch = tiny_model("wide_resnet"), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(batch["pixel_values"]).logits, model(batch["pixel_values"]).logits, atol=1e-5)
    half = model.to(torch.bfloat16)
    pixels = batch["pixel_values"].bfloat16()
    logits = half(pixels, output_head_logits=True).head_logits
    assert torch.equal(logits[1], half.extract_trail(1)(pixels).logits)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("siglip", r"^SiglipConfig \(model_type='siglip'\) says not how deep it is"),
        ("hgnet_v2", r"^HGNetV2ForImageClassification cannot have heads: accepted are a base model and one classifier"),
        ("swin", r"^SwinForImageClassification cannot have heads: "),
        (
            "levit",
            r"^LevitForImageClassification cannot have heads: .* \(it has 28 blocks, its configuration speaks of 12",
        ),
        ("hiera", r"^HieraForImageClassification cannot have heads: .* on nothing but the output of the one before"),
        ("imagegpt", r"^ImageGPTForImageClassification cannot have heads: "),
    ],
)
def test_what_cannot_have_heads_is_named(family, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        kind = class_of_family(family)
        kind(kind.config_class())


def test_two_heads_masks_are_compared():
    model = tiny_model("wide_resnet", **MASKED)
    draw_masks(model, SparsityConfig(density=0.5, distribution="uniform"))
    masks = masks_by_head(model)
    assert len(masks) == 3 and masks[0].keys() == masks[1].keys() and "layers.0.conv1" in masks[0]
    assert 0.2 < head_overlap(masks) < 0.5


@pytest.mark.parametrize("fails", [False, True])
def test_masks_that_a_batch_chooses_leave_the_statistics_as_they_were(fails):
    model, batch = tiny_model("resnet basic", **MASKED).train(), images(6)
    before = {name: x.clone() for name, x in model.named_buffers() if not name.endswith("weight_mask")}

    def loss():
        value = model(**batch).loss
        assert not torch.equal(model.state_dict()[name], before[name]), "a pass in training mode moves them"
        if fails:
            raise ValueError("no loss")
        return value

    name = next(name for name in before if name.endswith("running_mean"))
    with pytest.raises(ValueError, match="no loss") if fails else contextlib.nullcontext():
        draw_masks(model, SparsityConfig(density=0.5, initial_masks="snip"), loss=loss)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.training


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_what_image_models_do_not_know_is_refused(options, base):
    model = tiny_model("vit")
    model = model.model if base else model
    pixels = images()["pixel_values"]
    with pytest.raises(TypeError, match=f"{next(iter(options))}: not known to image models of several heads"):
        model(pixels, **options)
    with pytest.raises(TypeError, match="unknown argument pixels"):
        model(pixels=pixels)
    model.set_attn_implementation("eager")  # sdpa itself refuses attentions
    setattr(model.config, next(iter(options)), True)
    with pytest.raises(TypeError, match="not known to image models"):
        model(pixels)


def test_checkpointed_blocks_have_the_same_gradients():
    model, batch = tiny_model("vit").train(), images()
    model(**batch).loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(**batch).loss.backward()
    for name, weight in model.named_parameters():
        assert torch.allclose(gradients[name], weight.grad, rtol=1e-4, atol=1e-6), name


def test_trainer_accumulates_means(tmp_path):
    model, batch = tiny_model("vit", **MASKED), images(8)
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(batch["pixel_values"], batch["labels"])]
    weights = []
    for size, passes in ((8, 1), (2, 4)):
        own = copy.deepcopy(model)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=passes,
            learning_rate=1e-2, optim="sgd", max_grad_norm=0.0, report_to="none", save_strategy="no", use_cpu=True,
            lr_scheduler_type="constant", remove_unused_columns=False,
        )  # fmt: skip
        Trainer(own, arguments, train_dataset=rows).train()
        weights.append(own.classifiers[0].weight.detach())
    assert torch.allclose(*weights, atol=1e-6) and not torch.equal(weights[0], model.classifiers[0].weight)


def test_kinds_are_told_apart(tmp_path):
    stock = tiny_model("vit").extract_trail(0)
    with pytest.raises(ValueError, match=r"^NeuroTrailsForCausalLM: ViTForImageClassification is of another kind"):
        NeuroTrailsForCausalLM.from_stock(stock)
    with pytest.raises(ValueError, match=r"^blocks_in_head=7: accepted is 0 to num_hidden_layers=6"):
        NeuroTrailsForImageClassification.from_stock(stock, blocks_in_head=7)
    with pytest.raises(ValueError, match=r"num_hidden_layers=7: accepted is a multiple of stages=3"):
        AutoConfig.for_model("wide_resnet", num_hidden_layers=7)
    assert nt_hf.NeuroTrailsWideResNetForImageClassification is class_of_family("wide_resnet")
    assert nt_hf.NeuroTrailsResNetConfig.model_type == "neurotrails_resnet"
