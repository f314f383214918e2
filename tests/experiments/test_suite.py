"""Suites of runs: which runs they ask for, that they are fair, resumed and skipped, and what the reports say."""

import json
import re
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from recipe_runs import call
from suite_runs import TINY, edited, run, runner, tiny_suite

from experiments.finished import finished, paired_ratios
from experiments.suite import (
    budget,
    fill,
    load_suite,
    main_runs,
    matching,
    read_result,
    run_config,
    run_tree,
    tuned,
    tuning_runs,
)
from experiments.suite_report import refreshed, report_text
from experiments.text_tables import effects_table, perplexity_on
from nt_hf.config import load_run_config
from nt_hf.files import LockedError, lock_directory
from nt_hf.training.signals import EXIT_PREEMPTED

SUITES = sorted((ROOT / "experiments" / "suites").glob("*.yaml"))


@pytest.fixture
def tiny(tmp_path) -> Path:
    return tiny_suite(tmp_path)


# ------------------------------------------------------------------------------------------------------- planning


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_of_the_repository_is_valid_and_fair(path):
    suite = load_suite(path)
    runs = main_runs(suite, dict.fromkeys(suite.arms, 1e-3))
    for seed in suite.seeds:
        trees = [run_tree(suite, run) for run in runs if run.seed == seed]
        data = [{key: value for key, value in tree["data"].items() if key != "order_per_head"} for tree in trees]
        assert len({(json.dumps(each), tree["train"]["batch_size"]) for each, tree in zip(data, trees)}) == 1
        assert {tree["train"]["seed"] for tree in trees} == {seed}
    steps = {run.arm.name: run_tree(suite, run)["train"]["max_steps"] for run in runs}
    assert len({count for name, count in steps.items() if not suite.arms[name].has_own_length}) == 1
    names = [run.name for run in [*tuning_runs(suite), *runs]]
    assert len(names) == len(set(names))
    data = suite.config["data"]
    if suite.of_images:  # neither trained on nor chosen by
        assert suite.evaluation.images != data["train"] and data["validation_share"] > 0
    else:
        assert suite.evaluation.texts and not set(suite.evaluation.texts.values()) & {data["validation"]}


@pytest.mark.parametrize("name", ["cpu-mini", "gpu-60m", "motion"])
def test_the_blocks_of_every_arm_learn_at_the_rate_that_suits_their_width_and_density(name):
    suite = load_suite(next(path for path in SUITES if path.stem == name))
    for each in main_runs(suite, dict.fromkeys(suite.arms, 1e-3)):
        config = run_config(suite, each)
        sparsity, width = config.sparsity, config.model["hidden_size"]
        density = 1.0 if sparsity.distribution == "erk" else sparsity.density  # ERK leaves these blocks dense
        assert config.train.learning_rate_factors["*.layers.*"] == pytest.approx(9.6 / (width * density), rel=1e-3)


def test_all_arms_have_a_seed_before_any_has_the_next(tiny):
    suite = load_suite(tiny)
    runs = main_runs(suite, {"single": 0.1, "neurotrails": 0.2})
    assert [(run.arm.name, run.seed, run.learning_rate) for run in runs] == [
        ("single", 0, 0.1), ("neurotrails", 0, 0.2), ("longer", 0, 0.2), ("single", 1, 0.1), ("neurotrails", 1, 0.2),
    ]  # fmt: skip
    assert [run.arm.name for run in main_runs(suite, {"single": 0.1})] == ["single", "single"]


def test_a_change_of_a_change_takes_the_rate_of_the_first(tiny):
    arms = yaml.safe_load(tiny.read_text())["arms"] | {"last": {"label": "last", "learning_rate_of": "longer"}}
    runs = main_runs(load_suite(edited(tiny, arms=arms)), {"neurotrails": 0.2})
    assert {(run.arm.name, run.learning_rate) for run in runs} == {(name, 0.2) for name in [*arms][1:]}


