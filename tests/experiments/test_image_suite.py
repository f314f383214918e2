"""Suites over images: that runs are scored as they say, and what the reports say."""

import json
import statistics
from pathlib import Path

import pytest
import yaml
from suite_runs import edited, run

from experiments.finished import finished
from experiments.image_tables import effects_table
from experiments.suite import budget, load_suite, main_runs, run_config, tuned
from experiments.suite_report import report_text
from nt_hf.models.auto import NeuroTrailsForImageClassification
from nt_hf.models.masks import get_mask, masked_modules

TINY = """
config:
  model: {base: wide_resnet, num_hidden_layers: 3, width: 1, num_ensemble_heads: 2, blocks_in_head: 1,
          embedding_size: 8}
  data: {train: "digits:train", validation_share: 0.2, image_size: 8}
  sparsity: {density: 0.5, update_interval: 2}
  train: {max_steps: 6, batch_size: 8, optimizer: sgd, log_steps: 2, eval_steps: 3, save_steps: 3, keep: 1}
tuning: {learning_rates: [0.01, 0.1], share: 0.5}
seeds: [0, 1]
baseline: single
rival: trails
evaluation: {images: "digits:validation", classes: 10, corruptions: [contrast], severities: [2], corrupted_images: 100}
arms:
  single: {label: single, config: {model: {num_ensemble_heads: 1}, sparsity: {density: 1.0}}}
  trails: {label: trails, change_of: single}
  static: {label: static, learning_rate_of: trails, config: {sparsity: {update_interval: 0}}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with a suite over the digits, and all its runs made."""
    directory = tmp_path_factory.mktemp("suite")
    (directory / "tiny.yaml").write_text(TINY)
    assert set(run(directory, plots=True)) == {"recipes/train_images.py", "experiments/run.py"}
    return directory


def test_budgets_are_those_of_the_trained_models(world):
    suite = load_suite(world / "tiny.yaml")
    for each in main_runs(suite, tuned(world / "results", suite)):
        model = NeuroTrailsForImageClassification.from_pretrained(world / "runs" / each.name / "checkpoint-6")
        cost = budget(suite, each)
        zeros = sum(int((~get_mask(module)).sum()) for module in masked_modules(model).values())
        assert cost.stored == sum(p.numel() for p in model.parameters())
        assert cost.active == cost.stored - zeros and cost.units == 6 * 8
        assert (cost.sparse_flops < cost.flops) == bool(zeros)


def test_results_are_those_of_the_evaluation_program(world):
    suite, results = load_suite(world / "tiny.yaml"), world / "results"
    arms = finished(suite, results)
    assert {name: len(arm.by_seed) for name, arm in arms.items()} == {"single": 2, "trails": 2, "static": 2}
    for name, arm in arms.items():
        result = arm.by_seed[1]
        full = json.loads((world / "runs" / "runs" / name / "seed-1" / "images.json").read_text())
        assert result["scores"] == full["scores"] and "per_image" not in result
        assert full["calibration"] == "digits:train" and full["held_out"] == 0.2
        assert list(result["corruptions"]["contrast"]) == ["2"] and full["corrupted_images"] == 100
        assert "scaled_ece" in result["scores"]["head 0"]
    assert {path.name for path in results.glob("*.png")} == {
        "curves.png",
        "quality.png",
        "diversity.png",
        "goldilocks.png",
    }


def test_a_change_is_compared_seed_by_seed_with_the_arm_it_changes(world):
    suite, results = load_suite(world / "tiny.yaml"), world / "results"
    arms = finished(suite, results)
    read = lambda name: [100 * r["scores"][r["main_scorer"]]["accuracy"] for r in arms[name].by_seed.values()]  # noqa: E731
    gaps = [a - b for a, b in zip(read("trails"), read("single"))]
    row = next(line for line in effects_table(arms).splitlines() if line.startswith("| trails"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1:4] == ["trails", "single", "2"]
    assert cells[4].lstrip("+") == f"{statistics.fmean(gaps):.2f} ± {statistics.stdev(gaps):.2f}"
    text = report_text(suite, results)
    for title in (
        "Quality",
        "Budgets",
        "One change",
        "Calibration",
        "Corrupted images",
        "Learning rates: validation acc",
    ):
        assert f"## {title}" in text
    assert "Other images" not in text and "images (M)" in text


def test_suites_over_images_hold_out_what_they_are_tuned_on(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    config = yaml.safe_load(TINY)["config"]
    for key, message in (("validation_share", "accepted is a share above 0"), ("image_size", "accepted is the side")):
        data = {k: v for k, v in config["data"].items() if k != key}
        with pytest.raises(ValueError, match=rf"tiny.yaml: config.data.{key}=.*: {message}"):
            load_suite(edited(path, config=config | {"data": data}))
    assert run_config(load_suite(edited(path, config=config)), main_runs(load_suite(path), {"single": 0.1})[0])


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"images": "digits:validation", "classes": 9}, "^evaluation.classes=9: accepted is 10, those of data.train$"),
        ({"images": "/nowhere", "classes": 10}, "^evaluation.images: /nowhere: accepted is "),
        ({"images": "digits:test", "classes": 10, "ood": "/nowhere"}, "^evaluation.images: digits:test: accepted is "),
        ({"texts": {}}, "tiny.yaml: evaluation.texts: accepted is "),
    ],
)
def test_what_runs_are_scored_on_is_looked_for_before_they_are_trained(tmp_path, evaluation, message):
    (tmp_path / "tiny.yaml").write_text(TINY)
    edited(tmp_path / "tiny.yaml", evaluation=evaluation)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--only", "runs/single/seed-0")
    assert not (tmp_path / "runs").exists()
