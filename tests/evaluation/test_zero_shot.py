"""Zero-shot scores: the real `lm_eval` command, eval/zero_shot.py, and a small scorer must agree."""

import copy
import functools
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import hub_server
import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from recipe_runs import call, train, write_text
from small_scorer import DATA, FILES, SCORERS, by_hand, choices, items
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.cli import zero_shot as program
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.evaluation.zero_shot import (
    Scorer,
    TrailsLM,
    average,
    choose_scorers,
    combine_tasks,
    log_likelihoods,
    score_task,
)
from nt_hf.evaluation.zero_shot_tasks import DEFAULT_TASKS, Tasks

ROOT = Path(__file__).parents[2]
LENGTH = 192  # of the model: some of the prompts are longer
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


# ------------------------------------------------------------------------------------------------- the checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of the recipe with T5's vocabulary; large weights make its predictions differ by token."""
    directory = tmp_path_factory.mktemp("zero-shot")
    config = """
model: {vocab_size: 32000, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
        blocks_in_head: 1, initializer_range: 0.3}
data: {train: TEXT, validation: TEXT, tokenizer: sample, sequence_length: 192, validation_tokens: 300}
sparsity: {density: 0.5, distribution: uniform, exclude: ["model.embed_tokens.*"]}
train: {max_steps: 1, batch_size: 1, learning_rate: 1.0e-3, eval_steps: 1, save_steps: 1}
"""
    text = write_text(directory / "text.jsonl")
    (directory / "config.yaml").write_text(config.replace("TEXT", str(text)))
    train(directory / "config.yaml", directory / "run")
    return directory / "run" / "checkpoint-1"


@pytest.fixture(scope="module")
def model(checkpoint) -> NeuroTrailsLlamaForCausalLM:
    return NeuroTrailsLlamaForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(str(checkpoint))


@pytest.fixture(scope="module")
def expected(model, tokenizer) -> dict[str, dict]:
    """What the small scorer finds for every task, by ensemble mode."""
    found = {}
    for mode in ("probs", "logits"):
        model.config.ensemble_mode = mode
        found[mode] = {task: by_hand(model, tokenizer, task) for task in FILES}
    return found


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return Tasks(DATA)


# ----------------------------------------------------------------------------------------------- lm_eval --model hf