def test_tuning_tries_the_same_grid_for_every_arm_with_a_seed_of_its_own(tiny):
    suite = load_suite(tiny)
    runs = tuning_runs(suite)
    assert Counter((run.arm.name, run.learning_rate) for run in runs) == Counter(
        (arm, rate) for arm in ("single", "neurotrails") for rate in (0.001, 0.01)
    )
    assert {run.seed for run in runs} == {1000} and 1000 not in suite.seeds
    train = run_config(suite, runs[0]).train
    assert (train.max_steps, train.eval_steps, train.learning_rate) == (4, 4, 0.001)


def test_longer_training_is_one_over_density_and_the_budget_says_so(tiny):
    suite = load_suite(tiny)
    single, trails, longer = (budget(suite, run) for run in main_runs(suite, {"single": 0.1, "neurotrails": 0.1})[:3])
    assert (trails.steps, longer.steps) == (8, 16)
    assert trails.units == single.units == 8 * 4 * 32 and longer.units == 2 * trails.units
    assert longer.flops == 2 * trails.flops and longer.sparse_flops == 2 * trails.sparse_flops
    assert trails.sparse_flops < trails.flops and single.sparse_flops == single.flops
    assert single.active == single.stored < trails.stored and trails.active < trails.stored


def test_an_arm_can_train_longer_and_can_be_tuned_alone(tiny):
    arms = {"twice": {"label": "x", "times": 2}, "tried": {"label": "y", "seeds": 0}}
    suite = load_suite(edited(tiny, arms=arms, baseline="twice", rival="twice"))
    runs = main_runs(suite, dict.fromkeys(arms, 0.1))
    assert [(run.name, budget(suite, run).steps) for run in runs] == [
        ("runs/twice/seed-0", 16), ("runs/twice/seed-1", 16),
    ]  # fmt: skip
    assert [budget(suite, run).steps for run in tuning_runs(suite)] == [8, 8, 4, 4]


def test_in_the_suite_of_moving_masks_nothing_else_differs():
    suite = load_suite(ROOT / "experiments" / "suites" / "motion.yaml")
    trees = {run.arm.name: run_tree(suite, run) for run in main_runs(suite, dict.fromkeys(suite.arms, 1e-3))}
    moving = {name: tree for name, tree in trees.items() if tree["sparsity"]["update_interval"]}
    assert len(moving) == 23
    motion = ("drop", "grow", "second_moments", "update_interval", "drop_fraction")
    for name, tree in moving.items():
        rest = {key: value for key, value in tree["sparsity"].items() if key not in motion}
        arm = suite.arms[name]
        assert trees[arm.learning_rate_of or arm.changed] == tree | {"sparsity": rest | {"update_interval": 0}}
    own = {name: tree["sparsity"] for name, tree in moving.items() if "own-interval" in name}
    alike = [tree["sparsity"] for name, tree in moving.items() if name not in own]
    assert {(t["update_interval"], t["drop_fraction"]) for t in alike} == {(100, 0.3)}
    assert {(t["update_interval"], t["drop_fraction"], t["grow"]) for t in own.values()} == {(50, 0.3, "random")}


def test_globs_choose_runs(tiny):
    runs = main_runs(load_suite(tiny), {"single": 0.1, "neurotrails": 0.1})
    assert [run.name for run in matching(runs, ["runs/*/seed-1"])] == ["runs/single/seed-1", "runs/neurotrails/seed-1"]
    assert matching(runs, []) == runs


