"""Every example runs, in this process and for a few steps."""

from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import script, trained
from transformers import AutoModelForCausalLM

from nt_hf import NeuroTrailsLlamaForCausalLM, check_masks
from nt_hf.sparsity.criteria import DROP

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small trained model with a tokenizer of bytes."""
    directory = tmp_path_factory.mktemp("checkpoint")
    trained("neurotrails").save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_every_example_is_short_and_tested():
    tests = Path(__file__).read_text()
    for name in EXAMPLES:
        assert f'"examples/{name}"' in tests, name
        assert len((ROOT / "examples" / name).read_text().splitlines()) <= 60, name


def test_quickstart(tmp_path, capsys):
    script("examples/quickstart.py").main(["--steps", "10", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "step 10: loss" in printed and "The best way to" in printed
    assert not check_masks(NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path))


def test_sparsify_resnet(capsys):
    assert script("examples/sparsify_resnet.py").main(["--steps", "60"]) > 0.9
    assert "weights outside a mask that are not zero: 0" in capsys.readouterr().out


def test_rigl_with_trainer(tmp_path, capsys):
    trainer = script("examples/rigl_with_trainer.py").main(["--steps", "12", "--output", str(tmp_path)])
    assert not check_masks(trainer.model)
    assert any(record.get("sparsity/grown", 0) > 0 for record in trainer.state.log_history)
    assert "0.5000" in capsys.readouterr().out


def test_from_stock(tmp_path, capsys):
    model = script("examples/from_stock.py").main(["--steps", "10", "--output", str(tmp_path)])
    assert "step 10: losses of the heads" in capsys.readouterr().out
    first, second = (model.extract_trail(head).state_dict() for head in (0, 1))
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    backbone = "model.layers.0.mlp.up_proj.weight"
    assert backbone not in differing and "model.layers.2.mlp.up_proj.weight" in differing
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "trail-0")
    assert stock.config.model_type == "qwen3"
    assert torch.equal(stock.state_dict()[backbone], first[backbone])


def test_from_stock_starts_from_a_directory(checkpoint, tmp_path, capsys):
    trained("neurotrails").extract_trail(0).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    arguments = ["--model", str(tmp_path / "llama"), "--steps", "10", "--output", str(tmp_path / "out")]
    script("examples/from_stock.py").main(arguments)
    assert "step 10" in capsys.readouterr().out


def test_image_classifier(tmp_path, capsys):
    model = script("examples/image_classifier.py").main(["--steps", "50", "--output", str(tmp_path)])
    assert "step 50: losses of the heads" in capsys.readouterr().out
    assert not check_masks(model) and (tmp_path / "preprocessor_config.json").is_file()


def test_custom_criterion(monkeypatch, capsys):
    monkeypatch.delitem(DROP, "noisy_magnitude", raising=False)
    assert script("examples/custom_criterion.py").main() < 0.5
    assert DROP.pop("noisy_magnitude") and "times as many weights" in capsys.readouterr().out


def test_generate(checkpoint, monkeypatch, capsys):
    arguments = ["generate.py", "--model", str(checkpoint), "--prompt", "The best way", "--max_new_tokens", "4"]
    monkeypatch.setattr("sys.argv", arguments)
    script("examples/generate.py").main()
    assert capsys.readouterr().out.startswith("> The best way")


def test_uncertainty(checkpoint, capsys):
    arguments = ["--model", str(checkpoint), "--prompt", "The best way to", "--max_new_tokens", "6"]
    script("examples/uncertainty.py").main(arguments)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["token", "entropy", "mutual", "information", "disagreement"] and len(rows) == 6
    for row in rows:
        entropy, information, disagreement = map(float, row.split()[-3:])
        assert 0 <= information < entropy and disagreement in (0, 0.67, 1)
