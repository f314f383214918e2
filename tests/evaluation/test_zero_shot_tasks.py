"""Tasks of lm-eval over local files: what is read, and what is wrong with it."""

import re

import pytest
from small_scorer import DATA

from nt_hf.evaluation.zero_shot_tasks import Tasks


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: accepted is an object with goal, sol1, sol2, label"),
        ('{"goal": "a", "sol1": "b", "sol2": "c"}', "line 2: field 'label' is missing; accepted is int"),
        ('{"goal": "a", "sol1": 7, "sol2": "c", "label": 1}', "line 2: field 'sol1' is 7; accepted is str"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    first = (DATA / "piqa_validation.jsonl").read_text().splitlines()[0]
    path = tmp_path / "piqa_validation.jsonl"
    path.write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, {problem}")):
        Tasks(tmp_path).load("piqa")
    assert len(Tasks(tmp_path).load("piqa", limit=1).eval_docs) == 1


def test_files_that_cannot_be_read_are_named(tmp_path):
    for content, problem in ((b"", "holds no items of piqa"), (b"no gzip", "cannot be read")):
        path = tmp_path / "piqa_validation.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}: {problem}")):
            Tasks(tmp_path).load("piqa")
    with pytest.raises(ValueError, match=r"'boolq'.* has no boolq_superglue_validation\.jsonl or \.jsonl\.gz"):
        Tasks(tmp_path).load("boolq")
    with pytest.raises(ValueError, match=r"lambada.*accepted is boolq, piqa"):
        Tasks(tmp_path).load("lambada_openai")


def test_a_hub_out_of_reach_is_named(monkeypatch):
    def fails(**_):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(ValueError) as error:
        Tasks().load("piqa")
    problem = "task='piqa': its data cannot be read (ConnectionError: no network)"
    assert str(error.value) == f"{problem}; data_root reads local files instead of the hub"


@pytest.mark.slow
def test_any_task_of_lm_eval_is_known_and_no_other():
    tasks = Tasks()
    assert tasks.leaves("lambada_openai") == ["lambada_openai"] and len(tasks.leaves("mmlu")) == 57
    with pytest.raises(ValueError, match=r"^task=.no_such_task.: accepted is boolq, .*lm_eval ls tasks. lists$"):
        tasks.leaves("no_such_task")
