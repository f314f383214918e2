"""Runs that are stopped, killed, or find their files damaged: what is left, and what the next start makes of it."""

import errno
import functools
import logging
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import slow
from processes import finish, wait_for
from recipe_runs import call, of, start, train
from safetensors.torch import load_file

from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.cli import tokenizer
from nt_hf.models.masks import check_masks
from nt_hf.sparsity.sparsifier import Sparsifier
from nt_hf.training import manifest, tasks
from nt_hf.training.manifest import find_checkpoints, find_damage
from nt_hf.training.metrics import read_metrics
from nt_hf.training.signals import EXIT_PREEMPTED

SAVES_OFTEN = ("--train.save_steps", 3, "--train.keep", 2)


def names(run_dir: Path) -> list[str]:
    return [path.name for path in find_checkpoints(run_dir)]


def require_same_result(run_dir: Path, whole: Path) -> None:
    """The run's metrics and its last weights, masks and optimizer state are bit for bit those of the other one."""
    records, expected = (read_metrics(path / "metrics.jsonl") for path in (run_dir, whole))
    keys = ("step", "tokens", "head_losses", "lr", "grad_norm", "epoch")
    assert of(records, "train", *keys) == of(expected, "train", *keys)
    keys = ("step", "dropped", "grown", "grown_kept", "density", "density_by_group", "ever_active")
    assert of(records, "update", *keys) == of(expected, "update", *keys)
    assert of(records, "eval", "step", "head_losses") == of(expected, "eval", "step", "head_losses")
    last = names(whole)[-1]
    for file in [whole / last / "model.safetensors", *(whole / last / "training_state").glob("*.safetensors")]:
        one, other = load_file(file), load_file(run_dir / file.relative_to(whole))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(config, directory, *SAVES_OFTEN)
    return directory


# ------------------------------------------------------------------------------------------------ interruptions


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def at_step(step: int, what, monkeypatch) -> None:
    """Calls ``what`` in the given step, before the weights change."""
    original = Sparsifier.step

    def interrupted(self):
        if self.steps + 1 == step:
            what()
        return original(self)

    monkeypatch.setattr(Sparsifier, "step", interrupted)


def die() -> None:
    raise Killed


@pytest.mark.parametrize("overrides", [("--data.packing", "pad", "--data.num_workers", "2"),
                                       slow(()),
                                       slow(("--data.order_per_head", "true")),
                                       slow(("--train.optimizer", "adamw", "--train.weight_decay", "0.1",
                                             "--train.save_dtype", "bfloat16")),
                                       ("--sparsity.second_moments", "dense", "--train.max_grad_norm", 0.1,
                                        "--sparsity.first_weights", "fan_in",
                                        "--model.embedding_initializer_range", 0.1),
                                       ("--sparsity.grow", "momentum", "--sparsity.redistribute", "gradient",
                                        "--sparsity.density_start", 1.0)])  # fmt: skip
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(config, tmp_path, monkeypatch, overrides):
    train(config, tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(10, die, patch)
        train(config, tmp_path / "killed", *overrides)
    assert names(tmp_path / "killed") == ["checkpoint-6"]
    train(config, tmp_path / "killed", *overrides)
    require_same_result(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGUSR1)])