@pytest.fixture(scope="module")
def harness(checkpoint, tmp_path_factory) -> Path:
    """What `lm_eval --model hf` writes about the checkpoint in a process that cannot import this package."""
    directory = tmp_path_factory.mktemp("lm-eval")
    (directory / "blocked").mkdir()
    (directory / "blocked" / "nt_hf.py").write_text("raise ImportError('nt_hf is not installed here')\n")
    local = []
    for task, file in FILES.items():
        path = str(DATA / f"{file}.jsonl")
        files = dict.fromkeys(("train", "validation", "test"), path)
        local.append(
            {"task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        )
    (directory / "local.yaml").write_text(yaml.safe_dump({"group": "local", "task": local}))
    arguments = f"pretrained={checkpoint},trust_remote_code=True"
    command = [Path(sys.executable).parent / "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "local"]
    command += ["--include_path", directory, "--batch_size", "4", "--device", "cpu", "--log_samples"]
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(directory / "blocked"), "HF_HOME": str(directory / "home")}
    done = subprocess.run(
        [*command, "--output_path", directory / "out"], env=environment, cwd=directory, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "out"


# Slow: test_scores_are_those_of_lm_eval has the same in this process.
@pytest.mark.slow
@pytest.mark.parametrize("task", FILES)
def test_lm_eval_scores_a_checkpoint_as_a_hand_computed_likelihood_does(harness, expected, task):
    (path,) = harness.rglob(f"samples_{task}_*.jsonl")
    expected = expected["logits"][task]["ensemble"]
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert len(samples) == 8
    for number, sample in enumerate(samples):
        likelihoods = [float(answer[0][0]) for answer in sample["resps"]]
        assert likelihoods == pytest.approx(expected["likelihoods"][number], abs=1e-4, rel=2e-6)
        for metric in set(sample) & {"acc", "acc_norm"}:
            assert sample[metric] == expected[metric][number]


def test_lm_eval_scores_are_the_same_for_any_batch_size(checkpoint, tokenizer, tasks):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    found = []
    for size in (1, 8):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        assert lm.max_length == LENGTH and lm.prefix_token_id == tokenizer.eos_token_id
        samples = lm_eval.evaluate(lm, {"tasks": {"piqa": tasks.load("piqa")}, "groups": {}})["samples"]["piqa"]
        found.append([answer[0][0] for sample in samples for answer in sample["resps"]])
    assert found[0] == pytest.approx(found[1], abs=1e-4, rel=0)


def test_no_token_is_added_or_lost(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer=tokenizer)
    context, answer = lm._encode_pair("Question: why?\nAnswer:", " because it is so")
    assert tokenizer.eos_token_id not in [*context, *answer]
    assert tokenizer.decode(context) == "Question: why? Answer:" and tokenizer.decode(answer) == "because it is so"
    assert tokenizer.model_max_length == LENGTH


# ---------------------------------------------------------------------------------------- all scorers in one pass


@pytest.fixture(scope="module", params=["logits", "probs"])
def scored(request, model, tokenizer, tasks):
    """Results of every task by the ensemble and each trail, and the model in that ensemble mode."""
    model.config.ensemble_mode = request.param
    lm = TrailsLM(model, tokenizer, choose_scorers(model.config, "each"))
    yield {task: score_task(lm, tasks.load(task)) for task in FILES}, model
    model.config.ensemble_mode = "logits"


def test_the_ensemble_and_each_trail_have_their_own_scores(scored, expected):
    results, model = scored
    for task, scorer in itertools.product(results, SCORERS):
        found = expected[model.config.ensemble_mode][task][scorer]
        for metric, score in results[task].scores[scorer].items():
            assert [float(x) for x in results[task].per_item[scorer][metric]] == found[metric]
            assert score.value == pytest.approx(sum(found[metric]) / 8)
            assert score.stderr == pytest.approx(torch.tensor(found[metric]).std().item() / 8**0.5)


def test_the_scorers_and_modes_differ_at_all(expected):
    tables = [str(expected[mode]["piqa"][scorer]["likelihoods"]) for mode in expected for scorer in SCORERS]
    assert len(set(tables)) == 5  # the trails are the same in both modes


def test_scores_are_those_of_lm_eval(scored, tokenizer, tasks):
    results, model = scored
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    for task in ("boolq", "hellaswag"):
        theirs = lm_eval.evaluate(lm, {"tasks": {task: tasks.load(task)}, "groups": {}})["results"][task]
        for metric, score in results[task].scores["ensemble"].items():
            assert (score.value, score.stderr) == (theirs[f"{metric},none"], theirs[f"{metric}_stderr,none"])


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_likelihoods_do_not_depend_on_the_batch(model, batch_size):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 32000, (n,), generator=generator).tolist()  # noqa: E731
    context = draw(9)
    requests = [(context, [5]), (context, [6]), (context, [5, 7]), (draw(1), draw(4)), (draw(330), draw(3))]
    scorers = choose_scorers(model.config, "0,2")
    assert [(scorer.name, scorer.heads) for scorer in scorers] == [
        ("ensemble 0,2", (0, 2)),
        ("head 0", (0,)),
        ("head 2", (2,)),
    ]
    found = log_likelihoods(model, requests, scorers, batch_size=batch_size)
    for scorer in scorers:
        for (context, answer), (value, greedy) in zip(requests, found[scorer.name]):
            row = torch.tensor([[*context, *answer][-LENGTH - 1 :]])
            logits = model(row[:, :-1], active_heads=scorer.heads).logits[0].double()
            expected = logits.log_softmax(-1)[-len(answer) :].gather(-1, torch.tensor(answer)[:, None]).sum()
            assert value == pytest.approx(expected.item(), abs=1e-4)
            assert greedy == (logits[-len(answer) :].argmax(-1).tolist() == answer)


def test_contexts_that_lose_their_beginning_are_counted(model, tokenizer, tasks):
    lm = TrailsLM(model, tokenizer, choose_scorers(model.config, "ensemble"))
    lengths = [
        len(tokenizer("".join(pair))["input_ids"]) for item in items("boolq") for pair in choices("boolq", item)[0]
    ]
    assert score_task(lm, tasks.load("boolq")).truncated == sum(length > LENGTH + 1 for length in lengths) > 0
    assert score_task(lm, tasks.load("piqa")).truncated == 0


def test_an_answer_is_greedy_where_each_of_its_tokens_is(model):
    scorer, prompt = Scorer("head 1", (1,)), torch.tensor([[17, 4, 99]])
    answer = model.generate(prompt, max_new_tokens=4, do_sample=False, active_heads=[1], eos_token_id=None)[0, 3:]
    other = [*answer[:-1].tolist(), 3]
    requests = [(prompt[0].tolist(), answer.tolist()), (prompt[0].tolist(), other)]
    assert [greedy for _, greedy in log_likelihoods(model, requests, [scorer])["head 1"]] == [True, False]


def test_heads_outside_the_scorers_are_not_run(model):
    model = copy.deepcopy(model)
    for parameter in model.model.heads[1].parameters():
        parameter.data.fill_(torch.nan)
    found = log_likelihoods(model, [([5, 6], [7])], choose_scorers(model.config, "0,2"))
    assert all(value == value for answers in found.values() for value, _ in answers)


def test_a_batch_that_does_not_fit_into_memory_is_tried_smaller(model, monkeypatch):
    from nt_hf.evaluation import zero_shot

    score, sizes = zero_shot._score, []

    def scarce(model, rows, *rest):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return score(model, rows, *rest)

    requests = [([7, 8, k], [9, 4]) for k in range(5, 14)]
    expected = log_likelihoods(model, requests, choose_scorers(model.config, "each"))
    monkeypatch.setattr(zero_shot, "_score", scarce)
    assert log_likelihoods(model, requests, choose_scorers(model.config, "each")) == {
        name: [(pytest.approx(value, abs=1e-4), greedy) for value, greedy in answers]
        for name, answers in expected.items()
    }
    assert max(sizes) == 9 and sizes[-1] <= 2
    with pytest.raises(torch.OutOfMemoryError):
        log_likelihoods(model, requests, choose_scorers(model.config, "each"), batch_size=3)


# ------------------------------------------------------------------------------------------------ tasks and data


def test_a_group_weighs_its_tasks_as_lm_eval_does(model, tokenizer, tmp_path):
    rows = [
        {"question": f"What is {k} + 1?", "subject": subject, "choices": ["1", "2", "3", "4"], "answer": k % 4}
        for subject, count in (("anatomy", 6), ("virology", 3))
        for k in range(count)
    ]
    (tmp_path / "mmlu_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = Tasks(tmp_path)
    leaves = tasks.leaves("mmlu")
    assert len(leaves) == 57 and tasks.by_size("mmlu") and tasks.by_size("mmlu_stem")
    lm = TrailsLM(model, tokenizer, choose_scorers(model.config, "each"))
    chosen = ["mmlu_anatomy", "mmlu_virology"]
    loaded = {name: tasks.load(name) for name in chosen}
    results = {name: score_task(lm, task) for name, task in loaded.items()}
    assert [result.items for result in results.values()] == [6, 3]
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    for by_size in (True, False):
        group = Group("both", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=by_size)])
        for task in loaded.values():
            group.add(task)
        for scorer, scores in combine_tasks(results, by_size).items():
            parts = {
                name: {
                    "acc,none": result.scores[scorer]["acc"].value,
                    "acc_stderr,none": result.scores[scorer]["acc"].stderr,
                    "sample_len": result.items,
                }
                for name, result in results.items()
            }
            theirs = group.aggregate(parts)
            assert scores["acc"].value == pytest.approx(theirs["acc,none"])
            assert scores["acc"].stderr == pytest.approx(theirs["acc_stderr,none"])


def test_average_is_over_tasks_not_items(scored):
    results, _ = scored
    scores = {task: result.scores for task, result in results.items()}
    values = [of_task["head 1"]["acc"] for of_task in scores.values()]
    mean = average(scores)["head 1"]
    assert mean.value == pytest.approx(sum(score.value for score in values) / len(values))
    assert mean.stderr == pytest.approx(sum(score.stderr**2 for score in values) ** 0.5 / len(values))


def test_unknown_names_are_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"heads='3'.*different numbers of 0 to 2"):
        choose_scorers(model.config, "3")
    for heads in ("0,0", "", "all", "-1"):
        with pytest.raises(ValueError, match="accepted are 'ensemble', 'each'"):
            choose_scorers(model.config, heads)
    with pytest.raises(ValueError, match=r"data_root=.*directory"):
        Tasks(tmp_path / "none")
    with pytest.raises(ValueError, match="an answer of 400 tokens does not fit the model's context of 192"):
        log_likelihoods(model, [([1], [5] * 400)], choose_scorers(model.config, "each"))


