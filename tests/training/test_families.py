"""Runs of other families than Llama: configured, trained, resumed, evaluated; sharded and compiled."""

import copy
import shutil

import pytest
import torch
from families import tiny_model, tokens
from processes import run_on
from recipe_runs import CONFIG, of, train, write_config
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from nt_hf import check_masks
from nt_hf.config import load_run_config
from nt_hf.evaluation.perplexity import load_for_evaluation
from nt_hf.sparsity.sharding import shard_model
from nt_hf.training.device import compile_blocks

# By the names that all families know.
SMALL = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "blocks_in_head": 2}


@pytest.mark.parametrize(
    ("base", "sizes"),
    [
        ("qwen3", {"intermediate_size": 48, "num_key_value_heads": 2}),
        ("gpt2", {"n_inner": 48}),
        ("mistral", {"intermediate_size": 48, "sliding_window": 8}),
    ],
)
def test_sizes_follow_from_those_that_are_given(base, sizes):
    config = load_run_config([{"model": {"base": base, **SMALL, **sizes}, "data": {"sequence_length": 16}}])
    model = config.model_config()
    assert model.model_type == f"neurotrails_{base}" and model.max_position_embeddings == 16
    assert model.num_hidden_layers == 3 and model.hidden_size == 32
    if hasattr(model, "num_key_value_heads"):
        assert model.num_key_value_heads == sizes.get("num_key_value_heads", 4) and model.head_dim == 8
    assert load_run_config([config.to_dict()]) == config


def test_naming_the_default_family_changes_nothing():
    assert load_run_config([{"model": {"base": "llama", **SMALL}}]) == load_run_config([{"model": SMALL}])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"base": "t5"}, r"^model\.base='t5': accepted are the families that AutoModelForCausalLM knows"),
        ({"base": "none such"}, r"^model\.base='none such': accepted are the decoders"),
        ({"base": 3}, r"^model\.base=3: accepted is a text that is not empty$"),
        ({"base": "gpt2", "rms_norm_eps": 1e-6}, r"^unknown key gpt2 model\.rms_norm_eps: did you mean"),
        ({"base": "qwen3", "num_key_value_heads": "x"}, r"^model\.num_key_value_heads='x': accepted is a whole number"),
    ],
)
def test_a_family_and_its_fields_are_checked(model, message):
    with pytest.raises(ValueError, match=message):
        load_run_config([{"model": model}])


CONFIGS = {
    "gpt2": "{base: gpt2, vocab_size: 320, hidden_size: 32, n_inner: 48, num_hidden_layers: 2, num_attention_heads: 2,",
    "qwen3": "{base: qwen3, vocab_size: 320, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,"
    " num_attention_heads: 2,",
}


@pytest.mark.parametrize("base", CONFIGS)
def test_a_run_trains_goes_on_and_is_evaluated(base, tmp_path):
    path = write_config(tmp_path)
    start, end = CONFIG.index("{vocab_size"), CONFIG.index("blocks_in_head")
    text = path.read_text().replace(CONFIG[start:end], CONFIGS[base] + " ")
    path.write_text(text.replace('exclude: ["model.embed_tokens.*"]', "exclude: [lm_heads.*]"))
    whole = train(path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    again = train(path, tmp_path / "run")
    keys = ("step", "head_losses", "grad_norm")
    assert of(again, "train", *keys) == of(whole, "train", *keys) and len(of(whole, "train", *keys)) == 12
    assert len(of(whole, "update", "step")) == 3
    checkpoint = tmp_path / "run" / "checkpoint-12"
    model = load_for_evaluation(checkpoint)
    assert model.config.model_type == f"neurotrails_{base}" and not check_masks(model)
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint)) is type(model)


def sharded_losses(processes: int, family: str) -> list[float]:
    model = tiny_model(family).train()
    optimizer_weights = list(model.parameters())
    if processes > 1:
        shard_model(model, init_device_mesh("cpu", (processes,)))
        optimizer_weights = list(model.parameters())
    optimizer = torch.optim.SGD(optimizer_weights, lr=1e-3)
    losses = []
    for step in range(3):
        ids = tokens(seed=step)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_sharded_models_train_as_whole_ones(family):
    for losses in run_on(2, sharded_losses, 2, family):
        assert losses == pytest.approx(sharded_losses(1, family), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_compiled_blocks_compute_the_same(family, monkeypatch):
    model, ids = tiny_model(family), tokens()
    expected = model(ids, use_cache=False).logits
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    compile_with, compiled_now = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block: compiled_now.append(block) or compile_with(block, backend="eager")
    )
    compile_blocks(compiled)
    assert len(compiled_now) == model.config.num_cache_layers
    assert torch.allclose(compiled(ids, use_cache=False).logits, expected, atol=1e-5)