def test_a_signal_saves_and_stops(config, whole, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(5, lambda: os.kill(os.getpid(), number), patch)
        train(config, tmp_path / "run", *SAVES_OFTEN)
    assert stopped.value.code == EXIT_PREEMPTED == 75
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-6"]  # step 5 was under way: 6 knows
    assert signal.getsignal(number) == before
    train(config, tmp_path / "run", *SAVES_OFTEN)
    require_same_result(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [slow(0), 6, slow(12)])
def test_a_signal_during_an_evaluation_loses_neither_step_nor_evaluation(config, whole, tmp_path, monkeypatch, step):
    evaluate = tasks.evaluate
    calls = iter((0, 6, 12))

    def interrupted(*args, **kwargs):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(tasks, "evaluate", interrupted)
        train(config, tmp_path / "run", *SAVES_OFTEN)
    if step:
        assert names(tmp_path / "run")[-1] == f"checkpoint-{step}"
    train(config, tmp_path / "run", *SAVES_OFTEN)
    require_same_result(tmp_path / "run", whole)


def test_a_signal_to_one_of_two_processes_stops_both(config, tmp_path):
    run_dir = tmp_path / "run"
    processes = start(2, "--config", config, "--output_dir", run_dir, "--train.max_steps", 100_000,
                      "--train.eval_steps", 100_000, "--train.save_steps", 100_000)  # fmt: skip
    wait_for(run_dir / "metrics.jsonl", '"step": 4')
    os.kill(processes[1].pid, signal.SIGUSR1)
    assert finish(processes) == [EXIT_PREEMPTED] * 2
    assert len(names(run_dir)) == 1 and not find_damage(find_checkpoints(run_dir)[0])


# -------------------------------------------------------------------------------------------------- damaged files


def test_every_damage_is_found(whole, tmp_path):
    chance = random.Random(0)
    files = sorted(path for path in (whole / "checkpoint-12").rglob("*") if path.is_file())
    kinds = {"truncated": 0, "flipped": 0, "missing": 0}
    for place in range(50):
        copy = tmp_path / str(place)
        shutil.copytree(whole / "checkpoint-12", copy)
        assert find_damage(copy) is None
        file = copy / chance.choice(files).relative_to(whole / "checkpoint-12")
        content = bytearray(file.read_bytes())
        kind = chance.choice(list(kinds))
        kinds[kind] += 1
        if kind == "missing":
            file.unlink()
        elif kind == "truncated":
            file.write_bytes(content[: chance.randrange(len(content))])
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
        damage = find_damage(copy)
        assert damage and file.name in damage and "\n" not in damage
        shutil.rmtree(copy)
    assert all(kinds.values())


def damage(file: Path) -> None:
    """Flips the highest bit of the byte in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x80
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "training_state/state-00001-of-00001.safetensors",
        slow("model.safetensors"),
        slow("run.yaml"),
        slow("training_state/rank-0.json"),
        slow("training_state/state.json"),
    ],
)
def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(config, whole, tmp_path, caplog, name):
    shutil.copytree(whole, tmp_path / "run")
    assert names(tmp_path / "run") == ["checkpoint-9", "checkpoint-12"]
    damage(tmp_path / "run" / "checkpoint-12" / name)
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "run", *SAVES_OFTEN)
    (warning,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert "checkpoint-12" in warning and Path(name).name in warning and "trying checkpoint-9" in warning
    require_same_result(tmp_path / "run", whole)
    assert (tmp_path / "run" / "damaged-checkpoint-12").is_dir()  # kept for whoever wants to look into it


def test_without_an_intact_checkpoint_nothing_is_begun(config, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for path in find_checkpoints(tmp_path / "run"):
        (path / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"checkpoint-9/model.safetensors is damaged \(missing.*start again in"):
        train(config, tmp_path / "run", *SAVES_OFTEN)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_named_checkpoint_that_is_damaged_is_refused(config, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-9", tmp_path / "checkpoint-9")
    damage(tmp_path / "checkpoint-9" / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-9/model.safetensors is damaged \(its checksum differs\)"):
        train(config, tmp_path / "run", *SAVES_OFTEN, "--resume", tmp_path / "checkpoint-9")
    assert not (tmp_path / "run").exists()


def test_old_checkpoints_go_when_a_newer_one_is_verified(config, tmp_path, monkeypatch, caplog):
    train(config, tmp_path / "run", "--train.save_steps", 3, "--train.keep", 1)
    assert names(tmp_path / "run") == ["checkpoint-12"]
    damage_sealed = lambda path: damage(path.with_name("config.json")) if path.name == manifest.MANIFEST else None  # noqa: E731
    monkeypatch.setattr(manifest, "sync", damage_sealed)
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "other", "--train.save_steps", 6, "--train.keep", 1)
    # The disk changes a file behind the program's back, after its checksum: so no checkpoint is deleted.
    assert names(tmp_path / "other") == ["checkpoint-6", "checkpoint-12"]
    assert "older checkpoints stay" in caplog.text


@pytest.mark.parametrize(
    "where", ["checkpoint.save_file", slow("manifest.sync"), slow("yaml.safe_dump"), slow("checkpoint.os.rename")]
)
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(config, whole, tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(8, die, patch)
        train(config, tmp_path / "run", *SAVES_OFTEN)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        if where == "yaml.safe_dump":  # the run's own configuration is written by then
            at_step(9, lambda: patch.setattr("yaml.safe_dump", full), patch)
        else:
            patch.setattr(f"nt_hf.training.{where}", full)
        train(config, tmp_path / "run", *SAVES_OFTEN)
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-6"]
    assert not list((tmp_path / "run").glob(".partial*"))
    assert not any(map(find_damage, find_checkpoints(tmp_path / "run")))
    train(config, tmp_path / "run", *SAVES_OFTEN)
    require_same_result(tmp_path / "run", whole)


def test_nothing_is_unpickled(whole):
    for path in whole.rglob("*"):
        assert path.is_dir() or path.suffix in {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".py", ".png"} | {
            ".jinja", ".svg", ".csv"
        }, path  # fmt: skip


# ---------------------------------------------------------------------------------------------------- bad input


def refused(message: str, config: Path, run_dir: Path, *overrides: object) -> str:
    """Checks that the recipe refuses in one line and touches nothing; returns the line."""
    folder = run_dir.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises((ValueError, OSError), match=message) as caught:
        train(config, run_dir, *overrides)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return str(caught.value)


def test_a_changed_configuration_is_listed_key_by_key(config, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    changes = ("--train.learning_rate", 0.02, "--sparsity.drop_fraction", 0.3, "--train.max_steps", 14)
    message = refused("--resume_override continues", config, tmp_path / "run", *SAVES_OFTEN, *changes)
    for change in ("train.learning_rate=0.02 (was 0.01)", "sparsity.drop_fraction=0.3 (was 0.5)",
                   "train.max_steps=14 (was 12)"):  # fmt: skip
        assert change in message
    refused(r"model.hidden_size=64 \(was 32\).*cannot continue so", config, tmp_path / "run", *SAVES_OFTEN,
            "--model.hidden_size", 64, "--resume_override")  # fmt: skip
    refused(r"sparsity.density=0.6 \(was 0.5\).*cannot continue so", config, tmp_path / "run", *SAVES_OFTEN,
            "--sparsity.density", 0.6)  # fmt: skip
    with caplog.at_level(logging.WARNING):
        records = train(config, tmp_path / "run", *SAVES_OFTEN, *changes, "--resume_override")
    assert of(records, "train", "step")[-1] == (14,) and "train.learning_rate=0.02 (was 0.01)" in caplog.text


def test_how_a_run_logs_and_saves_may_change(config, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-12" / "manifest.json").unlink()
    train(config, tmp_path / "run", "--train.log_steps", 2, "--train.save_steps", 5, "--train.micro_batch_size", 4)
    assert names(tmp_path / "run") == ["checkpoint-10", "checkpoint-12"]


def test_another_tokenizer_is_refused(config, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    command = ["--data", "sample:train", "--vocab_size", "320", "--output", str(tmp_path / "other")]
    call(tokenizer.main, *command)
    refused("data.tokenizer=.*other.*was trained with another", config, tmp_path / "run", *SAVES_OFTEN,
            "--data.tokenizer", tmp_path / "other")  # fmt: skip
    shutil.copytree(config.parent / "tokenizer", tmp_path / "same")  # elsewhere, but the same
    train(config, tmp_path / "run", *SAVES_OFTEN, "--data.tokenizer", tmp_path / "same")


def test_a_directory_of_another_run_is_refused(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(2, die, patch)  # before its first checkpoint
        train(config, tmp_path / "run")
    refused(r"model.hidden_size=64 \(was 32\): .*run/run.yaml", config, tmp_path / "run", "--model.hidden_size", 64)
    train(config, tmp_path / "run", "--model.hidden_size", 64, "--resume", "never")


def test_a_directory_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    refused("file", config, tmp_path / "file" / "run")
    if os.geteuid():  # nothing is forbidden to root
        (tmp_path / "locked").mkdir(mode=0o500)
        refused("locked.*Permission denied", config, tmp_path / "locked" / "run")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed: accepted are DDP and FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1: accepted are DDP and FSDP2"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "accepted is false"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16: accepted are bf16 and no"),
    ],
)
def test_what_the_launcher_cannot_ask_for(config, tmp_path, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(message, config, tmp_path / "run")


# -------------------------------------------------------------------------------------------------------- kills


def kill_at_operation(number: int, step: int) -> None:
    """Lets this process die of SIGKILL at its ``number``-th file operation within the save of a step."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"} and any(
            f"checkpoint-{step}" in str(argument) for argument in arguments
        ):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kill_at_moment(processes: list, seconds: float) -> None:
    """Kills one of the processes after some seconds, if it still runs then."""
    processes[-1].join(seconds)
    processes[-1].kill()


