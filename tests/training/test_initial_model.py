"""Runs that start from weights: what is taken, what is new, heads that differ, first masks of a trained model."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from recipe_runs import train, write_config
from transformers import LlamaConfig, LlamaForCausalLM

from nt_hf.config import load_run_config
from nt_hf.models.auto import NeuroTrailsForCausalLM, NeuroTrailsForImageClassification
from nt_hf.models.masks import masked_modules
from nt_hf.models.wide_resnet import WideResNetConfig, WideResNetForImageClassification
from nt_hf.sparsity.measures import head_overlap, masks_by_head
from nt_hf.training.initial_model import add_noise

MODEL = {"num_ensemble_heads": 2, "blocks_in_head": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A directory with a stock Llama, a tokenizer, text, and a configuration that starts from the Llama."""
    directory = tmp_path_factory.mktemp("upcycling")
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(directory / "stock")
    path = write_config(directory)
    content = yaml.safe_load(path.read_text())
    content["model"] = {"init_from": str(directory / "stock"), **MODEL}
    content["sparsity"] = {}
    content["train"] |= {"max_steps": 1, "eval_steps": 1, "save_steps": 1, "learning_rate": 1e-9}
    path.write_text(yaml.safe_dump(content))
    return directory


def run(directory: Path, tmp_path: Path, *overrides: object):
    train(directory / "tiny.yaml", tmp_path / "run", *overrides)
    return NeuroTrailsForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")


