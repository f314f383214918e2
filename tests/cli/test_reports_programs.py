"""What first users met in the programs that compare and report; each test names its entry of the list of reports."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from byte_tokenizer import byte_tokenizer
from conftest import script
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from recipe_runs import call
from test_comparison import report
from test_suite import TINY

from experiments.suite import load_suite, main_runs, read_result, tuning_runs
from nt_hf.cli import compare, zero_shot
from nt_hf.cli import report as report_program
from nt_hf.evaluation.comparison import read_columns
from nt_hf.evaluation.zero_shot_tasks import Tasks
from nt_hf.training import report as run_report
from nt_hf.training.metrics import Metrics, read_metrics

runner = script("experiments/run.py")


@pytest.fixture
def tiny(tmp_path):
    """Calls experiments/run.py on a small suite of which nothing is run yet."""
    (tmp_path / "tiny.yaml").write_text(TINY)

    def run(*arguments: object, data_root: str = "sample:validation") -> None:
        places = ("--runs", tmp_path / "runs", "--results", tmp_path / "results")
        call(runner.main, "--suite", tmp_path / "tiny.yaml", "--data_root", data_root, *places, *arguments)

    return run


# ----------------------------------------------------------------------------------------------- experiments/run.py


def test_globs_that_fit_no_run_are_refused_with_the_arms(tiny, tmp_path):
    """D6: --only that matches nothing ended with exit code 0."""
    with pytest.raises(ValueError, match=r"--only runs/singel/\*: fits no run") as error:
        tiny("--only", "runs/single/*", "runs/singel/*")
    assert "of the arms single, neurotrails, longer" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_runs_whose_learning_rate_is_not_known_are_named(tiny, monkeypatch):
    """D6, its kind: runs that --only names were left out without a word."""
    monkeypatch.setattr(runner, "Programs", lambda: None)
    monkeypatch.setattr(runner, "prepare", lambda *_: None)
    with pytest.raises(ValueError, match=r"runs/longer/seed-0 has no learning rate.* 'tuning/neurotrails/\*'"):
        tiny("--only", "runs/longer/*")


def test_the_list_shows_the_runs_that_only_names(tiny, capsys):
    """D6, its kind: an option that was ignored."""
    tiny("--list", "--only", "tuning/single/*")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tuning/single/lr-0.001", "tuning/single/lr-0.01"]


@pytest.mark.parametrize("option", ["--runs", "--results", "--document", "texts", "zero_shot"])
def test_what_a_suite_needs_is_looked_for_before_anything_is_trained(option, tiny, tmp_path, monkeypatch):
    """D1"""
    monkeypatch.setattr(runner, "prepare", lambda *_: pytest.fail("the work has begun"))
    if option == "texts":
        with pytest.raises(ValueError, match=r"^evaluation\.texts\.text: .*none.jsonl: no such file"):
            tiny(data_root=tmp_path / "none.jsonl")
    elif option == "zero_shot":
        content = yaml.safe_load(TINY)
        content["evaluation"]["zero_shot"] = str(tmp_path / "none")
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        with pytest.raises(ValueError, match=r"evaluation\.zero_shot=.*none: accepted is a directory"):
            tiny()
    else:
        path = tmp_path / ("tiny.yaml" if option != "--document" else "none.md")
        with pytest.raises(ValueError, match=f"{option} {path}: "):
            tiny(option, path)


def test_tables_are_printed_before_they_are_written(tiny, monkeypatch, capsys):
    """D1"""

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(runner, "write_report", full)
    with pytest.raises(OSError, match="no space left"):
        tiny("--report")
    assert "0 of 5 runs are finished" in capsys.readouterr().out


def test_a_result_with_nan_is_refused(tmp_path):
    """D2: the smallest of some losses and a NaN is whatever comes first."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    suite = load_suite(tmp_path / "tiny.yaml")
    for run in (tuning_runs(suite)[0], main_runs(suite, {"single": 0.1})[0]):
        path = tmp_path / run.name / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text('{"validation": {"loss": NaN}}')
        with pytest.raises(ValueError, match=r"result.json: not JSON \(NaN is no number of JSON\)"):
            read_result(tmp_path, suite, run)


# --------------------------------------------------------------------------------------------------- evaluate compare


