"""Runs of image classifiers on the digits, with tiny models: trained, continued, evaluated, on several processes."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, slow
from processes import finish
from recipe_runs import call, of, start, train
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from nt_hf import NeuroTrailsForImageClassification, check_masks
from nt_hf.cli import plan, program, train_images
from nt_hf.config import TrainConfig, load_run_config
from nt_hf.data.image_config import ImageConfig
from nt_hf.data.image_sets import open_training_images
from nt_hf.data.images import ImageBatches
from nt_hf.evaluation.classification import by_scorer, disagreement, load_image_model, predict, score
from nt_hf.models.auto import register
from nt_hf.training.metrics import read_metrics
from nt_hf.training.optimizer import learning_rate, make_optimizer

# Eight channels: with fewer, a strided 1x1 convolution of PyTorch 2.13 corrupts memory on a CPU without AVX-512.
CONFIG = """
model: {base: wide_resnet, num_hidden_layers: 3, embedding_size: 8, width: 1, blocks_in_head: 2, num_ensemble_heads: 2}
data: {crop_padding: 1}
sparsity: {density: 0.5, update_interval: 3}
train: {max_steps: 12, batch_size: 32, optimizer: sgd, nesterov: true, learning_rate: 0.05, weight_decay: 5.0e-4,
        precision: fp32, lr_schedule: step, warmup_ratio: 0.0, log_steps: 1, eval_steps: 6, save_steps: 6}
"""
# Without batch norm, whose statistics are of the rows of one pass.
VIT = CONFIG.replace(
    "{base: wide_resnet, num_hidden_layers: 3, embedding_size: 8, width: 1,",
    "{base: vit, num_hidden_layers: 3, hidden_size: 16, intermediate_size: 24, num_attention_heads: 2, patch_size: 4,",
)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def vit(config) -> Path:
    path = config.with_name("vit.yaml")
    path.write_text(VIT)
    return path


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """The directory of a finished run."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    call(train_images.main, "--config", config, "--output_dir", directory)
    return directory


def require_same_files(one: Path, other: Path) -> None:
    """Weights, masks, statistics and the training state of two checkpoints are bit for bit the same."""
    for file in [one / "model.safetensors", *(one / "training_state").glob("*.safetensors")]:
        first, second = load_file(file), load_file(other / file.relative_to(one))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_metrics_count_images(run):
    records = read_metrics(run / "metrics.jsonl")
    assert of(records, "train", "step", "images") == [(step, 32 * step) for step in range(1, 13)]
    rates = [record["lr"] for record in records if record["event"] == "train"]
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 3 + [0.0005] * 3 + [0.00005] * 3)
    for record in (record for record in records if record["event"] == "train"):
        assert record["loss"] == pytest.approx(sum(record["head_losses"]) / 2)
        assert record["images_per_second"] > 0 and record["mfu"] is None and 0 <= record["data_wait"] < 0.9
        assert not {"perplexity", "tokens", "tokens_per_second"} & record.keys()
    assert of(records, "update", "step") == [(3,), (6,), (9,)]
    assert of(records, "eval", "step", "training_images", "images") == [(0, 0, 360), (6, 192, 360), (12, 384, 360)]
    losses = of(records, "eval", "loss")
    assert losses[-1] < losses[0]


def test_the_figures_are_those_of_the_evaluation_of_the_checkpoint(run):
    _, images = open_training_images(ImageConfig())
    model = load_image_model(run / "checkpoint-12")
    logits, labels = predict(model, ImageBatches(images, batch_size=50, training=False))
    last = read_metrics(run / "metrics.jsonl")[-1]
    for name, log_probs in by_scorer(logits):
        kind, _, which = name.replace(",", "").partition(" ")
        found = [last[f"{kind}_{key}"][which if kind == "ensemble" else int(which)] for key in ("accuracies", "losses")]
        expected = score(log_probs, labels)
        assert found == pytest.approx([expected.accuracy, expected.nll], rel=1e-5)
        values = last[f"{kind}_eces"]
        assert values[which if kind == "ensemble" else int(which)] == pytest.approx(expected.ece, abs=1e-4)
    assert last["accuracy"] == last["ensemble_accuracies"]["logits"] and last["ece"] == last["ensemble_eces"]["logits"]
    assert last["disagreement"] == pytest.approx(disagreement(logits).mean) and last["disagreement"] > 0


