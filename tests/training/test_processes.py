"""The recipe on several processes, by DDP and by FSDP2: the same training as on one, and checkpoints for any number."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import slow
from processes import finish, free_port, wait_for
from recipe_runs import of, start, train
from safetensors.torch import load_file

from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.data.prepare import prepare
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.models.masks import check_masks, count_active
from nt_hf.training.launch import requested_sharding
from nt_hf.training.manifest import find_checkpoints, find_damage
from nt_hf.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# Padded documents in their order: the rows of a step are the same ones, however they are divided.
SAME_ROWS = ("--data.packing", "pad", "--data.shuffle_block", 0, "--data.validation_tokens", "null",
             "--data.validation", Path(__file__).parents[1] / "small.jsonl", "--train.micro_batch_size", 1)  # fmt: skip
OWN_ORDERS = ("--data.order_per_head", "true")
DENSE_MOMENTS = ("--sparsity.second_moments", "dense", "--sparsity.update_interval", 2, "--train.max_grad_norm", 0.1)


# Of prepared tokens the shuffled rows of a step are the same ones as well.
PREPARED = ("--train.micro_batch_size", 1, "--data.train")
LONG = ("--train.max_steps", 24, "--train.eval_steps", 12, "--train.save_steps", 12, "--sparsity.update_interval", 8)


def train_on(processes: int, config: Path, run_dir: Path, *overrides: object, **environment: str) -> list[dict]:
    """Runs the recipe on some processes; returns its metrics."""
    codes = finish(start(processes, "--config", config, "--output_dir", run_dir, *overrides, **environment))
    assert codes == [0] * processes
    return read_metrics(run_dir / "metrics.jsonl")


def masks_of(run_dir: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(find_checkpoints(run_dir)[-1] / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("weight_mask")}


def jaccard(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    both = sum(count_active(one[name] & other[name]) for name in one)
    return both / sum(count_active(one[name] | other[name]) for name in one)


@pytest.fixture(scope="module")
def tokens(config, tmp_path_factory) -> Path:
    """Prepared tokens of a little text."""
    directory = tmp_path_factory.mktemp("tokens") / "prepared"
    prepare("sample:validation", load_tokenizer(str(config.parent / "tokenizer")), directory)
    return directory


@pytest.fixture(scope="module")
def single(config, tmp_path_factory) -> Path:
    """The directory of a run of 24 steps on one process."""
    directory = tmp_path_factory.mktemp("single") / "run"
    train(config, directory, *SAME_ROWS, *LONG)
    return directory


@pytest.mark.parametrize(("processes", "environment"), [(2, {}), slow(4, {}), slow(2, FSDP2), slow(4, FSDP2)])
def test_several_processes_train_as_one(config, single, tmp_path, processes, environment):
    one = read_metrics(single / "metrics.jsonl")
    many = train_on(processes, config, tmp_path / "run", *SAME_ROWS, *LONG, "--train.check_interval", 1, **environment)
    for key in ("head_losses", "grad_norm"):
        pairs = list(zip(of(one, "train", key), of(many, "train", key)))
        assert len(pairs) == 24
        for (a,), (b,) in pairs[:7]:
            assert b == pytest.approx(a, rel=1e-5)
        # From the first update on rounding decides between weights that score the same.
        for (a,), (b,) in pairs[7:] if key == "head_losses" else []:
            assert b == pytest.approx(a, rel=1e-3)
    assert jaccard(masks_of(single), masks_of(tmp_path / "run")) >= 0.999
    assert of(many, "eval", "tokens") == of(one, "eval", "tokens")
    last = find_checkpoints(tmp_path / "run")[-1]
    assert not find_damage(last) and not check_masks(NeuroTrailsLlamaForCausalLM.from_pretrained(last))
    shards = len(list((last / "training_state").glob("state-*.safetensors")))
    assert shards == (processes if environment else 1)
    expected = find_checkpoints(single)[-1]
    assert {path.name for path in last.iterdir()} == {path.name for path in expected.iterdir()}
    assert (last / "config.json").read_text() == (expected / "config.json").read_text()  # auto_map and all


@pytest.mark.parametrize(
    ("environment", "overrides"), [slow({}, ()), slow({}, DENSE_MOMENTS), slow(FSDP2, ()), (FSDP2, DENSE_MOMENTS)]
)
def test_several_processes_resume_exactly(config, tmp_path, environment, overrides):
    steps = ("--train.max_steps", 8, "--train.save_steps", 4, "--train.eval_steps", 8, *overrides)
    whole = train_on(2, config, tmp_path / "run", *steps, **environment)
    expected = load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    again = train_on(2, config, tmp_path / "run", *steps, **environment)
    keys = ("step", "head_losses", "grad_norm")
    assert of(again, "train", *keys) == of(whole, "train", *keys)
    found = load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("first", "then", "overrides"),
    [slow((2, FSDP2), (1, {}), ()), slow((2, FSDP2), (4, FSDP2), ()), slow((1, {}), (2, FSDP2), ()),
     slow((2, {}), (2, FSDP2), ()), slow((4, {}), (1, {}), ()), ((2, {}), (2, FSDP2), OWN_ORDERS),
     slow((1, {}), (2, {}), OWN_ORDERS)],
)  # fmt: skip
def test_a_run_goes_on_with_another_number_of_processes(config, tokens, tmp_path, first, then, overrides):
    settings = (*PREPARED, f"prepared:{tokens}", *overrides)
    expected = train(config, tmp_path / "single", *settings)
    train_on(first[0], config, tmp_path / "run", *settings, **first[1])
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    moved = train_on(then[0], config, tmp_path / "run", *settings, **then[1])
    pairs = list(zip(of(moved, "train", "step", "head_losses"), of(expected, "train", "step", "head_losses")))
    assert len(pairs) == 12
    for (step, losses), (same_step, expected_losses) in pairs:
        assert step == same_step and losses == pytest.approx(expected_losses, rel=1e-3)
    assert jaccard(masks_of(tmp_path / "single"), masks_of(tmp_path / "run")) >= 0.999


@pytest.mark.slow
def test_text_is_dealt_again_to_another_number_of_processes(config, tmp_path):
    train_on(2, config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    records = train_on(4, config, tmp_path / "run", "--train.micro_batch_size", 1)
    assert of(records, "train", "step")[-1] == (12,)
    state = tmp_path / "run" / "checkpoint-12" / "training_state"
    assert len(list(state.glob("rank-*.json"))) == 4  # tests/test_data.py counts the documents


# ---------------------------------------------------------------------------------------------------- launchers


@pytest.mark.parametrize(("name", "sharded"), [("one_gpu", False), ("ddp", False), ("fsdp2", True)])
def test_the_launch_files_ask_for_what_their_names_say(monkeypatch, name, sharded):
    """By what Accelerate puts into the environment of each process."""
    file = str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", file, "--num_processes", "2", "script"])
    for key, value in prepare_multi_gpu_env(_validate_launch_command(arguments)[0]).items():
        monkeypatch.setenv(key, value)
    plugin = requested_sharding()
    assert bool(plugin) == sharded and not (plugin and not plugin.reshard_after_forward)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shards"), [("ddp", 1), ("fsdp2", 2)])
def test_the_launch_files(config, tmp_path, name, shards):
    command = ["accelerate.commands.launch", "--config_file", "recipes/accelerate/" + name + ".yaml"]
    result = subprocess.run(
        [sys.executable, "-m", *command, "--num_processes", "2", *recipe(config, tmp_path / "run")],
        cwd=ROOT, env=os.environ | ON_CPU, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"2 processes ({name.upper()})" in result.stderr
    assert len(list((tmp_path / "run" / "checkpoint-3" / "training_state").glob("state-*"))) == shards


@pytest.mark.slow
def test_a_signal_to_torchrun_reaches_every_process(config, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_dir = tmp_path / "run"
    endless = ("--train.max_steps", "100000", "--train.eval_steps", "100000", "--train.save_steps", "100000")
    launcher = subprocess.Popen([*command, *recipe(config, run_dir), *endless], cwd=ROOT, env=os.environ | ON_CPU)
    wait_for(run_dir / "metrics.jsonl", '"step": 4')
    launcher.terminate()
    assert launcher.wait(60) != 0
    assert len(find_checkpoints(run_dir)) == 1 and not find_damage(find_checkpoints(run_dir)[0])


def recipe(config: Path, run_dir: Path) -> list[str]:
    return ["recipes/pretrain_c4.py", "--config", str(config), "--output_dir", str(run_dir), "--train.max_steps", "3"]


@pytest.mark.parametrize("script", ["multi_node.sh", "slurm.sbatch"])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(ROOT / "recipes" / "accelerate" / script)], check=True)


@pytest.mark.slow
def test_the_multi_node_script_starts_the_recipe(config, tmp_path):
    environment = os.environ | ON_CPU | {"NODES": "1", "GPUS_PER_NODE": "2", "HEAD": f"127.0.0.1:{free_port()}"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", "recipes/accelerate/multi_node.sh", *recipe(config, tmp_path / "run")[1:]]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