def test_result_files_of_equal_names_are_told_apart_by_their_folders(tmp_path, monkeypatch, capsys):
    """D6: comparing a/x.json b/x.json was refused."""
    content = json.dumps(report({"ensemble": 1, "head 0": 2}, {"piqa": 40}))
    paths = [tmp_path / name for name in ("a/v1/x.json", "b/v1/x.json", "a/v2/x.json")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text(content)
    names = [column.name for column in read_columns([*map(str, paths)])]
    assert names == ["a/v1/x: ensemble", "b/v1/x: ensemble", "a/v2/x: ensemble"]
    assert [c.name for c in read_columns([str(paths[0]), str(paths[2])])] == ["v1/x: ensemble", "v2/x: ensemble"]
    monkeypatch.chdir(tmp_path / "a" / "v1")
    assert [c.name for c in read_columns(["x.json", "../v2/x.json"])] == ["v1/x: ensemble", "v2/x: ensemble"]
    both = read_columns([f"{paths[0]}:head 0", str(paths[0])])  # of one file two scorers
    assert [column.name for column in both] == ["x: head 0", "x: ensemble"]
    call(compare.main, paths[0], paths[1], "--output", tmp_path / "out")
    assert "| a/v1/x: ensemble" in capsys.readouterr().out


def test_a_comparison_is_printed_before_it_is_written_and_no_file_is_its_output(tmp_path, monkeypatch, capsys):
    """D1"""
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for seed, path in enumerate(paths):
        path.write_text(json.dumps(report({"ensemble": seed}, {"piqa": 40})))
    with pytest.raises(ValueError, match=f"--output {paths[0]}: is no directory"):
        call(compare.main, *paths, "--output", paths[0])

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(compare, "write_atomic", full)
    with pytest.raises(OSError, match="no space left"):
        call(compare.main, *paths, "--output", tmp_path / "out")
    assert "| piqa" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- evaluate zero-shot


def test_spaces_between_tasks_do_not_matter(tmp_path, monkeypatch):
    """D6: --tasks "piqa, boolq" knew no task ' boolq'."""
    asked = []
    for name in ("load_config", "choose_scorers", "load_tokenizer"):
        monkeypatch.setattr(zero_shot, name, lambda *_: type("Any", (), {"vocab_size": 1}))
    monkeypatch.setattr(zero_shot, "check_vocabulary", lambda *_: None)

    def stop(_, names):
        asked.extend(names)
        raise KeyboardInterrupt

    monkeypatch.setattr(Tasks, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        call(zero_shot.main, "--model", "any", "--tasks", "piqa, boolq ,arc_easy", "--output", tmp_path / "scores.json")
    assert asked == ["piqa", "boolq", "arc_easy"]


def test_names_that_lm_eval_does_not_have_are_told_without_reading_all_of_its_tasks(monkeypatch):
    """D6"""
    from nt_hf.evaluation import zero_shot_tasks

    tasks = Tasks()
    monkeypatch.setattr(zero_shot_tasks, "TaskManager", lambda **_: pytest.fail("all of lm-eval was read"))
    tasks.check(["piqa", "boolq", "mmlu", "lambada_openai", "gsm8k"])  # the last two are in none of the usual folders
    for unknown in ("no_such_task", "boolqq", ""):
        with pytest.raises(ValueError, match=f"task='{unknown}': accepted is boolq, piqa"):
            tasks.check(["piqa", "gsm8k", unknown])


def test_generation_tasks_of_lm_eval_need_fewer_tokens_than_the_trained_length(model):
    """D4: docs/evaluate.md names the option; without it lm-eval asks for 256 tokens."""
    lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), backend="causal", batch_size=2)

    def generate(**options) -> list[str]:
        arguments = [(prompt, {"until": ["\n"], **options}) for prompt in ("The best way", "You can" * 30)]
        each = [Instance("generate_until", {}, pair, 0) for pair in arguments]
        return lm.generate_until(each, disable_tqdm=True)

    with pytest.raises(AssertionError, match=r"\(256\) must be less than model's maximum sequence length \(128\)"):
        generate()
    assert [0 < len(text) <= 32 for text in generate(max_gen_toks=32)] == [True, True]


# ------------------------------------------------------------------------------------------------ metrics and report

EVAL = {
    "step": 2, "loss": 1.0, "head_losses": [1.0], "head_perplexities": [2.7], "ensemble_mode": "logits",
    "ensemble_perplexities": {"logits": 2.7}, "disagreement": 0.0, "density": 1.0,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path) -> Path:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write("train", step=1, loss=1.5)
    metrics.write("eval", **EVAL)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1, 2]", "line 3: accepted is a JSON object with event and step, not '[1, 2]'"),
        ("oops", "line 3: accepted is a JSON object with event and step, not 'oops'"),
        ('{"event": "eval"}', "line 3: accepted is a JSON object with event and step"),
        ('{"step": 3}', "line 3: accepted is a JSON object with event and step"),
        ("", "line 3: accepted is a JSON object with event and step, not ''"),
        ('{"event": "train", "step": 3}', "line 3: a record of train lacks loss"),
        ('{"event": "eval", "step": 3, "loss": 1}', "line 3: a record of eval lacks head_losses"),
    ],
)
def test_odd_lines_of_the_metrics_are_named(run_dir, line, problem):
    """D6"""
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(line + "\n" + '{"event": "train", "step": 4, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=re.escape(f"{run_dir / 'metrics.jsonl'}, {problem}")) as error:
        run_report.write_report(run_dir)
    assert "\n" not in str(error.value) and not (run_dir / "report").exists()


@pytest.mark.parametrize("end", [b'{"event": "tr', b'{"event": "train", "text": "\xc3'])
def test_a_last_line_that_a_killed_run_left_is_dropped_with_a_warning(run_dir, caplog, end):
    """D6: what worked goes on working."""
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(end)
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"{run_dir / 'metrics.jsonl'}: dropped an unfinished line"
    ]


def test_the_report_of_a_run_is_a_program_of_its_own(run_dir, capsys):
    report_program.main([str(run_dir)])
    printed = capsys.readouterr().out
    assert "| perplexity of head 0" in printed and str(run_dir / "report" / "training.png") in printed
    assert (run_dir / "report" / "results.md").read_text().strip() in printed
    with pytest.raises(ValueError, match=r"none: has no metrics\.jsonl; accepted is the directory of a run"):
        report_program.main([str(run_dir / "none")])


def test_no_plots_are_promised_without_matplotlib(run_dir, monkeypatch, caplog):
    """D6"""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, files = run_report.write_report(run_dir)
    assert files == [run_dir / "report" / "results.md"] and files[0].is_file()
    assert "no plots: matplotlib is not installed" in caplog.text
    monkeypatch.undo()
    _, files = run_report.write_report(run_dir)
    assert [path.name for path in files] == ["results.md", "training.png"] and files[1].is_file()
