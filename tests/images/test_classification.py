"""Figures of image classifiers against references by brute force, and the program that measures them."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_families import tiny_model
from PIL import Image as pillow
from transformers import LlamaConfig, PreTrainedConfig, ResNetConfig, ResNetForImageClassification

from nt_hf.cli import images as program
from nt_hf.data.image_config import ImageConfig
from nt_hf.data.image_sets import open_training_images
from nt_hf.evaluation import classification as c
from nt_hf.evaluation import comparison
from nt_hf.evaluation.comparison import paired_bootstrap
from nt_hf.evaluation.corruptions import Normalisation
from nt_hf.models.configuration_neurotrails import ENSEMBLE_MODES
from nt_hf.models.ensemble import combine_logits

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def heads(seed: int = 0, count: int = 3, images: int = 400, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of heads that know something of the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    noise = torch.randn(count, images, classes, generator=generator)
    return 3 * noise + 3 * torch.nn.functional.one_hot(labels, classes), labels


# ---------------------------------------------------------------------------------------------------- the figures


def test_scores_are_those_of_counting_image_by_image():
    logits, labels = heads()
    scorers = dict(c.by_scorer(logits))
    assert list(scorers) == ["ensemble, logits", "ensemble, probs", "head 0", "head 1", "head 2"]
    assert torch.allclose(scorers["ensemble, probs"].exp(), torch.softmax(logits.double(), -1).mean(0))
    for mode in ENSEMBLE_MODES:
        combined = combine_logits(logits, mode).log_softmax(-1).double()
        assert torch.allclose(scorers[f"ensemble, {mode}"], combined, atol=1e-4)
    for name, log_probs in scorers.items():
        right, nll, brier, bins = 0, 0.0, 0.0, {}
        for row, label in zip(log_probs.exp().tolist(), labels.tolist()):
            guess = row.index(max(row))
            right += guess == label
            nll -= math.log(row[label])
            brier += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
            bins.setdefault(min(14, math.ceil(max(row) * 15) - 1), []).append((max(row), guess == label))
        gaps = (abs(sum(x for x, _ in bin) - sum(y for _, y in bin)) for bin in bins.values())
        expected = [right / 400, nll / 400, brier / 400, sum(gaps) / 400]
        found = c.score(log_probs, labels)
        assert [found.accuracy, found.nll, found.brier, found.ece] == pytest.approx(expected, abs=1e-7), name


def test_a_calibrated_predictor_has_a_small_error_and_an_overconfident_one_a_large_one():
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(20_000, 4, generator=generator).double().mul(2).log_softmax(-1)
    labels = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
    assert c.score(log_probs, labels).ece < 0.012
    assert c.score((3 * log_probs).log_softmax(-1), labels).ece > 0.1
    assert c.fit_temperature(log_probs, labels) == pytest.approx(1, abs=0.03)
    assert c.fit_temperature(3 * log_probs, labels) == pytest.approx(3, abs=0.09)


@pytest.mark.parametrize("seed", range(5))
def test_no_temperature_has_a_lower_loss_on_the_images_it_was_fitted_on(seed):
    logits, labels = heads(seed, images=60)
    for log_probs in dict(c.by_scorer(logits)).values():
        figures = c.figures(log_probs, labels, c.fit_temperature(log_probs, labels))
        grid = torch.linspace(-3, 3, 61).exp().tolist()
        lowest = min(c.figures(log_probs, labels, t)["scaled_nll"] for t in [*grid, 1.0])
        assert figures["scaled_nll"] <= lowest + 1e-12
        assert figures["scaled_nll"] <= figures["nll"] + 1e-12


def test_a_temperature_stays_within_its_range_where_there_is_no_best_one():
    certain = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double().log_softmax(-1)
    assert c.fit_temperature(certain, torch.tensor([0, 1])) == pytest.approx(math.exp(-5))
    assert c.fit_temperature(certain, torch.tensor([1, 0])) == pytest.approx(math.exp(5))


def test_disagreement_and_gain_are_those_of_counting():
    logits, labels = heads()
    guesses = logits.argmax(-1).tolist()
    shares = {(a, b): sum(map(int.__ne__, guesses[a], guesses[b])) / 400 for a in range(3) for b in range(3)}
    pairs = c.disagreement(logits)
    assert pairs.matrix == [[pytest.approx(shares[a, b]) for b in range(3)] for a in range(3)]
    assert pairs.mean == pytest.approx((shares[0, 1] + shares[0, 2] + shares[1, 2]) / 3)
    assert c.disagreement(logits[:1]).mean is None
    scores = {name: c.figures(x, labels) for name, x in c.by_scorer(logits)}
    gain = c.gains(scores)["ensemble, probs"]
    for key in ("accuracy", "nll", "brier"):
        mean = sum(scores[f"head {head}"][key] for head in range(3)) / 3
        assert gain[key] == pytest.approx(scores["ensemble, probs"][key] - mean)
    assert gain["nll"] < 0 < gain["accuracy"]  # the mean of probabilities never has the higher loss (Jensen)
    one = dict(c.by_scorer(logits[:1]))
    assert list(one) == ["head 0"] and c.gains({name: c.figures(x, labels) for name, x in one.items()}) == {}


def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_halves():
    generator = torch.Generator().manual_seed(0)
    for size in (3, 1000):
        negatives, positives = (torch.randint(size, (n,), generator=generator).double() for n in (37, 23))
        pairs = [(p > n) + 0.5 * (p == n) for n in negatives.tolist() for p in positives.tolist()]
        assert c.auroc(negatives, positives) == pytest.approx(sum(pairs) / len(pairs))
    assert c.auroc(torch.arange(3.0), torch.arange(3.0, 9)) == 1
    assert c.auroc(torch.ones(4), torch.ones(9)) == 0.5


def test_unknown_images_are_told_by_every_measure():
    known, _ = heads(1)
    unknown = 0.5 * torch.randn(3, 300, 5, generator=torch.Generator().manual_seed(2))
    areas = c.out_of_distribution(5 * known.mean(0, keepdim=True) + known, unknown, "ensemble, logits")
    assert list(areas) == ["mutual_information", "predictive_entropy", "maximum_probability"]
    assert areas["predictive_entropy"] > 0.8 and areas["maximum_probability"] > 0.8
    assert c.out_of_distribution(unknown, unknown, "ensemble, logits") == dict.fromkeys(areas, 0.5)
    assert "mutual_information" not in c.out_of_distribution(known[:1], unknown[:1], "head 0")


def test_bad_logits_and_labels_are_one_line():
    logits, labels = heads()
    logits[1, 7, 2] = math.nan
    with pytest.raises(FloatingPointError, match=r"^logits of head 1 are not finite, for example of image 7: "):
        c.check_predictions(logits, labels)
    labels[3] = 5
    with pytest.raises(ValueError, match=r"^labels=5: accepted is 0 to 4, the classes of the model$"):
        c.check_predictions(logits, labels)


def test_a_bootstrap_of_many_different_values_takes_rounds_with_equal_draws(monkeypatch):
    first, second = (np.random.default_rng(seed).random(40) for seed in (1, 2))
    once = paired_bootstrap([(first, second)])
    monkeypatch.setattr(comparison, "TABLE", 123_456)
    rounds = paired_bootstrap([(first, second)])
    assert (rounds.low, rounds.high, rounds.p) == pytest.approx((once.low, once.high, once.p), rel=1e-12)


# ---------------------------------------------------------------------------------------------------- the program


class Heads(torch.nn.Module):
    """A model of three linear heads on the pixels, with what the program asks of a multi-head classifier."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(0.1 * torch.randn(3, 5, 3 * 8 * 8, generator=generator))
        names = {label: f"LABEL_{label}" for label in range(5)}
        self.config = SimpleNamespace(num_ensemble_heads=3, ensemble_mode="probs", num_labels=5, id2label=names)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values, output_head_logits):
        assert output_head_logits
        return SimpleNamespace(head_logits=torch.einsum("hci,bi->hbc", self.weight, pixel_values.flatten(1)))


