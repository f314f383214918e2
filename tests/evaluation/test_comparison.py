"""Comparisons of zero-shot results: the paired bootstrap, and what is compared with what."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nt_hf.cli import compare as program
from nt_hf.evaluation.comparison import Column, compare_columns, comparison_table, paired_bootstrap, read_columns


def coins(seed: int, count: int = 300, share: float = 0.5) -> list[float]:
    return (np.random.default_rng(seed).random(count) < share).astype(float).tolist()


def report(seeds: dict[str, int], tasks: dict[str, int], complete: bool = True) -> dict:
    """A result file of scorers that toss coins, with so many items a task."""
    per_item = {
        task: {scorer: {"acc": coins(seed + k, count)} for scorer, seed in seeds.items()}
        for k, (task, count) in enumerate(tasks.items())
    }
    scores = {
        task: {scorer: {"acc": {"value": float(np.mean(m["acc"])), "stderr": 0.03}} for scorer, m in by.items()}
        for task, by in per_item.items()
    }
    text = {
        t: {s: {"acc": "".join(str(int(x)) for x in m["acc"])} for s, m in by.items()} for t, by in per_item.items()
    }
    return {
        "complete": complete,
        "scorers": dict.fromkeys(seeds),
        "results": scores,
        "members": {task: {"tasks": [task], "weights": [count]} for task, count in tasks.items()},
        "tasks": {t: {"items": n, "fingerprint": f"{t} {n}", "per_item": text[t]} for t, n in tasks.items()},
    }


@pytest.fixture
def files(tmp_path):
    def write(**reports) -> list[str]:
        for name, content in reports.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return [str(tmp_path / f"{name}.json") for name in reports]

    return write


# ------------------------------------------------------------------------------------------------- the bootstrap


def test_the_bootstrap_is_that_of_drawing_items_one_by_one():
    ours, theirs = np.array(coins(1)), np.array(coins(2, share=0.4))
    found = paired_bootstrap([(ours, theirs)])
    generator = np.random.default_rng(5)
    drawn = [(ours - theirs)[generator.integers(0, 300, 300)].mean() for _ in range(20_000)]
    assert found.value == pytest.approx((ours - theirs).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.006)
    assert found.p == pytest.approx(2 * min(np.mean(np.array(drawn) <= 0), np.mean(np.array(drawn) >= 0)), abs=0.01)


def test_the_bootstrap_is_paired():
    ours = coins(3)
    theirs = list(ours)
    theirs[:6] = [1 - value for value in theirs[:6]]
    shuffled = np.random.default_rng(0).permutation(theirs).tolist()
    paired, apart = paired_bootstrap([(ours, theirs)]), paired_bootstrap([(ours, shuffled)])
    assert apart.high - apart.low > 4 * (paired.high - paired.low)


def test_equal_systems_do_not_differ_and_unlike_ones_do():
    same = paired_bootstrap([(coins(1), coins(1))])
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    better = paired_bootstrap([(coins(1, share=0.9), coins(2, share=0.3))])
    assert better.low > 0.4 and 0 < better.p < 0.001
    worse = paired_bootstrap([(coins(2, share=0.3), coins(1, share=0.9))])
    assert worse.value == -better.value and worse.high < -0.4


def test_p_values_of_equally_good_systems_are_spread_evenly():
    values = [paired_bootstrap([(coins(2 * k), coins(2 * k + 1))], seed=k).p for k in range(400)]
    assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(np.array(values) < 0.5) == pytest.approx(0.5, abs=0.1)


def test_tasks_weigh_what_they_are_told_to():
    small, large = ([1.0] * 10, [0.0] * 10), ([0.0] * 1000, [0.0] * 1000)
    assert paired_bootstrap([small, large]).value == 0.5
    assert paired_bootstrap([small, large], weights=[10, 1000]).value == pytest.approx(10 / 1010)


# ---------------------------------------------------------------------------------------- what is compared with what


def test_every_task_is_compared_with_the_first_column_and_the_mean_over_tasks(files):
    tasks = {"arc_easy": 200, "piqa": 50}
    paths = files(dense=report({"ensemble": 1}, tasks), sparse=report({"ensemble": 2, "head 0": 9}, tasks))
    columns = read_columns(paths)
    assert [column.name for column in columns] == ["dense: ensemble", "sparse: ensemble"]
    rows, notes = compare_columns(columns)
    assert not notes and [(row.task, row.items) for row in rows] == [
        ("arc_easy", 200),
        ("piqa", 50),
        ("mean of 2", 250),
    ]
    for row in rows:
        ours, theirs = row.scores[1][0], row.scores[0][0]
        assert row.differences[0].value == pytest.approx(ours - theirs)
    table = comparison_table(columns, rows)
    assert f"{rows[0].differences[0].value:+.3f}" in table and table.count("\n") == 4


def test_one_file_alone_compares_its_scorers_and_a_colon_chooses_one(files):
    (path,) = files(sparse=report({"ensemble": 2, "head 0": 9, "head 1": 4}, {"piqa": 50}))
    assert [column.scorer for column in read_columns([path])] == ["ensemble", "head 0", "head 1"]
    columns = read_columns([f"{path}:head 1", path])
    assert [column.scorer for column in columns] == ["head 1", "ensemble"]


def test_a_group_is_compared_over_the_items_of_its_tasks(files):
    content = report({"ensemble": 1, "head 0": 6}, {"mmlu_anatomy": 30, "mmlu_virology": 90})
    counts = [30, 90]
    means = {s: [np.mean([float(x) for x in content["tasks"][t]["per_item"][s]["acc"]]) for t in content["tasks"]]
             for s in content["scorers"]}  # fmt: skip
    content["results"] = {
        "mmlu": {s: {"acc": {"value": float(np.average(m, weights=counts)), "stderr": 0.1}} for s, m in means.items()}
    }
    content["members"] = {"mmlu": {"tasks": list(content["tasks"]), "weights": counts}}
    (row,), _ = compare_columns(read_columns(files(one=content)))
    assert row.items == 120 and row.differences[0].value == pytest.approx(row.scores[1][0] - row.scores[0][0])


def test_what_cannot_be_compared_is_left_out_and_named(files):
    one, other = report({"ensemble": 1}, {"piqa": 50, "boolq": 60}), report({"ensemble": 2}, {"piqa": 50, "boolq": 70})
    other["results"]["arc_easy"] = other["results"]["piqa"]
    rows, notes = compare_columns(read_columns(files(one=one, other=other | {"complete": False})))
    assert [row.task for row in rows] == ["piqa"]
    assert notes == [
        "other: ensemble: its file is of an incomplete run.",
        "boolq: left out, the runs scored different items.",
        "arc_easy: left out, one: ensemble lacks it.",
    ]
    del one["results"]["piqa"]
    with pytest.raises(ValueError, match="share no task"):
        compare_columns(read_columns(files(one=one, other=other)))


def test_bad_files_are_named(files, tmp_path):
    good, broken, foreign = files(good=report({"ensemble": 1}, {"piqa": 9}), broken={}, foreign={"loss": 1})
    Path(broken).write_text("{")
    for arguments, problem in (
        ([good], "one scorer compares to nothing"),
        ([good, broken], "broken.json: not JSON"),
        ([good, foreign], "foreign.json: accepted is a file of nt-hf evaluate zero-shot"),
        ([good, str(tmp_path / "none.json")], "none.json: cannot be read"),
        ([good, f"{good}:head 7"], "head 7: accepted is one of its scorers ensemble"),
        ([good, good], "two columns are called 'good: ensemble'"),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)):
            read_columns(arguments)


def test_the_script_writes_table_json_and_plots(files, tmp_path, monkeypatch, capsys):
    paths = files(
        a=report({"ensemble": 1}, {"piqa": 90, "boolq": 60}), b=report({"ensemble": 5}, {"piqa": 90, "boolq": 60})
    )
    monkeypatch.setattr(sys, "argv", ["compare.py", *paths, "--output", str(tmp_path / "out")])
    program.main()
    assert capsys.readouterr().out == (tmp_path / "out" / "comparison.md").read_text()
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["task"] for row in content["rows"]] == ["piqa", "boolq", "mean of 2"]
    assert content["rows"][0]["differences"][0].keys() == {"value", "low", "high", "p"}
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "out" / "comparison.svg").read_text()


def test_columns_read_items_as_numbers(files):
    (path,) = files(one=report({"ensemble": 1, "head 0": 2}, {"piqa": 20}))
    column = read_columns([path])[0]
    assert isinstance(column, Column) and column.items("piqa", "acc") == coins(1, 20)
