"""What ``train.precision: auto`` becomes, and that a continued run keeps it."""

import pytest
import torch
import yaml
from recipe_runs import of, train

from nt_hf.config import TrainConfig
from nt_hf.training import launch

AUTO = ("--train.precision", "auto")


@pytest.fixture(params=["fp32", "bf16"])
def fastest(request, monkeypatch):
    set_fastest(monkeypatch, request.param)
    return request.param


def set_fastest(monkeypatch, precision):
    for module in ("launch", "run"):
        monkeypatch.setattr(f"nt_hf.training.{module}.fastest_precision", lambda: precision)


def recorded(run_dir):
    return yaml.safe_load((run_dir / "run.yaml").read_text())["train"]["precision"]


@pytest.mark.parametrize("instructions", [None, "avx512_bf16", "amx_tile"])
def test_auto_is_bf16_on_a_cpu_that_has_its_instructions(monkeypatch, instructions):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == instructions)
    assert launch.settle_precision(TrainConfig(), None).precision == ("bf16" if instructions else "fp32")
    for asked in ("fp32", "bf16"):
        assert launch.settle_precision(TrainConfig(precision=asked), None).precision == asked


def test_auto_keeps_what_a_run_began_with(monkeypatch, fastest):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for began in ("fp32", "bf16"):
        assert launch.settle_precision(TrainConfig(), began).precision == began
    assert launch.settle_precision(TrainConfig(), "auto").precision == "fp32"  # as auto was on every CPU


def test_a_continued_run_stays_bit_for_bit_the_same_on_another_machine(config, tmp_path, monkeypatch, caplog):
    set_fastest(monkeypatch, "bf16")
    straight = of(train(config, tmp_path / "straight", *AUTO), "train", "head_losses")
    assert straight == of(
        train(config, tmp_path / "bf16", "--train.precision", "bf16"), "train", "head_losses"
    ) and straight != of(train(config, tmp_path / "fp32", "--train.precision", "fp32"), "train", "head_losses")
    assert recorded(tmp_path / "straight") == "bf16" and "train.precision" not in caplog.text

    (tmp_path / "straight" / "checkpoint-6").rename(tmp_path / "checkpoint-6")
    set_fastest(monkeypatch, "fp32")
    resumed = train(config, tmp_path / "resumed", *AUTO, "--resume", tmp_path / "checkpoint-6")
    assert of(resumed, "train", "head_losses") == straight[6:]
    assert recorded(tmp_path / "resumed") == "bf16"
    assert "train.precision=auto: the run goes on in bf16, as it began; a new one would take fp32 here" in caplog.text


def test_a_run_from_before_the_record_goes_on_in_fp32(config, tmp_path, monkeypatch):
    set_fastest(monkeypatch, "bf16")
    train(config, tmp_path / "run", "--train.precision", "fp32", "--train.keep", 3)
    straight = train(config, tmp_path / "run")  # nothing left to do
    for path in (tmp_path / "run" / "run.yaml", tmp_path / "run" / "checkpoint-6" / "run.yaml"):
        path.write_text(path.read_text().replace("precision: fp32", "precision: auto"))
    # Only its run.yaml differs from that of an older release, and its manifest knows it.
    monkeypatch.setattr("nt_hf.training.manifest.find_damage", lambda checkpoint: None)
    (tmp_path / "run" / "checkpoint-12").rename(tmp_path / "checkpoint-12")
    again = train(config, tmp_path / "run", *AUTO)
    assert of(again, "train", "head_losses") == of(straight, "train", "head_losses")
    assert recorded(tmp_path / "run") == "fp32"