def source(seed: int, count: int = 40, batches: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches of noise, labelled mostly as the model of seed 0 sees them."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    values = Normalisation(MEAN, STD).pixel_values(pixels)
    with torch.no_grad():
        labels = Heads()(values, output_head_logits=True).head_logits.mean(0).argmax(-1)
    labels[: count // 4] = torch.randint(5, (count // 4,), generator=generator)
    parts = zip(values.split(count // batches), labels.split(count // batches))
    return [{"pixel_values": x, "labels": y} for x, y in parts]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the program on a model of three heads; ``sources`` are numbers of seeds."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    monkeypatch.setattr(program, "open_images", lambda name, *_: source(int(name)))

    def run(*arguments: str, seed: int = 0, output: str = "out.json") -> tuple[dict, str]:
        monkeypatch.setattr(program, "load_image_model", lambda path: Heads(seed))
        program.main(["--model", str(checkpoint), "--data", "1", "--output", str(tmp_path / output), *arguments])
        return json.loads((tmp_path / output).read_text()), capsys.readouterr().out

    run.folder = tmp_path
    return run


def test_the_program_writes_figures_tables_and_plots(run):
    for name in ("fog", "labels"):
        array = np.zeros(50, np.uint8) if name == "labels" else np.full((50, 8, 8, 3), 90, np.uint8)
        np.save(run.folder / f"{name}.npy", array)
    result, text = run(
        "--calibration", "2", "--ood", "3", "--corruptions", "contrast,fog", "--severities", "5,1",
        "--cifar_c", str(run.folder),
    )  # fmt: skip
    batches = source(1)
    logits = torch.cat([Heads()(b["pixel_values"], True).head_logits for b in batches], 1).detach()
    labels = torch.cat([b["labels"] for b in batches])
    held_out = source(2)
    other = torch.cat([Heads()(b["pixel_values"], True).head_logits for b in held_out], 1).detach()
    truth = torch.cat([b["labels"] for b in held_out])
    for (name, log_probs), (_, others) in zip(c.by_scorer(logits), c.by_scorer(other)):
        temperature = c.fit_temperature(others, truth)
        assert result["scores"][name] == pytest.approx(c.figures(log_probs, labels, temperature))
        correct = result["per_image"][name]["correct"]
        assert correct.count("1") / len(correct) == result["scores"][name]["accuracy"]
    assert (result["images"], result["heads"], result["main_scorer"]) == (40, 3, "ensemble, probs")
    assert list(result["corruptions"]) == ["contrast", "fog"] and list(result["cifar_c"]) == ["fog"]
    assert list(result["corruptions"]["fog"]) == ["1", "5"]
    cells = [by["ensemble, probs"]["accuracy"] for s in result["corruptions"].values() for by in s.values()]
    assert result["corruptions_means"]["ensemble, probs"]["accuracy"] == pytest.approx(sum(cells) / 4)
    same = result["cifar_c"]["fog"]
    assert same["1"] == same["5"] and same["1"]["head 0"]["accuracy"] in (0, 1)  # ten equal images
    assert result["ood"]["images"] == 40 and result["mask_overlap"] is None
    for part in (
        "40 images, 5 classes, 3 heads",
        "ensemble, probs",
        "ECE at T",
        "AUROC by mutual information",
        "mean of",
    ):
        assert part in text
    assert sorted(path.name for path in run.folder.glob("*.png")) == ["out_calibration.png", "out_severity.png"]


def test_the_first_images_alone_are_corrupted(run, monkeypatch):
    monkeypatch.setattr(program, "corrupted", lambda data, *_: data)
    result, _ = run("--corruptions", "contrast", "--severities", "1", "--corrupted_images", "25")
    logits = torch.cat([Heads()(b["pixel_values"], True).head_logits for b in source(1)], 1).detach()[:, :25]
    log_probs = dict(c.by_scorer(logits))["ensemble, probs"]
    expected = c.figures(log_probs, torch.cat([b["labels"] for b in source(1)])[:25])
    assert result["corruptions"]["contrast"]["1"]["ensemble, probs"] == pytest.approx(expected)
    assert result["images"] == 40


def test_temperatures_are_fitted_on_what_training_held_out():
    arguments = ["--model", "m", "--output", "o", "--split_seed", "3", "--batch_size", "1000"]
    [batch] = program.open_images("digits:train", Normalisation(MEAN, STD), program.parse(arguments), 0.1)
    _, held_out = open_training_images(ImageConfig(validation_share=0.1, split_seed=3))
    assert batch["labels"].tolist() == held_out.labels[held_out.chosen].tolist()


def test_two_results_on_the_same_images_are_compared(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(program, "open_images", lambda name, *_: source(int(name), batches=5))
        run(seed=1, output="other.json")
    result, text = run("--against", str(run.folder / "other.json"))
    gaps = result["against"]["differences"]
    other = json.loads((run.folder / "other.json").read_text())
    for name, key in (("accuracy", "accuracy"), ("NLL", "nll")):
        expected = result["scores"]["ensemble, probs"][key] - other["scores"]["ensemble, probs"][key]
        assert gaps[name]["value"] == pytest.approx(expected, abs=1e-6)
    assert gaps["accuracy"]["low"] > 0 > gaps["NLL"]["high"] and "less " in text
    with pytest.raises(ValueError, match=r"is of other images; accepted is a result on those of --data$"):
        run("--data", "4", "--against", str(run.folder / "other.json"))


def test_images_of_another_size_are_one_line(run, monkeypatch):
    np.save(run.folder / "fog.npy", np.zeros((5, 9, 9, 3), np.uint8))
    np.save(run.folder / "labels.npy", np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match=r"fog\.npy has images \[3, 9, 9\]; accepted is \[3, 8, 8\], as of --data"):
        run("--cifar_c", str(run.folder))
    large = [{"pixel_values": torch.zeros(2, 3, 9, 9), "labels": torch.zeros(2, dtype=torch.long)}]
    monkeypatch.setattr(program, "open_images", lambda name, *_: large if name == "large" else source(int(name)))
    with pytest.raises(ValueError, match=r"^--ood large has images \[3, 9, 9\]; accepted is \[3, 8, 8\], as of --data"):
        run("--ood", "large")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corruptions", "fogg"], "^--corruptions='fogg': accepted is .*did you mean fog"),
        (["--severities", "0,1"], "^--severities 0,1: accepted are different numbers of 1 to 5"),
        (["--calibration", "1"], "^--calibration 1: accepted are images other than those of --data$"),
        (["--held_out", "0.1"], "^--held_out=0.1: accepted is 0 without --calibration$"),
        (["--held_out", "1", "--calibration", "2"], r"^--held_out=1.0: accepted is a share of --calibration"),
        (["--corrupted_images", "0"], "^--corrupted_images=0: accepted is "),
        (["--cifar_c", "/nowhere"], "^/nowhere has no arrays; accepted is "),
        (["--against", "/nowhere.json"], "^--against /nowhere.json: .*; accepted is a file of nt-hf evaluate images$"),
    ],
)
def test_bad_arguments_are_one_line(run, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        run(*arguments)
    assert "\n" not in str(error.value) and not (run.folder / "out.json").exists()


def test_a_checkpoint_without_normalisation_or_with_another_one_is_one_line(run):
    file = run.folder / "model" / "preprocessor_config.json"
    for text in ("{}", '{"image_mean": [1, 2], "image_std": [1, 1]}', "no"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"accepted is JSON with image_mean and image_std of 3 numbers$"):
            run()
    file.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.9] * 3}))
    with pytest.raises(ValueError, match="without mean and std: accepted is 0 to 1"):
        run()