def test_the_checkpoint_is_a_model_of_transformers(run):
    checkpoint = run / "checkpoint-12"
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    assert type(model).__name__ == "NeuroTrailsWideResNetForImageClassification" and not check_masks(model)
    assert model.config.id2label == {label: str(label) for label in range(10)} and model.config.image_size == 8
    images, _ = open_training_images(ImageConfig())
    expected = next(iter(ImageBatches(images, batch_size=4, training=False)))["pixel_values"]
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    found = processor([images.read(number) for number in range(4)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected)
    assert not (checkpoint / "tokenizer.json").exists()


def test_card_and_report_are_of_images(run):
    card = (run / "checkpoint-12" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "AutoImageProcessor" in card
    last = read_metrics(run / "metrics.jsonl")[-1]
    for text in (card, (run / "report" / "results.md").read_text()):
        assert f"| {last['accuracy']:.4f}" in text.replace("  ", "") and "perplexity" not in text
        assert "ECE of the ensemble (probs)" in text


def test_scaled_and_cropped_images_are_those_of_the_processor(config, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for label in "ab":
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for number, (height, width) in enumerate([(20, 30), (24, 16), (40, 40)]):
            pixels = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8).numpy()
            pillow.fromarray(pixels).resize((width, height)).save(folder / f"{number}.png")
    source = str(tmp_path / "images")
    settings = (
        "--data.train",
        source,
        "--data.validation",
        source,
        "--data.image_size",
        12,
        "--data.center_crop",
        0.75,
    )
    train(config, tmp_path / "run", *settings, "--train.max_steps", 1, "--train.batch_size", 4)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert AutoModelForImageClassification.from_pretrained(checkpoint).config.id2label == {0: "a", 1: "b"}
    images, _ = open_training_images(ImageConfig(train=source, validation=source, image_size=12, center_crop=0.75))
    expected = next(iter(ImageBatches(images, batch_size=6, training=False)))["pixel_values"]
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    opened = [pillow.open(path) for path in images.records]
    found = processor(opened, return_tensors="pt")["pixel_values"]
    # It scales and then cuts to whole pixels, the package does both at once.
    assert (found - expected).abs().mean() < 0.1 < expected.std()


# -------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--data.order_per_head", "true", "--train.micro_batch_size", 16, "--data.num_workers", 2),
        ("--train.save_dtype", "bfloat16", "--data.mixup", 0.2, "--sparsity.initial_masks", "snip"),
        slow(("--train.optimizer", "adamw", "--train.lr_schedule", "cosine")),
    ],
)
def test_a_run_goes_on_bit_for_bit(config, tmp_path, overrides):
    whole = train(config, tmp_path / "run", *overrides)
    shutil.copytree(tmp_path / "run" / "checkpoint-12", tmp_path / "expected")
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    again = train(config, tmp_path / "run", *overrides)
    for event, keys in {"train": ("step", "head_losses", "grad_norm"), "eval": ("step", "head_losses")}.items():
        assert of(again, event, *keys) == of(whole, event, *keys)
    require_same_files(tmp_path / "expected", tmp_path / "run" / "checkpoint-12")


def test_statistics_are_not_rounded_where_weights_are(config, tmp_path):
    train(config, tmp_path / "run", "--train.save_dtype", "bfloat16", "--train.max_steps", 2)
    state = load_file(tmp_path / "run" / "checkpoint-2" / "training_state" / "state-00001-of-00001.safetensors")
    statistics = [value for name, value in state.items() if name.endswith("running_mean")]
    assert len(statistics) > 5 and any((value.bfloat16() != value).any() for value in statistics)
    model = NeuroTrailsForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert any(name.endswith("running_mean") for name in model.state_dict())


def test_each_head_may_see_the_images_in_its_own_order(config, run, tmp_path):
    records = train(config, tmp_path / "run", "--data.order_per_head", "true")
    one, other = ([losses for (losses,) in of(x, "train", "head_losses")] for x in
                  (records, read_metrics(run / "metrics.jsonl")))  # fmt: skip
    assert one[0][0] == pytest.approx(other[0][0])  # head 0 keeps the order that all share
    assert one[0][1] != pytest.approx(other[0][1], rel=1e-4)


def test_a_step_is_the_same_however_it_is_divided_into_passes(vit, tmp_path):
    whole = train(vit, tmp_path / "whole", "--sparsity.update_interval", 0)
    parts = train(vit, tmp_path / "parts", "--sparsity.update_interval", 0, "--train.micro_batch_size", 4)
    for key in ("head_losses", "grad_norm"):
        for (a,), (b,) in zip(of(whole, "train", key), of(parts, "train", key), strict=True):
            assert b == pytest.approx(a, rel=1e-4)


# ----------------------------------------------------------------------------------------------------- processes