def test_a_run_starts_from_the_weights_of_a_stock_model(directory, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "nt_hf"):
        model = run(directory, tmp_path, "--train.head_noise", 0.01)
    taken = "the weights of a LlamaForCausalLM are taken for 2 heads of 1 block on a backbone of 1"
    assert f"{taken}, each head is a copy; nothing is new" in caplog.text
    stock, trail = LlamaForCausalLM.from_pretrained(directory / "stock"), model.extract_trail(0)
    for (name, weight), other in zip(trail.named_parameters(), stock.parameters()):
        torch.testing.assert_close(weight, other, atol=1e-6, rtol=1e-5, msg=name)  # one step at a rate of 1e-9
    assert model.config.eos_token_id == 2 or model.config.eos_token_id is not None
    assert model.config.max_position_embeddings == 64
    other = model.extract_trail(1)
    w, v = (m.model.layers[1].mlp.up_proj.weight for m in (trail, other))
    assert float((w - v).std() / w.std()) == pytest.approx(0.01, rel=0.1)
    assert torch.equal(trail.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_a_run_goes_on_from_a_multi_head_checkpoint_with_its_masks(directory, tmp_path):
    masks = ["--sparsity.density", 0.5, "--sparsity.exclude", "[model.embed_tokens.*, lm_heads.*]"]
    first = run(directory, tmp_path / "first", "--sparsity.initial_masks", "wanda", "--train.head_noise", 0.01, *masks)
    source = tmp_path / "first" / "run" / "checkpoint-1"
    second = run(directory, tmp_path / "second", "--model.init_from", source, *masks, "--sparsity.update_interval", 0)
    for (name, module), other in zip(masked_modules(first).items(), masked_modules(second).values()):
        assert torch.equal(module.weight_mask, other.weight_mask), name
        torch.testing.assert_close(module.weight, other.weight, atol=1e-6, rtol=1e-5)


def test_a_run_from_weights_resumes_without_them(directory, tmp_path):
    arguments = ["--train.head_noise", 0.01, "--train.max_steps", 2]
    train(directory / "tiny.yaml", tmp_path / "a", *arguments)
    config = load_run_config([tmp_path / "a" / "run.yaml"])
    assert config.model == {"init_from": str(directory / "stock"), **MODEL}
    records = train(directory / "tiny.yaml", tmp_path / "a", *arguments)
    assert [r["step"] for r in records if r["event"] == "train"] == [1, 2]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_first_masks_are_those_of_the_method_on_training_data(directory, tmp_path, method):
    options = ["--sparsity.density", 0.6, "--sparsity.distribution", "uniform", "--sparsity.initial_masks", method]
    options += ["--sparsity.exclude", "[model.embed_tokens.*, lm_heads.*]", "--sparsity.calibration_rows", 12]
    model = run(directory, tmp_path, *options, "--train.head_noise", 0.05)
    overlap = head_overlap(masks_by_head(model))
    assert 0.7 < overlap < 1  # of random masks of this density 0.43
    assert all(abs(r - 0.6) < 0.01 for r in [sum(int(m.weight.count_nonzero()) for m in masked_modules(model).values())
               / sum(m.weight.numel() for m in masked_modules(model).values())])  # fmt: skip


@pytest.mark.parametrize(("interval", "warnings"), [(1, 1), (0, 0)])
def test_masks_of_a_trained_model_that_would_move_are_warned_of(directory, tmp_path, caplog, interval, warnings):
    masks = ["--sparsity.density", 0.5, "--sparsity.initial_masks", "magnitude", "--sparsity.update_interval", interval]
    run(directory, tmp_path, *masks, "--train.head_noise", 0.01)
    assert caplog.text.count("masks by magnitude were chosen for weights that are trained") == warnings


def test_noise_spares_the_first_head_and_the_backbone():
    config = LlamaConfig(
        vocab_size=20, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    stock = LlamaForCausalLM(config)
    model = NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=3, blocks_in_head=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_noise(model, 0.1, seed=3)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(
        name.startswith(("model.heads.1.", "model.heads.2.", "lm_heads.1", "lm_heads.2")) for name in changed
    )
    assert not any("norm" in name for name in changed)
    again = NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=3, blocks_in_head=2)
    add_noise(again, 0.1, seed=3)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    one, two = (model.model.heads[h].layers[0].mlp.up_proj.weight for h in (1, 2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "^train.head_noise=0: the heads are equal and would stay so; accepted is a number above 0, "),
        (
            ("--model.init_from", "/nowhere"),
            "^model.init_from=/nowhere: accepted is a checkpoint directory or a hub id",
        ),
        (("--model.hidden_size", 64), "^model.hidden_size=64: accepted is 32, as in .*stock$"),
        (("--model.base", "qwen3"), "^model.base='qwen3': accepted is llama, the family of "),
        (("--data.sequence_length", 128), "^data.sequence_length=128: accepted is a whole number from 1 to 64$"),
        (("--model.attention_dropout", 1), "^model.attention_dropout=1: accepted is a number from 0 to below 1$"),
        (("--train.head_noise", -1), "^train.head_noise=-1"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(directory, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(directory, tmp_path, *overrides)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_heads_with_learning_rates_of_their_own_become_different(directory, tmp_path):
    model = run(directory, tmp_path, "--train.learning_rate_factors", "{'*heads.1.*': 0.5}", "--train.max_steps", 2)
    one, two = (head.layers[0].mlp.up_proj.weight for head in model.model.heads[:2])
    assert not torch.equal(one, two)
    with pytest.raises(ValueError, match="the heads are equal"):
        run(directory, tmp_path / "all", "--train.learning_rate_factors", "{'*heads.*': 0.5}")


@pytest.mark.parametrize(("loss", "same"), [("sum", True), ("mean", False)])
def test_sgd_trains_a_network_of_a_full_ensemble_as_a_single_one_by_the_sum_of_losses(directory, tmp_path, loss, same):
    sgd = ("--train.optimizer", "sgd", "--train.learning_rate", 0.5, "--train.weight_decay", 0.1)
    options = (*sgd, "--train.max_steps", 3, "--train.save_steps", 3, "--train.max_grad_norm", "null")
    single = ("--model.num_ensemble_heads", 1)
    ensemble = ("--model.share_embedding", "false", "--train.head_noise", 0.01, "--train.head_loss", loss)
    trails = []
    for name, changes in (("single", single), ("ensemble", ensemble)):
        train(directory / "tiny.yaml", tmp_path / name, *options, "--model.blocks_in_head", 2, *changes)
        model = NeuroTrailsForCausalLM.from_pretrained(tmp_path / name / "checkpoint-3")
        trails.append([*model.extract_trail(0).parameters()])  # noise spares the first network
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*trails, strict=True)) == same


def test_dropout_over_the_checkpoint_makes_heads_different(directory, tmp_path):
    model = run(directory, tmp_path, "--model.attention_dropout", 0.1, "--train.max_steps", 2)
    assert model.config.attention_dropout == 0.1
    one, two = (head.layers[0].mlp.up_proj.weight for head in model.model.heads[:2])
    assert not torch.equal(one, two)
    again = run(directory, tmp_path / "more", "--model.init_from", tmp_path / "run" / "checkpoint-2",
                "--model.attention_dropout", 0.2)  # fmt: skip
    assert again.config.attention_dropout == 0.2


def test_a_classifier_of_other_classes_is_new(tmp_path, caplog):
    stock = WideResNetForImageClassification(WideResNetConfig(num_hidden_layers=3, width=1, num_labels=5))
    stock.save_pretrained(tmp_path / "stock")
    path = tmp_path / "images.yaml"
    path.write_text(yaml.safe_dump({
        "model": {"init_from": str(tmp_path / "stock"), **MODEL},
        "data": {"order_per_head": True},
        "train": {"max_steps": 1, "batch_size": 8, "optimizer": "sgd", "learning_rate": 1e-9},
    }))  # fmt: skip
    with caplog.at_level(logging.INFO, "nt_hf"):
        train(path, tmp_path / "run")
    assert "new is a classifier of 10 classes" in caplog.text
    model = NeuroTrailsForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert model.config.num_labels == 10 and model.config.id2label[3] == "3"
    trail = dict(model.extract_trail(0).named_parameters())
    same = [n for n, w in stock.named_parameters() if "classifier" not in n and torch.allclose(w, trail[n], atol=1e-6)]
    assert len(same) == sum("classifier" not in name for name in trail)