def test_a_stock_classifier_counts_as_one_head(run, monkeypatch):
    monkeypatch.undo()  # the real loader
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    stock = ResNetForImageClassification(config).eval()
    stock.save_pretrained(run.folder / "model")
    monkeypatch.setattr(program, "open_images", lambda name, *_: source(int(name)))
    output = run.folder / "stock.json"
    program.main(["--model", str(run.folder / "model"), "--data", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    batches = source(1)
    with torch.no_grad():
        logits = torch.cat([stock(b["pixel_values"]).logits for b in batches])
    loss = torch.nn.functional.cross_entropy(logits, torch.cat([b["labels"] for b in batches]))
    assert list(result["scores"]) == ["head 0"] == [result["main_scorer"]]
    assert result["scores"]["head 0"]["nll"] == pytest.approx(float(loss), rel=1e-5)
    assert result["gains"] == {} and result["disagreement"]["mean"] is None
    stock.classifier[1].weight.data[0, 0] = math.inf
    stock.save_pretrained(run.folder / "model")
    with pytest.raises(ValueError, match=r"has 1 weights that are not finite everywhere, for example classifier\.1"):
        c.load_image_model(run.folder / "model")
    with pytest.raises(ValueError, match=r"has no config\.json; accepted is a checkpoint directory"):
        c.load_image_model(run.folder)
    LlamaConfig().save_pretrained(run.folder / "text")
    with pytest.raises(
        ValueError, match=r"model_type='llama'; accepted is .* \(LlamaForCausalLM is no image classifier"
    ):
        c.load_image_model(run.folder / "text")


@pytest.mark.slow
def test_a_family_that_nobody_has_asked_for_yet_is_loaded(tmp_path):
    code = """
import sys, torch
from nt_hf.evaluation.classification import load_image_model
print(type(load_image_model(sys.argv[1])).__name__)
"""
    tiny_model("deit").save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "NeuroTrailsDeiTForImageClassification", done.stderr


@pytest.mark.parametrize("held_out", [0.0, 0.5])
def test_labels_go_by_the_names_of_the_checkpoints_classes(tmp_path, held_out):
    for name, count in (("dog", 3), ("cat", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pillow.new("RGB", (4, 4)).save(tmp_path / name / f"{number}.png")
    args = program.parse(["--model", "somewhere", "--output", "x.json"])

    def labels(source, names):
        config = PreTrainedConfig(id2label=dict(enumerate(names)), num_labels=len(names))
        batches = program.open_images(
            source, Normalisation(MEAN, STD), args, held_out, program.class_names(config)
        )  # fmt: skip
        return sorted(label for batch in batches for label in batch["labels"].tolist())

    folder = str(tmp_path)
    cat, dog = (labels(folder, names).count(1) for names in (["dog", "cat", "eel"], ["cat", "dog", "eel"]))
    assert cat + dog == len(labels(folder, ["cat", "dog"])) == (2 if held_out else 4) and dog > cat
    made_up = ["LABEL_0", "LABEL_1"]
    assert labels(folder, made_up) == labels(folder, ["cat", "dog"]), "no names to go by"
    with pytest.raises(ValueError, match=r"class 'dog' is none of those of --model somewhere; accepted are cat, fox$"):
        labels(folder, ["cat", "fox"])
    with pytest.raises(ValueError, match=r"class '0' is none of those of .*; accepted are 0x, 1x, .*, 9x and 2 more$"):
        labels("digits", [f"{number}x" for number in range(12)])