# ------------------------------------------------------------------------------------------------------- the script


def zero_shot(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "eval/zero_shot.py", *map(str, arguments)]
    environment = os.environ | (environment or OFFLINE)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_script_scores_what_is_there_and_says_what_is_not(checkpoint, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output = tmp_path / "new" / "scores.json"
    options = ("--data_root", DATA, "--heads", "each", "--limit", 5, "--output", output)
    call(functools.partial(runpy.run_path, str(ROOT / "eval" / "zero_shot.py"), run_name="__main__"),
         "--model", checkpoint, *options)  # fmt: skip
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["complete"] and list(report["results"]) == list(FILES) and not report["failed"]
    assert set(report["skipped"]) == set(DEFAULT_TASKS) - FILES.keys()
    assert report["scorers"] == {"ensemble": [0, 1, 2], "head 0": [0], "head 1": [1], "head 2": [2]}
    for task in FILES:
        counted = report["tasks"][task]
        assert counted["items"] == 5 and counted["requests"] == sum(len(choices(task, x)[0]) for x in items(task)[:5])
        acc = expected["logits"][task]["ensemble"]["acc"][:5]
        assert report["results"][task]["ensemble"]["acc"]["value"] == pytest.approx(sum(acc) / 5)
        assert report["tasks"][task]["per_item"]["ensemble"]["acc"] == "".join(str(int(x)) for x in acc)
    for key in ("versions", "git_commit", "command", "seed", "seconds", "peak_memory_bytes"):
        assert report[key], key
    assert report["model_config"]["num_ensemble_heads"] == 3 and report["ensemble_mode"] == "logits"
    assert printed.count("\n| ") == 11 and "not run: task='openbookqa'" in printed


def test_a_failing_task_leaves_the_others_and_marks_the_file(checkpoint, tmp_path, caplog):
    for name in ("arc_easy_test", "piqa_validation"):
        (tmp_path / f"{name}.jsonl").write_text((DATA / f"{name}.jsonl").read_text())
    with open(tmp_path / "piqa_validation.jsonl", "a") as file:
        file.write("{")
    output = tmp_path / "scores.json"
    with pytest.raises(ValueError, match=r"piqa failed; .* marked as incomplete"):
        options = ("--data_root", tmp_path, "--tasks", "piqa,arc_easy", "--output", output)
        call(program.main, "--model", checkpoint, *options)
    assert "piqa_validation.jsonl, line 9: not JSON" in caplog.text
    report = json.loads(output.read_text())
    assert not report["complete"] and list(report["results"]) == ["arc_easy"] and list(report["failed"]) == ["piqa"]


def test_what_an_interrupted_group_has_reached_stays(checkpoint, tmp_path, monkeypatch):
    rows = [
        {"question": "What is 1 + 1?", "subject": subject, "choices": ["1", "2", "3", "4"], "answer": 1}
        for subject in ("abstract_algebra", "anatomy")
        for _ in range(2)
    ]
    (tmp_path / "mmlu_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scores.json"

    def interrupted(lm, task, limit):
        if task.config.task == "mmlu_anatomy":
            raise KeyboardInterrupt
        return score_task(lm, task, limit)

    monkeypatch.setattr(program, "score_task", interrupted)
    options = ("--model", checkpoint, "--data_root", tmp_path, "--tasks", "mmlu_stem", "--output", output)
    with pytest.raises(KeyboardInterrupt):
        call(program.main, *options)
    report = json.loads(output.read_text())
    assert not report["complete"] and list(report["tasks"]) == ["mmlu_abstract_algebra"] and not report["results"]


def test_a_tag_without_a_score_of_its_own_stands_for_its_tasks(checkpoint, tmp_path, capsys):
    options = ("--model", checkpoint, "--data_root", DATA, "--tasks", "ai2_arc", "--limit", 2)
    call(program.main, *options, "--output", tmp_path / "scores.json")
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["complete"] and list(report["results"]) == ["arc_challenge", "arc_easy"]
    assert "| arc_easy" in capsys.readouterr().out


@pytest.mark.slow
def test_the_hub_gives_what_local_files_give(checkpoint, expected, tmp_path):
    lines = (DATA / "piqa_validation.jsonl").read_bytes()
    output = tmp_path / "scores.json"
    with hub_server.serve("baber/piqa", {"train.jsonl": lines, "validation.jsonl": lines}) as (endpoint, _):
        home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        done = zero_shot("--model", checkpoint, "--tasks", "piqa", "--output", output, **home)
    assert done.returncode == 0, done.stderr
    right = "".join(str(int(x)) for x in expected["logits"]["piqa"]["ensemble"]["acc"])
    assert json.loads(output.read_text())["tasks"]["piqa"]["per_item"]["ensemble"]["acc"] == right


def test_a_stock_llama_is_scored_as_one_head(tmp_path, model, tokenizer, tasks):
    llama = model.extract_trail(1)
    assert type(llama) is LlamaForCausalLM
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    output = tmp_path / "scores.json"
    arguments = ("--data_root", DATA, "--tasks", "arc_easy", "--heads", "each", "--output", output)
    call(program.main, "--model", tmp_path / "llama", *arguments)
    report = json.loads(output.read_text())
    assert list(report["scorers"]) == ["head 0"]
    lm = TrailsLM(model, tokenizer, choose_scorers(model.config, "1"))
    same = score_task(lm, tasks.load("arc_easy"))
    assert report["tasks"]["arc_easy"]["per_item"]["head 0"] == same.per_item["head 1"]
    assert report["tasks"]["arc_easy"]["fingerprint"] == same.fingerprint


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--tasks", "no_such_task", "task='no_such_task': accepted is boolq, piqa"),
        ("--tasks", "mmlu", "task='mmlu': .* has no mmlu_test.jsonl"),
        ("--heads", "7", "heads='7'"),
        ("--limit", "0", "--limit 0"),
        ("--batch_size", "big", "--batch_size big"),
        ("--model", "nowhere", "nowhere: is no directory"),
        ("--data_root", "eval", "has the data of none of the tasks"),
    ],
)
def test_bad_input_is_one_line(checkpoint, tmp_path, monkeypatch, option, value, problem):
    from nt_hf.evaluation import zero_shot_tasks

    small = zero_shot_tasks.TaskManager(include_path=[], include_defaults=False)
    monkeypatch.setattr(zero_shot_tasks, "TaskManager", lambda **given: TaskManager(**given) if given else small)
    options = {"--model": checkpoint, "--data_root": DATA, "--tasks": "arc_easy", "--output": tmp_path / "scores.json"}
    options[option] = value
    if option == "--data_root":
        del options["--tasks"]
    with pytest.raises(ValueError, match=problem) as error:
        call(program.main, *(part for pair in options.items() for part in pair))
    assert "\n" not in str(error.value) and not (tmp_path / "scores.json").exists()