def on_two(config: Path, run_dir: Path, *overrides: object, **environment: str) -> list[dict]:
    assert finish(start(2, "--config", config, "--output_dir", run_dir, *overrides, **environment)) == [0, 0]
    return read_metrics(run_dir / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP2])
def test_two_processes_train_as_one(vit, tmp_path, environment):
    one = train(vit, tmp_path / "one", "--train.micro_batch_size", 8)
    two = on_two(vit, tmp_path / "two", "--train.micro_batch_size", 8, "--train.check_interval", 1, **environment)
    for key in ("head_losses", "grad_norm"):
        for (a,), (b,) in zip(of(one, "train", key), of(two, "train", key), strict=True):
            assert b == pytest.approx(a, rel=1e-3)
    (a,), (b,) = of(one, "eval", "head_losses")[-1:], of(two, "eval", "head_losses")[-1:]
    assert b[0] == pytest.approx(a[0], rel=1e-3) and of(two, "eval", "images")[-1] == (360,)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP2])
def test_two_processes_share_the_statistics_of_batch_norms_and_go_on_exactly(config, tmp_path, environment):
    whole = on_two(config, tmp_path / "run", **environment)
    shutil.copytree(tmp_path / "run" / "checkpoint-12", tmp_path / "expected")
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    again = on_two(config, tmp_path / "run", **environment)
    assert of(again, "train", "head_losses") == of(whole, "train", "head_losses")
    assert of(again, "eval", "head_losses") == of(whole, "eval", "head_losses")
    require_same_files(tmp_path / "expected", tmp_path / "run" / "checkpoint-12")


# ------------------------------------------------------------------------------------------ optimizer and settings