def resumed_until_done(processes: int, run_dir: Path, arguments: tuple, **environment: str) -> None:
    assert finish(start(processes, *arguments, "--output_dir", run_dir, **environment)) == [0] * processes


@pytest.mark.slow
def test_killed_between_any_two_file_operations_of_a_save(config, whole, tmp_path):
    arguments = ("--config", config, *SAVES_OFTEN)
    number = 0
    while True:
        number += 1
        run_dir = tmp_path / str(number)
        killed = start(
            1, *arguments, "--output_dir", run_dir, before=functools.partial(kill_at_operation, number, step=6)
        )
        if finish(killed) == [0]:
            break  # the save has fewer operations
        left = find_checkpoints(run_dir)
        assert left and not any(map(find_damage, left)), number
        for path in left:
            assert not check_masks(NeuroTrailsLlamaForCausalLM.from_pretrained(path))
        resumed_until_done(1, run_dir, arguments)
        require_same_result(run_dir, whole)
        shutil.rmtree(run_dir)
    assert number > 30
    print(f"killed at each of {number - 1} file operations of a save")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "fsdp"), [(1, False), (2, False), (2, True)])
def test_killed_at_random_moments(config, tmp_path, processes, fsdp):
    arguments = ("--config", config, *SAVES_OFTEN, "--train.save_steps", 2, "--train.keep", 3)
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if fsdp else {}
    for name in ("first", "whole"):  # the first one also starts the server that processes come from
        begin = time.monotonic()
        resumed_until_done(processes, tmp_path / name, arguments, **environment)
        duration = time.monotonic() - begin
    chance, kills, attempts = random.Random(processes), 0, 0
    while kills < 30:
        attempts += 1
        run_dir = tmp_path / str(attempts)
        killed = start(processes, *arguments, "--output_dir", run_dir, **environment)
        kill_at_moment(killed, chance.uniform(0.2, 0.95) * duration)
        if finish(killed) != [0] * processes:  # else it was faster than the one before
            kills += 1
            assert not any(map(find_damage, find_checkpoints(run_dir)))
            resumed_until_done(processes, run_dir, arguments, **environment)
        require_same_result(run_dir, tmp_path / "whole")
        shutil.rmtree(run_dir)
    print(f"30 runs of {processes} processes, {duration:.1f} s each, killed and resumed; {attempts - 30} were too fast")
