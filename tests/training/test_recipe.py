"""Training as a user runs it, on a tiny model and the embedded sample."""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import slow
from huggingface_hub import ModelCard
from recipe_runs import call, of, train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.cli import tokenizer as train_tokenizer
from nt_hf.cli.train import main
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.evaluation.perplexity import evaluate, load_for_evaluation
from nt_hf.models.masks import check_masks, count_active, masked_modules, overall_density, unpack_mask
from nt_hf.training import run as training_run
from nt_hf.training.batches import limited
from nt_hf.training.manifest import find_checkpoints
from nt_hf.training.metrics import read_metrics
from nt_hf.training.run_log import flat_numbers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """The directory of a finished run of 12 steps, plots included."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    call(main, "--config", config, "--output_dir", directory)
    return directory


@pytest.fixture(scope="module")
def structured(config, tmp_path_factory) -> Path:
    """The directory of a finished run with 2:4 masks."""
    directory = tmp_path_factory.mktemp("runs") / "structured"
    train(config, directory, "--sparsity.structure", "2:4", "--sparsity.distribution", "erk")
    return directory


# ------------------------------------------------------------------------------------------- what a run leaves


def test_the_run_directory_is_complete(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-12",
        "checkpoint-6",
        "metrics.jsonl",
        "report",
        "run.yaml",
    ]
    assert {path.name for path in (run / "report").iterdir()} >= {"results.md", "training.png"}
    files = {path.name for path in (run / "checkpoint-12").iterdir()}
    assert files >= {"model.safetensors", "config.json", "tokenizer.json", "README.md", "run.yaml", "sparsity.json"}
    assert files >= {"modeling_neurotrails.py", "configuration_neurotrails.py", "masks.py"}
    card = (run / "checkpoint-12" / "README.md").read_text()
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["event"] == "eval" and f"{last['perplexity']:.2f}" in card
    data = ModelCard(card).data
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", last["perplexity"])
    assert f"Density of the masked weights: {last['density']:.3f}" in card and "sparse" in data.tags
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("…", str(run / "checkpoint-12")), names)
    assert names["model"].config.num_ensemble_heads > 1 and names["tokenizer"].vocab_size


def test_metrics_say_what_they_should(run):
    records = read_metrics(run / "metrics.jsonl")
    trains = [record for record in records if record["event"] == "train"]
    assert [record["step"] for record in trains] == list(range(1, 13))
    assert all(record["tokens"] == record["step"] * 4 * 32 for record in trains)
    for record in trains:
        assert record["loss"] == pytest.approx(sum(record["head_losses"]) / 3)
        assert record["grad_norm"] > 0 and record["tokens_per_second"] > 0 and record["peak_memory"] > 1e6
        assert record["mfu"] is None  # a CPU's peak is not known
        assert 0 <= record["data_wait"] < 0.9
    assert trains[-1]["loss"] < trains[0]["loss"]
    updates = [record for record in records if record["event"] == "update"]
    assert [record["step"] for record in updates] == [3, 6, 9]
    assert all(record["dropped"] == record["grown"] for record in updates)
    assert set(updates[0]["density_by_group"]) == {"model.layers", "model.heads", "lm_heads"}
    assert updates[-1]["ever_active"] > updates[0]["ever_active"] > updates[0]["density"]
    evals = [record for record in records if record["event"] == "eval"]
    assert [record["step"] for record in evals] == [0, 6, 12]
    assert evals[-1]["perplexity"] < evals[0]["perplexity"]


def test_the_checkpoint_holds_exact_packed_masks(run):
    tensors = load_file(run / "checkpoint-12" / "model.safetensors")
    counts = exact_masks(run / "checkpoint-12")
    assert len(counts) == 7 + 3 * 7 + 3
    for name, active in counts.items():
        assert active == round(0.5 * tensors[name].numel())
        assert 0.9 * active < tensors[name].count_nonzero() <= active


def test_the_checkpoint_is_a_model_of_transformers(run):
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint-12")
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-12").eval()
    config = model.config
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (1, 0, None)
    assert config.max_position_embeddings == tokenizer.model_max_length == 32
    inputs = tokenizer("The best way", return_tensors="pt")
    output = model.generate(inputs["input_ids"], max_new_tokens=8, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 8 or output[0, -1] == 1


def test_perplexity_of_the_checkpoint_is_that_of_the_run(config, run):
    path, text = run / "checkpoint-12", str(config.parent / "validation.jsonl")
    rows = TokenBatches(text, load_tokenizer(str(path)), batch_size=2, sequence_length=32, epochs=1)
    model = load_for_evaluation(path)
    result = evaluate(model, limited(rows, 500, stop=lambda: False, multiple=2)).to_dict()
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert result["tokens"] == last["tokens"] and overall_density(model) == last["density"]
    for key in ("head_perplexities", "disagreement", "perplexity"):
        assert result[key] == pytest.approx(last[key], rel=1e-6)
    assert result["ensemble_perplexities"] == pytest.approx(last["ensemble_perplexities"], rel=1e-6)


def exact_masks(checkpoint: Path) -> dict[str, int]:
    """The number of active weights of each masked tensor, each checked against its target and for zeros elsewhere."""
    tensors = load_file(checkpoint / "model.safetensors")
    rows = json.loads((checkpoint / "sparsity.json").read_text())["tensors"]
    assert sum(name.endswith("weight_mask") for name in tensors) == len(rows)
    for row in rows:
        weight, packed = tensors[row["name"]], tensors[row["name"] + "_mask"]
        assert count_active(packed) == row["target"] == row["active"]
        assert not weight[~unpack_mask(packed, weight.shape)].any()
    return {row["name"]: row["active"] for row in rows}


@pytest.mark.slow
def test_the_demo_shows_what_it_should(tmp_path):
    command = ["--data", "sample:train", "--vocab_size", "2048", "--output", str(tmp_path / "tokenizer")]
    call(train_tokenizer.main, *command)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    demo = ROOT / "recipes" / "configs" / "demo.yaml"
    records = train(demo, tmp_path / "run", "--data.tokenizer", tmp_path / "tokenizer")
    torch.set_num_threads(threads)
    evaluation = [record for record in records if record["event"] == "eval"][-1]
    assert evaluation["perplexity"] < min(evaluation["head_perplexities"])
    updates = [record for record in records if record["event"] == "update"]
    assert len(updates) > 1 and updates[-1]["ever_active"] > updates[-1]["density"]
    assert len(exact_masks(tmp_path / "run" / "checkpoint-1400")) == 8 * 7


def test_a_finished_run_is_only_reported_again(config, run, caplog):
    before = (run / "metrics.jsonl").read_bytes()
    train(config, run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_bf16_checkpoint_is_half_as_large_and_keeps_its_masks(config, run, tmp_path):
    train(config, tmp_path / "run", "--train.save_dtype", "bfloat16")
    path = tmp_path / "run" / "checkpoint-12"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16 and not check_masks(model)
    assert {module.weight_mask.dtype for module in masked_modules(model).values()} == {torch.uint8}
    sizes = [os.path.getsize(p / "model.safetensors") for p in (path, run / "checkpoint-12")]
    assert sizes[0] < 0.6 * sizes[1]


# ---------------------------------------------------------------------------------------------- how it trains


def test_gradient_accumulation_is_exact(config, tmp_path):
    # Padded rows have different numbers of tokens, so averaging averages would differ.
    common = ("--data.packing", "pad", "--data.sequence_length", 64, "--sparsity.update_interval", 0,
              "--train.max_steps", 6)  # fmt: skip
    one = train(config, tmp_path / "one", *common, "--train.micro_batch_size", 4)
    four = train(config, tmp_path / "four", *common, "--train.micro_batch_size", 1)
    for (a,), (b,) in zip(of(one, "train", "head_losses"), of(four, "train", "head_losses")):
        assert a == pytest.approx(b, abs=2e-5)
    assert of(one, "train", "grad_norm")[0] == pytest.approx(of(four, "train", "grad_norm")[0], rel=1e-5)


OWN_METHOD = ("--sparsity.drop", "magnitude", "--sparsity.grow", "random", "--sparsity.distribution", "erk",
              "--sparsity.update_end", 0.5, "--sparsity.densities", "{'lm_heads.*': 0.8}")  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "updates", "density"),
    [
        (("--sparsity.density", 1.0), 0, 1.0),
        (OWN_METHOD, 1, 0.5),
        (("--model.share_embedding", "false", "--model.blocks_in_head", "null", "--sparsity.exclude", "[]"), 3, 0.5),
        (("--model.tie_word_embeddings", "true", "--sparsity.exclude", "[]"), 3, 0.5),
        slow(("--sparsity.update_interval", 0), 0, 0.5),
        slow(("--model.num_ensemble_heads", 1, "--train.gradient_checkpointing", "true"), 3, 0.5),
        slow(("--train.precision", "bf16"), 3, 0.5),
        slow(("--train.matmul_precision", "medium"), 3, 0.5),
        slow(("--sparsity.initial_masks", "snip", "--sparsity.drop", "taylor"), 3, 0.5),
        slow(("--sparsity.density_start", 1.0, "--sparsity.drop", "global_magnitude"), 3, 0.5),
    ],
)
def test_kinds_of_runs(config, tmp_path, overrides, updates, density):
    require_kind(train(config, tmp_path / "run", *overrides), tmp_path / "run", updates, density)


def require_kind(records: list[dict], run_dir: Path, updates: int, density: float) -> None:
    """A run made so many updates, ended with exactly as many active weights, and learned."""
    assert len(of(records, "update")) == updates
    model = NeuroTrailsLlamaForCausalLM.from_pretrained(run_dir / "checkpoint-12")
    modules = masked_modules(model).values()
    active, size = sum(count_active(m.weight_mask) for m in modules), sum(m.weight.numel() for m in modules)
    assert active == round(density * size) and bool(size) == (density < 1)
    evals = of(records, "eval", "perplexity")
    assert evals[-1] < evals[0]


def test_masks_of_a_checkpoint_begin_another_run(config, run, tmp_path):
    first = load_file(run / "checkpoint-12" / "model.safetensors")
    masks = {name: value for name, value in first.items() if name.endswith("weight_mask")}
    train(config, tmp_path / "run", "--sparsity.initial_masks", run / "checkpoint-12", "--sparsity.update_interval", 0)
    second = load_file(tmp_path / "run" / "checkpoint-12" / "model.safetensors")
    assert masks and all(torch.equal(second[name], mask) for name, mask in masks.items())


def test_a_run_with_a_structure(structured):
    require_kind(read_metrics(structured / "metrics.jsonl"), structured, 3, 0.5)


def test_a_mask_that_lacks_the_declared_structure_is_refused(structured, tmp_path):
    path = shutil.copytree(structured / "checkpoint-12", tmp_path / "checkpoint-12")
    assert NeuroTrailsLlamaForCausalLM.from_pretrained(path).config.mask_structure == "2:4"
    weights = load_file(path / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight_mask"))
    weights[name][0, 0] |= 0b1111
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"the mask of {name.removesuffix('_mask')}: groups hold 2 to 4 active weights"
    ):
        NeuroTrailsLlamaForCausalLM.from_pretrained(path)


def test_trackers(config, tmp_path):
    train(config, tmp_path / "run", "--log_with", "tensorboard", "--train.max_steps", 2)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert dict(flat_numbers("eval", {"a": 1, "b": [2.5, None], "c": {"x": 3}, "d": "text"})) == {
        "eval/a": 1, "eval/b/0": 2.5, "eval/c/x": 3
    }  # fmt: skip


def test_a_tracker_gets_name_settings_and_the_continued_run(config, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, project, **options: calls.append(options))
    options = ["--log_with", "tensorboard", "--train.save_steps", 2]
    for steps in (2, 4):
        train(config, tmp_path / "run", *options, "--train.max_steps", steps, "--resume_override")
    first, second = (options["init_kwargs"] for options in calls)
    assert first["wandb"]["id"] == second["wandb"]["id"] and first["wandb"]["name"] == "run"
    assert (first["wandb"]["resume"], second["wandb"]["resume"]) == ("never", "allow")
    assert (first["tensorboard"], second["tensorboard"]) == ({}, {"purge_step": 3})
    assert calls[0]["config"]["train/max_steps"] == 2
    assert all(isinstance(value, int | float | str) for value in calls[0]["config"].values())
    train(config, tmp_path / "other", *options, "--train.max_steps", 2)
    assert calls[2]["init_kwargs"]["wandb"]["id"] != first["wandb"]["id"]


def test_a_tracker_that_is_not_installed_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--log_with wandb: it is not installed"):
        train(config, tmp_path / "run", "--log_with", "wandb")


@pytest.mark.slow
def test_the_program_needs_neither_datasets_nor_lm_eval_and_warns_of_no_fork(config, tmp_path):
    """In a process of its own: importing the packages fails, and threads of the tokenizer run before workers fork."""
    program = (
        "import runpy, sys\n"
        "sys.modules.update(datasets=None, lm_eval=None)\n"
        "from nt_hf.data.tokenizers import load_tokenizer, tokenize\n"
        f"tokenize(['some text'] * 300, load_tokenizer({str(config.parent / 'tokenizer')!r}))\n"
        f"sys.argv = ['x', '--config', {str(config)!r}, '--output_dir', {str(tmp_path / 'run')!r},\n"
        "            '--train.max_steps', '3', '--data.num_workers', '2']\n"
        f"runpy.run_path({str(ROOT / 'recipes' / 'pretrain_c4.py')!r}, run_name='__main__')\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TOKENIZERS_")}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "checkpoint-3").is_dir() and "fork" not in result.stderr


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--model.blocks_in_head", 3), "blocks_in_head=3: accepted is 0 to num_hidden_layers=2"),
        (("--model.num_ensemble_heads", 0), "num_ensemble_heads=0"),
        (("--model.vocab_size", 300), "vocab_size"),
        (("--sparsity.densities", "{'lm_heads.*': 1.0}", "--sparsity.density", 0.05), "densities"),
        (("--sparsity.densities", "{'nothing.*': 1.0}"), "nothing.*"),
        (("--sparsity.exclude", "['nothing.*']"), "nothing.*"),
        (("--sparsity.structure", "4:2"), "accepted: unstructured, constant_fan_in, or N:M with 1 <= N <= M"),
        (("--sparsity.structure", "2:4", "--sparsity.density", 0.6), "accepted with structure=2:4 is density=0.5"),
        (("--sparsity.structure", "3:6"), "needs input dimensions divisible by 6; one is 32"),
        (("--sparsity.initial_masks", "no/such"), "wanda, sparsegpt, the path of a checkpoint"),
        (("--data.train", "no/such/*.jsonl"), "no/such"),
        (("--data.validation", "no/such/*.jsonl"), "no/such"),
        (("--data.tokenizer", "no/such"), "no/such"),
        (("--train.batch_size", 5), "batch_size=5"),
        (("--model.num_attention_heads", 0), "num_attention_heads=0"),
        (("--resume", "no/such"), "accepted is auto, never, or a checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(config, tmp_path, overrides, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # asking for a tokenizer takes many seconds
    with pytest.raises((ValueError, OSError)) as caught:
        train(config, tmp_path / "run", *overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty.jsonl"),
        ('{"text": "fine"}\nnot json\n', "empty.jsonl"),
        ('{"txt": "no such field"}\n', "empty.jsonl"),
    ],
)
@pytest.mark.parametrize("key", ["train", "validation"])
def test_bad_data_is_one_line_that_names_the_file(config, tmp_path, content, message, key):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(ValueError) as caught:
        train(config, tmp_path / "run", f"--data.{key}", tmp_path / "empty.jsonl")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_ends_with_one_line_and_a_failure(config, tmp_path, monkeypatch):
    recipe = str(ROOT / "recipes" / "pretrain_c4.py")
    arguments = ["--config", str(config), "--output_dir", str(tmp_path / "run"), "--sparsity.densty", "0.5"]
    monkeypatch.setattr(sys, "argv", [recipe, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(recipe, run_name="__main__")
    # Python prints a text to stderr and ends with 1.
    assert ended.value.code == "error: unknown key --sparsity.densty: did you mean density?"


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_broken(config, tmp_path, monkeypatch):
    rate = training_run.learning_rate
    too_high = lambda step, train: rate(step, train) * (1e30 if step == 7 else 1)  # noqa: E731
    monkeypatch.setattr(training_run, "learning_rate", too_high)
    with pytest.raises(FloatingPointError, match=r"not finite at step (9|10); the last good .*checkpoint-6"):
        train(config, tmp_path / "run", "--sparsity.update_interval", 5)
    with pytest.raises(FloatingPointError, match=r"not finite at step 8; .*checkpoint-6"):  # before it is saved
        train(config, tmp_path / "run", "--sparsity.update_interval", 5, "--train.save_steps", 8)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    assert not check_masks(NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6"))


def test_a_run_of_another_shape_is_not_continued(config, run):
    with pytest.raises(ValueError, match=r"model.hidden_size=64 \(was 32\): .*checkpoint-12.* cannot continue so"):
        train(config, run, "--model.hidden_size", 64)
    with pytest.raises(ValueError, match=r"sparsity.density=0.6 \(was 0.5\): .*checkpoint-12.* cannot continue so"):
        train(config, run, "--sparsity.density", 0.6)


def test_weights_whose_learning_rate_factor_is_0_stay_as_they_are(config, tmp_path):
    train(
        config, tmp_path, "--train.max_steps", 2, "--train.save_steps", 1, "--train.learning_rate_factors",
        '{"*.layers.*": 0}',
    )  # fmt: skip
    first, second = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    for name in first:
        if name.endswith(".weight"):
            assert torch.equal(first[name], second[name]) == (".layers." in name), name
