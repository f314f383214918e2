"""Faults that users of neighbouring projects reported, tried here: configuration, processes, files, learning rate.

Each test names the entry of the list of reports that it is for.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import SERVER, finish, wait_for
from recipe_runs import call, of, start, train
from safetensors import SafetensorError

from experiments.suite import load_suite
from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.cli import prepare, tokenizer
from nt_hf.cli.program import run as run_program
from nt_hf.cli.train import main
from nt_hf.config import TrainConfig, load_run_config, parse_overrides
from nt_hf.data.sources import read_texts
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import load_tokenizer, tokenize
from nt_hf.files import LockedError, lock_directory, write_atomic
from nt_hf.training.batches import limited
from nt_hf.training.launch import start_processes
from nt_hf.training.manifest import find_checkpoints, find_damage
from nt_hf.training.optimizer import learning_rate
from nt_hf.training.signals import EXIT_PREEMPTED
from nt_hf.yaml_values import read_yaml

ROOT = Path(__file__).parents[2]


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {max_steps: 3}\nmodel: {}\ntrain: {seed: 1}\n", "line 3: the key train is given twice, first in"),
        ("train:\n  batch_size: 4\n  seed: 0\n  'batch_size': 512\n", "line 4: the key batch_size is given"),
        ("model:\n  rope_parameters:\n    rope_theta: 1.0\n    rope_theta: 2.0\n", "line 4: the key rope_theta is"),
    ],
)  # fmt: skip
def test_keys_given_twice_are_refused(tmp_path, text, message):
    """C5"""
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    for read in (read_yaml, lambda path: load_run_config([path]), load_suite):
        with pytest.raises(ValueError) as caught:
            read(path)
        assert one_line(caught).startswith(f"{path}, {message}")
    with pytest.raises(ValueError, match=r"^--train.learning_rate_factors: line 1: the key a is given twice"):
        load_run_config([], {"train.learning_rate_factors": "{a: 1, a: 2}"})


def test_merged_keys_may_be_given_again(tmp_path):
    """C5: what YAML lets a mapping take over from another is not given twice."""
    path = tmp_path / "merged.yaml"
    path.write_text("data: &d {text_field: a, packing: pad}\nsparsity: {seed: 3}\n")
    assert read_yaml(path)[0]["data"] == {"text_field": "a", "packing": "pad"}
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n")
    assert read_yaml(path)[0]["c"] == {"x": 3, "y": 4}


def test_bare_words_of_a_text_are_text(tmp_path):
    """E1"""
    path = tmp_path / "words.yaml"
    path.write_text("data: {text_field: on, train: [no, 2015-01-01, 'yes'], tokenizer: 0123}\ntrain: {compile: yes}\n")
    config = load_run_config([path], {"data.validation": "off"})
    data = config.data
    assert (data.text_field, data.train, data.tokenizer) == ("on", ["no", "2015-01-01", "yes"], "0123")
    assert data.validation == "off" and config.train.compile is True
    path.write_text("train: {precision: no}")
    for sources, overrides in (([path], {}), ([], {"train.precision": "no"})):
        with pytest.raises(ValueError) as caught:
            load_run_config(sources, overrides)
        assert one_line(caught) == "train.precision='no': accepted is auto, fp32, bf16"
    with pytest.raises(ValueError, match=r"^data.tokenizer=None: accepted is text$"):
        load_run_config([], {"data.tokenizer": "null"})


def test_numbers_count_wherever_one_is_expected():
    """D6"""
    config = load_run_config([], {
        "train.learning_rate": "1e-3", "train.learning_rate_factors": "{'*': 1e-1}", "train.betas": "[9e-1, 0.95]",
        "train.max_steps": "1e4", "sparsity.densities": "{'lm_heads.*': 5e-1}",
    })  # fmt: skip
    assert config.train.learning_rate_factors == {"*": 0.1} and config.train.betas == [0.9, 0.95]
    assert config.train.max_steps == 10_000 and type(config.train.max_steps) is int
    assert config.sparsity.densities == {"lm_heads.*": 0.5}
    for key, value in (("learning_rate", ".inf"), ("learning_rate", "nan"), ("max_grad_norm", "1e999")):
        with pytest.raises(ValueError, match=rf"^train.{key}=.*: accepted is a finite number"):
            load_run_config([], {f"train.{key}": value})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.seed": "-1"}, "train.seed=-1: accepted is a whole number from 0 to 4294967295"),
        ({"train.seed": "abc"}, "train.seed='abc': accepted is a whole number"),
        ({"train.betas": "[0.9, x]"}, "train.betas[1]='x': accepted is a finite number"),
    ],
)
def test_messages_name_the_key(overrides, message):
    """D6"""
    with pytest.raises(ValueError) as caught:
        load_run_config([], overrides)
    assert one_line(caught) == message


def test_a_switch_without_a_value_is_named():
    """D6"""
    with pytest.raises(ValueError, match=r"^--train.gradient_checkpointing: has no value; accepted is .* true"):
        parse_overrides(["--train.gradient_checkpointing", "--train.max_steps", "3"])
    assert parse_overrides(["--a.b", "-1", "--a.c=--x", "--a.d="]) == {"a.b": "-1", "a.c": "--x", "a.d": ""}


def test_yaml_that_is_no_utf8_is_named(tmp_path):
    """D6"""
    path = tmp_path / "latin.yaml"
    path.write_bytes("data: {text_field: caf\xe9}".encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        load_run_config([path])
    assert one_line(caught) == f"{path}: not UTF-8 (byte 0xe9 at 22)"


def test_the_base_of_rope_can_be_set(config, tmp_path):
    """C4: and a run with scaled RoPE continues, whose parameters Transformers completes."""
    rope = ("--model.rope_parameters", "{rope_type: yarn, factor: 4, rope_theta: 5e5}", "--train.max_steps", 2)
    train(config, tmp_path / "run", *rope, "--train.save_steps", 1)
    model = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    found = model.config.rope_parameters
    assert (found["rope_theta"], found["factor"], found["original_max_position_embeddings"]) == (500000.0, 4.0, 32)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert of(train(config, tmp_path / "run", *rope), "train", "step") == [(1,), (2,)]
    default = {"model.rope_parameters": "{rope_type: default, rope_theta: 500000.0}"}
    assert load_run_config([], default).model["rope_parameters"]["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ("{rope_type: default, rope_tetha: 1.0}", "unknown key model.rope_parameters.rope_tetha: did you mean"),
        ("{rope_type: other}", "model.rope_parameters.rope_type='other': accepted is default, "),
        ("{rope_theta: 0}", "model.rope_parameters.rope_theta=0.0: accepted is a number above 0"),
        ("{rope_type: linear}", "model.rope_parameters={'rope_type': 'linear'}: accepted with linear is one with"),
        ("5", "model.rope_parameters=5: accepted is a mapping or null"),
    ],
)  # fmt: skip
def test_wrong_parameters_of_rope_are_named(rope, message):
    """C4"""
    with pytest.raises(ValueError) as caught:
        load_run_config([], {"model.rope_parameters": rope})
    assert one_line(caught).startswith(message)


# ------------------------------------------------------------------------------------------------ learning rate


def test_a_run_in_its_stable_phase_can_be_extended_at_the_same_rate():
    """C9"""
    kinds = {"lr_schedule": "warmup_stable_decay", "decay_ratio": 0.2, "learning_rate": 1.0, "min_lr_ratio": 0.1}
    short, long = (TrainConfig(**kinds, max_steps=steps) for steps in (100, 200))
    assert [learning_rate(step, short) for step in (0, 9, 10, 79, 80)] == [0.1, 1.0, 1.0, 1.0, 1.0]
    assert learning_rate(90, short) == pytest.approx(0.55) and learning_rate(100, short) == pytest.approx(0.1)
    assert [learning_rate(step, long) for step in (79, 100, 160)] == [1.0] * 3
    cosine = TrainConfig(learning_rate=1.0, max_steps=100)
    assert learning_rate(55, cosine) == pytest.approx(0.55) and learning_rate(100, cosine) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"^train.lr_schedule='wsd': accepted is cosine, warmup_stable_decay, step$"):
        load_run_config([], {"train.lr_schedule": "wsd"})
    with pytest.raises(ValueError, match=r"^train.decay_ratio=0.95: accepted is a share of the run above 0, up to"):
        load_run_config([], {"train.lr_schedule": "warmup_stable_decay", "train.decay_ratio": "0.95"})


def test_a_change_says_what_it_does_to_the_learning_rate(config, tmp_path, caplog):
    """C9"""
    train(config, tmp_path / "run")
    longer = ("--train.max_steps", 24, "--resume_override")
    with caplog.at_level("INFO", "nt_hf"):
        records = train(config, tmp_path / "run", *longer)
    assert "the learning rate of the next step is 0.00689; without the changes it would be 0.001" in caplog.messages
    assert dict(of(records, "train", "step", "lr"))[13] == pytest.approx(0.00689, abs=5e-6)


# ---------------------------------------------------------------------------------------- continuing, validation


def test_an_error_recommends_only_what_helps(config, tmp_path):
    """C8"""
    train(config, tmp_path / "run", "--train.max_steps", 6)
    steps, override = ("--train.max_steps", 6), "--resume_override continues all the same"
    shutil.copy(config.parent / "train.jsonl", tmp_path / "train.jsonl")
    moved = ("--data.train", tmp_path / "train.jsonl")  # the same file elsewhere: it would help
    for changes in (moved, ("--train.learning_rate", 0.5), ("--data.num_workers", 1)):
        with pytest.raises(ValueError, match=override):
            train(config, tmp_path / "run", *steps, *changes)
    other = ("--data.train", config.parent / "validation.jsonl")
    for changes in (other, ("--data.packing", "pad"), ("--data.shuffle_block", 7, "--train.learning_rate", 0.5)):
        with pytest.raises(ValueError, match=r"cannot continue so \(data state: was saved with") as caught:
            train(config, tmp_path / "run", *steps, *changes)
        assert "resume_override" not in one_line(caught)
    train(config, tmp_path / "run", *steps, *moved, "--resume_override")


def test_the_validated_text_does_not_depend_on_the_micro_batch(config, tmp_path):
    """D6"""
    found = [
        of(train(config, tmp_path / str(size), "--train.micro_batch_size", size, "--train.max_steps", 1), "eval",
           "tokens", "perplexity")[0]
        for size in (1, 2, 4)
    ]  # fmt: skip
    assert {tokens for tokens, _ in found} == {5 * 4 * 31}  # whole steps of 4 rows, of which 500 tokens fill 5
    for _, value in found:
        assert value == pytest.approx(found[0][1], rel=1e-5)
    batch = {"labels": torch.zeros(1, 5, dtype=torch.long)}
    assert [len(list(limited([batch] * 9, 9, stop=lambda: False, multiple=n))) for n in (1, 2, 4)] == [3, 4, 4]


# ----------------------------------------------------------------------------------------------- signals, workers


@pytest.mark.slow
def test_signals_to_all_processes_leave_the_loader_alive(config, tmp_path):
    """C2, E4: as `timeout` and launchers send them."""
    run_dir = tmp_path / "run"
    endless = ("--train.max_steps", "100000", "--train.eval_steps", "100000", "--train.save_steps", "100000")
    command = [sys.executable, str(ROOT / "recipes" / "pretrain_c4.py"), "--config", str(config), *endless]
    process = subprocess.Popen(
        [*command, "--output_dir", str(run_dir), "--data.num_workers", "2"], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "true"}, start_new_session=True,
    )  # fmt: skip
    wait_for(run_dir / "metrics.jsonl", '"step": 4')
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_PREEMPTED, errors
    assert "Traceback" not in errors and "the same command continues from" in errors
    (checkpoint,) = find_checkpoints(run_dir)
    assert not find_damage(checkpoint)


def test_a_dead_loader_worker_is_one_line(config, tmp_path, capsys, monkeypatch):
    """C2"""
    worker_init, arguments = training_killer, ["--config", config, "--output_dir", tmp_path / "run"]
    monkeypatch.setattr("nt_hf.data.streams._leave_signals_to_parent", worker_init)
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: call(main, *arguments, "--data.num_workers", 1))
    message = str(caught.value)
    assert message.startswith("error: DataLoader worker (pid") and message.endswith("fewer data.num_workers need less")
    assert "\n" not in message


def training_killer(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_do_not_wait_for_threads_that_forking_lost(config, monkeypatch):
    """C3: the tokenizer's threads have run in the main process by then."""

    def waited(*_):
        pytest.fail("the worker waits for threads that it does not have")

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    text, tokenizer = str(config.parent / "train.jsonl"), load_tokenizer(str(config.parent / "tokenizer"))
    tokenize(list(read_texts(text)) * 10, tokenizer)
    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(60)
    try:
        batches = TokenBatches(text, tokenizer, batch_size=2, sequence_length=32, num_workers=1)
        assert next(iter(batches))["input_ids"].shape == (2, 32)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -------------------------------------------------------------------------------------------------- files, locks