def test_paths_are_filled_wherever_they_stand():
    found = fill({"a": ["{runs}/x", 1], "b": "prepared:{runs}/{data_root}"}, runs="R", data_root="D")
    assert found == {"a": ["R/x", 1], "b": "prepared:R/D"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "accepted are the keys"),
        ({"baseline": "nobody"}, "baseline='nobody': accepted is single, neurotrails, longer"),
        ({"tuning": {"rates": [1]}}, "unknown key .*tuning.rates: did you mean learning_rates"),
        ({"tuning": {"share": 0.5}}, "tuning: lacks learning_rates"),
        ({"tuning": {"learning_rates": []}}, r"tuning.learning_rates=\[\]: accepted is a list of numbers above 0"),
        ({"tuning": {"learning_rates": [1.0], "share": 2}}, r"tuning.share=2.0: accepted is a number in \(0, 1\]"),
        ({"seeds": 3}, "seeds=3: accepted is a list of whole numbers"),
        ({"arms": {}}, "arms={}: accepted is a mapping of names to arms"),
        ({"arms": {"base": 1}}, "arms={'base': 1}: accepted is a mapping of names to arms, or a suite's file"),
        ({"arms": {"single": {}}}, "arms.single: lacks label"),
        ({"arms": {"single": {"label": "x", "colour": 1}}}, "unknown key .*arms.single.colour: did you mean"),
        ({"arms": {"single": {"label": "x", "seeds": 3}}}, "arms.single.seeds=3: accepted is a whole number from 0 to"),
        ({"arms": {"single": {"label": "x", "times": 0}}}, "arms.single.times=0.0: accepted is a number above 0"),
        ({"arms": {"single": {"label": "x", "learning_rate_of": "y"}}}, "learning_rate_of='y': accepted is"),
        (
            {"arms": {"single": {"label": "x", "learning_rate_of": "neurotrails"}, "neurotrails": {"label": "y"}}},
            r"learning_rate_of='neurotrails': accepted is an arm above it \(there is none\), or null",
        ),
        ({"arms": {"single": {"label": "x", "config": {"model": {"heads": 1}}}}}, "unknown key model.heads"),
        ({"arms": {"single": {"label": "x", "config": {"nothing": {}}}}}, "arms.single: section nothing: accepted are"),
        (
            {"arms": {"single": {"label": "x", "config": {"data": {"sequence_length": 64}}}}},
            "data.sequence_length: it is the same for all arms",
        ),
        (
            {"arms": {"single": {"label": "x", "config": {"train": {"learning_rate": 0.1}}}}},
            "train.learning_rate: it is the same for all arms, or tuned",
        ),
    ],
)  # fmt: skip
def test_a_bad_suite_is_refused_with_what_is_accepted(tiny, changes, message):
    changes = {"rival": "single"} | changes if "arms" in changes else changes
    with pytest.raises(ValueError, match=message):
        load_suite(edited(tiny, **changes))


def test_a_suite_can_take_the_arms_of_another(tiny):
    other = tiny.with_name("other.yaml")
    other.write_text(tiny.read_text())
    assert load_suite(edited(other, arms="tiny.yaml")).arms == load_suite(tiny).arms
    arm = {"label": "more", "learning_rate_of": "single"}
    more = load_suite(edited(other, arms={"base": "tiny.yaml", "more": arm}))
    assert more.arms == load_suite(tiny).arms | {"more": more.arms["more"]} and more.arms["more"].label == "more"
    with pytest.raises(ValueError, match="arms=None: accepted is a mapping of names to arms, or a suite's file"):
        load_suite(edited(other, arms=str(ROOT / "recipes" / "configs" / "demo.yaml")))


# -------------------------------------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, list[str]]:
    """A directory with a suite of which one arm is tuned, and the results that were there then."""
    directory = tmp_path_factory.mktemp("suite")
    tiny_suite(directory)
    run(directory, "--only", "tuning/single/*")
    return directory, sorted(str(path.parent.relative_to(directory)) for path in directory.rglob("result.json"))


@pytest.fixture(scope="module")
def world(begun) -> Path:
    """A directory with a suite, and all its runs made."""
    directory, _ = begun
    run(directory, plots=True)
    return directory