def test_the_rate_falls_in_steps():
    settings = TrainConfig(max_steps=8, learning_rate=1.0, lr_schedule="step", warmup_ratio=0.25)
    rates = [learning_rate(step, settings) for step in range(8)]
    assert rates == pytest.approx([0.5, 1.0, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    settings = TrainConfig(max_steps=10, learning_rate=1.0, lr_schedule="step", warmup_ratio=0, lr_milestones=[0.5])
    assert [learning_rate(step, settings) for step in (4, 5, 9)] == [1.0, 0.1, 0.1]


def test_sgd_decays_all_weights_and_adamw_spares_norms():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    options = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "learning_rate": 0.5}
    optimizer = make_optimizer(model, TrainConfig(optimizer="sgd", **options))
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD and len(group["params"]) == 4
    assert (group["momentum"], group["nesterov"], group["weight_decay"], group["lr"]) == (0.8, True, 0.1, 0.5)
    groups = make_optimizer(model, TrainConfig(optimizer="adamw", **options)).param_groups
    assert sorted((group["weight_decay"], len(group["params"])) for group in groups) == [(0.0, 3), (0.1, 1)]


# Name, classes, image size, millions of parameters of one trail and of all heads, heads, blocks in a head, depth.
SHAPES = [
    ("digits", 10, 8, 0.18, 0.51, 4, 6),
    ("wrn-16-1", 10, 32, 0.18, 0.51, 4, 6),
    ("wrn-28-10-cifar10", 10, 32, 36.48, 106.16, 8, 12),
    ("wrn-28-10-cifar100", 100, 32, 36.54, 106.33, 8, 12),
    ("resnet50-imagenet", 1000, 224, 25.56, 74.34, 10, 16),
    ("vit-small", 1000, 224, 22.05, 51.21, 8, 12),
]


def millions(sources: list[str], classes: int, size: int) -> tuple[float, object]:
    config = load_run_config(sources)
    model = config.model_config(id2label={label: str(label) for label in range(classes)}, image_size=size)
    with torch.device("meta"):
        return sum(p.numel() for p in register(model)(model).parameters()) / 1e6, (config, model)


@pytest.mark.parametrize(("name", "classes", "size", "trail", "heads", "in_head", "depth"), SHAPES)
def test_sizes_and_the_baselines_over_them(name, classes, size, trail, heads, in_head, depth):
    found, (config, model) = millions([name], classes, size)
    assert found == pytest.approx(heads, abs=0.006)
    assert (model.num_ensemble_heads, model.blocks_in_head, model.trail_depth) == (3, in_head, depth)
    assert config.sparsity.density == (0.2 if "28" in name else 0.3)
    found, (config, model) = millions([name, "dense"], classes, size)
    assert found == pytest.approx(trail, abs=0.005) and config.sparsity.density == 1
    assert millions([name, "full_ensemble"], classes, size)[0] == pytest.approx(3 * found)
    assert millions([name, "treenet"], classes, size)[0] == pytest.approx(heads, abs=0.005)
    assert (ROOT / "recipes" / "configs" / f"{name}.yaml").is_file()


def test_the_settings_of_the_reference():
    keys = ("optimizer", "learning_rate", "momentum", "nesterov", "weight_decay", "batch_size", "lr_schedule")
    wrn, resnet = (load_run_config([name]) for name in ("wrn-28-10-cifar100", "resnet50-imagenet"))
    assert [getattr(wrn.train, key) for key in keys] == ["sgd", 0.1, 0.9, True, 5e-4, 128, "step"]
    assert wrn.train.lr_milestones == [0.25, 0.5, 0.75] and wrn.train.max_steps == 450 * 50_000 // 128
    assert (wrn.sparsity.drop, wrn.sparsity.grow, wrn.sparsity.update_interval) == ("magnitude", "gradient", 1000)
    assert (wrn.sparsity.drop_fraction, wrn.sparsity.drop_schedule) == (0.5, "cosine")
    assert [getattr(resnet.train, key) for key in keys[:6]] == ["sgd", 0.256, 0.875, False, 3.05e-5, 256]


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--data.train", "no/such"), "no/such: accepted is digits:train, digits:validation, an existing folder"),
        (("--data.validation", "digits:test"), "digits:test: accepted is digits:train or digits:validation"),
        (("--data.validation_share", 0.9999), "digits:train: validation_share=0.9999 is 1437 of 1437 images"),
        (("--data.crop_padding", 8), "crop_padding=8: accepted is less than a side"),
        (("--data.normalize", "cifar"), "data.normalize='cifar': accepted is digits, cifar10"),
        (("--data.tokenizer", "sample"), "unknown key --data.tokenizer: accepted is train, validation"),
        (("--model.num_labels", 3), "unknown key --model.num_labels"),
        (("--model.image_size", 3), "unknown key --model.image_size"),
        (("--model.blocks_in_head", 4), "blocks_in_head=4: accepted is 0 to num_hidden_layers=3"),
        (("--model.num_hidden_layers", 4), "num_hidden_layers=4: accepted is a multiple of stages=3"),
        (("--train.batch_size", 33, "--train.micro_batch_size", 2), "batch_size=33"),
        (("--sparsity.exclude", "['nothing.*']"), "nothing.*"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(config, tmp_path, overrides, message):
    with pytest.raises((ValueError, OSError)) as caught:
        train(config, tmp_path / "run", *overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_patches_must_fit_the_images(vit, tmp_path):
    with pytest.raises(ValueError, match=r"^model\.patch_size=16: accepted is a divisor of the images' sides \(8, 8\)"):
        train(vit, tmp_path / "run", "--model.patch_size", 16)
    with pytest.raises(ValueError, match=r"^patch_size=0: accepted is a whole number from 1"):
        train(vit, tmp_path / "run", "--model.patch_size", 0)
    assert not (tmp_path / "run").exists()


def test_a_family_that_cannot_have_heads_is_one_line(tmp_path):
    sizes = "depths: [2, 2], num_heads: [2, 2], embed_dim: 8, window_size: 2, patch_size: 2"
    (tmp_path / "swin.yaml").write_text(f"model: {{base: swin, {sizes}}}\ndata: {{train: digits}}\n")
    (tmp_path / "siglip.yaml").write_text("model: {base: siglip}\n")
    for name, message in (("swin", "SwinForImageClassification cannot have heads"), ("siglip", "SiglipConfig")):
        with pytest.raises(SystemExit, match=f"^error: {message}.* accepted are"):
            program.run(lambda name=name: train(tmp_path / f"{name}.yaml", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_images(config, run):
    with pytest.raises(ValueError, match=r"^data\.normalize='cifar10' \(was 'digits'\): .*-12.* cannot continue"):
        train(config, run, "--data.normalize", "cifar10")
    with pytest.raises(ValueError, match=r"^data\.train='digits:validation' .*cannot continue so \(.*; set it as it"):
        train(config, run, "--data.train", "digits:validation")


def test_programs_of_text_and_of_images(config, tmp_path):
    with pytest.raises(ValueError, match=r"^model\.base='llama': accepted by nt-hf train-images are image classifiers"):
        call(train_images.main, "--config", "60m", "--output_dir", tmp_path / "run")
    with pytest.raises(ValueError, match=r"^model\.base='wide_resnet': accepted are decoders; image class"):
        call(plan.main, "--config", config, "--gpus", 1, "--gpu", "h100")