def full(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_text(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "error", "name"),
    [
        ("nt_hf.training.checkpoint.save_file", full, r"training_state/state-00001-of-00001.safetensors"),
        ("transformers.modeling_utils.safe_save_file", full, r"model.safetensors"),
        ("pathlib.Path.write_text", full_text, r"config.json"),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(config, tmp_path, monkeypatch, where, error, name):
    """C6"""
    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(where, error)
        train(config, tmp_path / "run", "--train.max_steps", 3)
    message = one_line(caught)
    assert (
        message.startswith(f"{tmp_path}/run/.partial-checkpoint-3/{name}: cannot be written (")
        and "No space" in message
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.yaml", "metrics.jsonl"}


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, monkeypatch):
    """C6"""
    path = tmp_path / "run.yaml"
    write_atomic(path, "old")
    monkeypatch.setattr("nt_hf.files.os.fsync", full_text)
    with pytest.raises(OSError) as caught:
        write_atomic(path, "new")
    assert one_line(caught) == f"{path}: cannot be written (No space left on device)"
    assert [each.name for each in tmp_path.iterdir()] == ["run.yaml"] and path.read_text() == "old"


def test_two_runs_in_one_directory_exclude_each_other(config, tmp_path):
    """C7"""
    run_dir = tmp_path / "run"
    holder = SERVER.Process(target=_hold, args=(run_dir, tmp_path / "held"), daemon=True)
    holder.start()
    wait_for(tmp_path / "held", "held")
    with pytest.raises(LockedError) as caught:
        train(config, run_dir)
    assert one_line(caught).startswith(f"{run_dir}: another process writes there; ")
    assert not list(run_dir.iterdir())
    holder.kill()  # the kernel frees what it held
    finish([holder])
    train(config, run_dir, "--train.max_steps", 1)


def _hold(directory: Path, ready: Path) -> None:
    with lock_directory(directory):
        if not os.fork():  # as a loader's worker, which outlives a killed run by seconds
            time.sleep(600)
        ready.write_text("held")
        time.sleep(600)


def test_all_processes_learn_that_the_directory_is_taken(config, tmp_path):
    """C7"""
    with lock_directory(tmp_path / "run"):
        started = start(2, "--config", config, "--output_dir", tmp_path / "run")
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [1, 1]
        assert not list((tmp_path / "run").iterdir())
    assert not (tmp_path / "run").exists()


def test_preparing_and_tokenizers_exclude_each_other(tmp_path):
    """C7"""
    with lock_directory(tmp_path / "there"):
        for main in (prepare.main, tokenizer.main):
            with pytest.raises(LockedError, match="there: another process writes there"):
                call(main, "--data", "sample:validation", "--output", tmp_path / "there")


# ---------------------------------------------------------------------------------------------------- launchers


@pytest.mark.slow
def test_several_processes_without_a_gpu(config, tmp_path):
    """C10: torchrun sets no ACCELERATE_USE_CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    recipe = ["recipes/pretrain_c4.py", "--config", config, "--output_dir", tmp_path / "run", "--train.max_steps", "3"]
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        list(map(str, command + recipe)), cwd=ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 processes (DDP)" in result.stderr
    state = tmp_path / "run" / "checkpoint-3" / "training_state"
    assert len(list(state.glob("rank-*.json"))) == 2


def test_a_launcher_that_started_one_process_of_several_is_refused(config, tmp_path, monkeypatch):
    """C10: what `accelerate launch --cpu --num_processes 2` leaves in the environment."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"asked for several processes and started one.*torchrun --nproc_per_node N"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_world_that_is_not_there_is_refused(tmp_path, monkeypatch):
    """C10"""
    monkeypatch.setenv("WORLD_SIZE", "2")

    class Alone:
        num_processes, distributed_type = 1, "NO"

    monkeypatch.setattr("nt_hf.training.launch.Accelerator", lambda **_: Alone())
    with pytest.raises(ValueError, match=r"^WORLD_SIZE=2: the launcher started 1 process"):
        start_processes(TrainConfig(), tmp_path, "none")


# ------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(
    ("own", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
@pytest.mark.parametrize("program", ["pretrain_c4", "prepare_c4", "train_tokenizer"])
def test_programs_say_how_threads_wait_before_torch_is_loaded(own, expected, program):
    """E3: by an import hook, which looks when torch is asked for first."""
    code = f"""
import os, runpy, sys
class Hook:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)
sys.meta_path.insert(0, Hook())
sys.argv[1:] = ["--help"]
runpy.run_path({str(ROOT / "recipes" / program) + ".py"!r}, run_name="__main__")
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)} | own, capture_output=True, text=True
    )
    assert result.stdout.strip() == expected, result.stderr