def test_a_suite_trains_evaluates_and_reports_every_run(world):
    suite, results = load_suite(world / "tiny.yaml"), world / "results"
    runs = [*tuning_runs(suite), *main_runs(suite, tuned(results, suite))]
    found = [read_result(results, suite, each) for each in runs]
    assert len(found) == 4 + 5 and all(found)
    for each, result in zip(runs, found):
        assert result["budget"]["steps"] == result["validation"]["step"]
        assert (results / each.name / "metrics.jsonl").read_text() == (
            world / "runs" / each.name / "metrics.jsonl"
        ).read_text()
        assert ("texts" in result) == (not each.tuning) and str(world) not in json.dumps(result)
    trained = load_run_config([world / "runs" / "runs" / "single" / "seed-1" / "run.yaml"])
    assert trained.train.learning_rate == tuned(results, suite)["single"] and trained.train.seed == 1
    # The suite leaves the precision to the machine; a result names what it was.
    assert {result["config"]["train"]["precision"] for result in found} == {trained.train.precision} <= {"bf16", "fp32"}
    assert {path.name for path in results.iterdir()} == {
        "report.md", "curves.png", "quality.png", "diversity.png", "goldilocks.png", "runs", "tuning",
    }  # fmt: skip


def test_finished_runs_are_skipped_and_one_that_lost_its_result_is_only_evaluated_again(world):
    assert run(world) == ["recipes/prepare_c4.py"]
    before = (world / "results/runs/single/seed-0/result.json").read_bytes()
    metrics = (world / "runs/runs/single/seed-0/metrics.jsonl").read_bytes()
    (world / "results/runs/single/seed-0/result.json").unlink()
    assert run(world)[1:] == ["recipes/pretrain_c4.py", "experiments/run.py"]
    after = json.loads((world / "results/runs/single/seed-0/result.json").read_text())
    assert after["texts"] == json.loads(before)["texts"]
    assert (world / "runs/runs/single/seed-0/metrics.jsonl").read_bytes() == metrics


def test_only_makes_the_runs_it_names(begun):
    assert begun[1] == ["results/tuning/single/lr-0.001", "results/tuning/single/lr-0.01"]


def test_results_of_another_configuration_are_refused_not_overwritten(world):
    suite = load_suite(edited(world / "tiny.yaml", arms=yaml.safe_load(TINY)["arms"] | {"single": {"label": "other"}}))
    each = main_runs(suite, {"single": 0.01})[0]
    with pytest.raises(ValueError, match=r"result.json: is of another configuration than the suite asks for; delete"):
        read_result(world / "results", suite, each)
    tiny_suite(world)


def test_a_suite_that_names_a_precision_refuses_results_in_another(world):
    suite = load_suite(world / "tiny.yaml")
    each = main_runs(suite, tuned(world / "results", suite))[0]
    had = read_result(world / "results", suite, each)["config"]["train"]["precision"]

    def asking(precision: str):
        train = suite.config["train"] | {"precision": precision}
        return replace(suite, config=suite.config | {"train": train})

    assert read_result(world / "results", asking(had), each)
    with pytest.raises(ValueError, match="another configuration"):
        read_result(world / "results", asking({"bf16": "fp32", "fp32": "bf16"}[had]), each)


def test_list_and_report_train_nothing(world, capsys):
    (world / "results" / "report.md").unlink()
    assert run(world, "--list") == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and all(line.endswith("done") for line in lines)
    assert not (world / "results" / "report.md").exists()
    assert run(world, "--report") == []
    assert "5 of 5 runs are finished" in (world / "results" / "report.md").read_text()


def test_a_run_that_fails_is_named_and_the_others_are_finished(tmp_path):
    content = yaml.safe_load(TINY)
    content["arms"]["neurotrails"]["config"] = {"train": {"micro_batch_size": 3}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match=r"1 of 2 runs failed, for example tuning/neurotrails/lr-0\.001"):
        run(tmp_path, "--only", "tuning/*/lr-0.001")
    assert len(list(tmp_path.glob("results/tuning/single/*/result.json"))) == 1


def test_a_run_that_is_not_there_is_named(world):
    with pytest.raises(ValueError, match="--evaluate runs/x/seed-0: accepted are the runs that --list shows"):
        run(world, "--evaluate", "runs/x/seed-0")
    with pytest.raises(ValueError, match="--parallel 0: accepted is a number from 1"):
        run(world, "--parallel", "0")


