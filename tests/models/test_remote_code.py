"""A saved directory loads with ``trust_remote_code=True`` in a process that cannot import this package."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architecture import MODEL

from nt_hf import NeuroTrailsLlamaForCausalLM

# For those who have the package, and for other kinds of models.
NOT_CARRIED = {"auto", "image_parts", "merging", "modeling_neurotrails_images", "wide_resnet"}
WITHOUT_PACKAGE = """
import sys
sys.modules["nt_hf"] = None  # an editable installation would be found even from elsewhere
try:
    import nt_hf
    raise SystemExit("nt_hf can be imported")
except ImportError:
    pass

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
source, prompts, target, answers = sys.argv[1:]
prompts = load_file(prompts)
"""
LOADS_AND_SAVES = """
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert isinstance(model.config, type(config)) and type(config).__name__ == "NeuroTrailsLlamaConfig"
assert not any(name == "nt_hf" or name.startswith("nt_hf.") for name in sys.modules if sys.modules[name])
model.save_pretrained(target)
trail = model.extract_trail(1)
copied = type(model).from_stock(trail, num_ensemble_heads=2, blocks_in_head=1)
loss = model.train()(**prompts, labels=prompts["input_ids"], use_cache=False).loss
loss.backward()
model.eval()
save_file({
    "logits": model(**prompts).logits.detach(),
    "tokens": model.generate(**prompts, max_new_tokens=8),
    "drafted": model.generate(**prompts, max_new_tokens=8, trail_draft=0),
    "trail": trail(**prompts).logits.detach(),
    "copied": copied(**prompts).logits.detach(),
    "loss": loss.detach(),
}, answers)
"""
RESIZES = """
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
model.resize_token_embeddings(model.config.vocab_size + 8)
save_file({"logits": model(**prompts).logits.detach()[..., :-8].contiguous()}, answers)
"""

LOADS_SPARSE = """
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
part = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, heads=[2, 0])
assert type(part).__module__.startswith("transformers_modules."), type(part)
part.save_pretrained(target, sparse=True)
again = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
models = {"all": model, "part": part, "again": again}
save_file({name: model(**prompts).logits.detach() for name, model in models.items()}, answers)
"""


@pytest.fixture
def run_without_package(prompts, tmp_path):
    """Runs a script on ``source`` in a bare process and returns the tensors that it saves."""
    save_file(prompts, tmp_path / "prompts.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(script, source, target="unused"):
        answers = tmp_path / "answers.safetensors"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        arguments = [source, tmp_path / "prompts.safetensors", target, answers]
        result = subprocess.run(
            [sys.executable, "-I", "-c", WITHOUT_PACKAGE + script, *arguments],
            cwd=elsewhere,
            env={**kept, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return load_file(answers)

    return run


@pytest.mark.parametrize(
    "model", ["neurotrails", pytest.param("tied_full_ensemble", marks=pytest.mark.slow)], indirect=True
)
def test_the_same_answers_without_the_package_also_after_saving_from_there(
    model, prompts, tmp_path, run_without_package
):
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    # Only flat Python files of the model itself travel with it.
    code = {path.name for path in first.glob("*.py")}
    assert code == {f"{name}.py" for name in MODEL - NOT_CARRIED}
    answers = run_without_package(LOADS_AND_SAVES, first, second)

    logits = model(**prompts, output_head_logits=True)
    expected = {
        "logits": logits.logits,
        "tokens": model.generate(**prompts, max_new_tokens=8),
        "drafted": model.generate(**prompts, max_new_tokens=8),
        "trail": logits.head_logits[1],
        "copied": logits.head_logits[1],
        "loss": model(**prompts, labels=prompts["input_ids"]).loss,
    }
    assert answers.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(answers[name], tensor.detach(), atol=1e-6, rtol=1e-6)

    assert {path.name for path in second.glob("*.py")} == code
    resaved = NeuroTrailsLlamaForCausalLM.from_pretrained(second)
    assert all(torch.equal(tensor, resaved.state_dict()[key]) for key, tensor in model.state_dict().items())
    again = run_without_package(RESIZES, second)
    torch.testing.assert_close(again["logits"], expected["logits"].detach(), atol=1e-6, rtol=1e-6)


def test_sparse_checkpoints_and_single_heads_without_the_package(model, prompts, tmp_path, run_without_package):
    model.save_pretrained(tmp_path / "first", sparse=True)
    answers = run_without_package(LOADS_SPARSE, tmp_path / "first", tmp_path / "second")
    for name, heads in {"all": None, "part": [2, 0], "again": [2, 0]}.items():
        expected = model(**prompts, active_heads=heads).logits.detach()
        torch.testing.assert_close(answers[name], expected, atol=1e-6, rtol=1e-6)
    part = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path / "second").state_dict()
    assert all(
        torch.equal(part[f"lm_heads.{new}.weight"], model.lm_heads[old].weight) for new, old in enumerate([2, 0])
    )
    assert "model.layers.0.mlp.up_proj.weight_values" in load_file(tmp_path / "second" / "model.safetensors")


def test_errors_travel_with_the_model(model, tmp_path, run_without_package):
    model.save_pretrained(tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(1)
    save_file(tensors, path, metadata={"format": "pt"})
    script = """
try:
    AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    raise SystemExit("loaded")
except ValueError as error:
    assert "model.layers.0.mlp.up_proj.weight" in str(error), error
save_file({}, answers)
"""
    run_without_package(script, tmp_path / "broken")