def test_a_signal_stops_the_programs_and_says_how_to_go_on(monkeypatch, tmp_path):
    tiny_suite(tmp_path)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    programs = runner.Programs()
    running = type("Running", (), {"send_signal": lambda self, number: sent.append(number)})()
    sent = []
    programs.running.add(running)
    programs._stop()
    assert sent == [runner.signal.SIGTERM]
    with pytest.raises(runner.Stopped):
        programs.call("recipes/prepare_c4.py")
    monkeypatch.setattr(runner, "Programs", lambda: programs)
    with pytest.raises(SystemExit) as left:
        call(
            runner.main, "--suite", tmp_path / "tiny.yaml", "--data_root", "sample:validation",
            "--runs", tmp_path / "runs", "--results", tmp_path / "r",
        )  # fmt: skip
    assert left.value.code == EXIT_PREEMPTED


def test_two_suites_do_not_work_in_one_directory(world):
    with (
        lock_directory(world / "runs"),
        pytest.raises(LockedError, match="another process writes there"),
    ):
        run(world)
    run(world, "--only", "runs/single/*")


def test_the_last_line_of_a_program_that_fails_is_the_error(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint('begun')\nsys.exit(f'error: {sys.argv[1]}: no such file')\n")
    with pytest.raises(ValueError, match=rf"^{program}: nowhere: no such file$"):
        runner.Programs().call(str(program), "nowhere")


# -------------------------------------------------------------------------------------------------------- reports


def test_ratios_are_of_paired_seeds(world):
    arms = finished(load_suite(world / "tiny.yaml"), world / "results")
    read = perplexity_on("text")
    single, trails = arms["single"].by_seed, arms["neurotrails"].by_seed
    assert paired_ratios(arms["neurotrails"], arms["single"], read) == [
        read(trails[seed]) / read(single[seed]) for seed in (0, 1)
    ]
    assert len(paired_ratios(arms["longer"], arms["single"], read)) == 1
    text = report_text(load_suite(world / "tiny.yaml"), world / "results")
    values = [result["texts"]["text"]["ensemble_perplexities"]["logits"] for result in trails.values()]
    assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}" in text
    ratio = read(arms["longer"].by_seed[0]) / read(trails[0])
    assert re.search(rf"\| longer +\| NeuroTrails +\| 1 +\| {ratio:.3f} ", text)  # one change
    values = [result["texts"]["text"]["ensemble_perplexities"]["probs"] for result in trails.values()]
    assert re.search(rf"\| NeuroTrails .*\| {statistics.fmean(values):.2f} ± [\d.]+ +\|\n", text)  # averaging


def test_an_arm_of_one_head_has_no_gain_to_compare(world):
    suite = load_suite(world / "tiny.yaml")
    single = finished(suite, world / "results")["single"]
    other = replace(single, arm=replace(single.arm, name="other", label="other", learning_rate_of="single"))
    last = effects_table(suite, {"single": single, "other": other}).splitlines()[-1]
    assert re.fullmatch(r"\| other \| single +\| 2 +\| 1\.000 ± 0\.000 +\| 1\.000 ± 0\.000 +\| +\|", last)


def test_a_document_gets_the_tables_it_asks_for(world):
    page = world / "page.md"
    page.write_text(
        "# Page\n\n<!-- tiny: Quality -->\nold\n<!-- end -->\n\n<!-- other: Quality -->\nkept\n<!-- end -->\n"
    )
    run(world, "--report", "--document", str(page))
    text = page.read_text()
    assert "| NeuroTrails | 2 " in text and "old" not in text and "kept" in text and text.startswith("# Page")
    assert refreshed(text, load_suite(world / "tiny.yaml"), world / "results") == text
    page.write_text("<!-- tiny: Speed -->\n<!-- end -->")
    with pytest.raises(ValueError, match="<!-- tiny: Speed -->: accepted are the titles Quality, Budgets"):
        run(world, "--report", "--document", str(page))
