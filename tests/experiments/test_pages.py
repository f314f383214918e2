"""The committed pages and tables of the experiments are made of the result files beside them."""

import json
import re

import pytest
from conftest import ROOT, script

from experiments.finished import finished
from experiments.suite import load_suite
from experiments.suite_report import density_series, refreshed, report_text, series
from nt_hf.training.metrics import read_metrics

RESULTS = ROOT / "experiments" / "results"
REPORTS = sorted(RESULTS.glob("*/report.md"))


@pytest.mark.parametrize("name", ["upcycling", "heads_differ", "second_moments"])
def test_committed_pages_are_those_of_the_committed_files(name):
    results = RESULTS / name.replace("_", "-")
    assert script(f"experiments/{name}.py").report(results) == (results / "README.md").read_text(encoding="utf-8")


def test_the_arms_of_a_line_over_density_differ_in_nothing_else():
    suite = load_suite(ROOT / "experiments" / "suites" / "cpu-mini.yaml")
    arms = finished(suite, RESULTS / "cpu-mini")
    lines = density_series({name: each for name, each in arms.items() if not each.arm.longer})
    assert [names for names in lines if len(names) > 1] == [
        ["neurotrails-0.3", "neurotrails-0.5", "neurotrails-0.7", "neurotrails-0.9", "treenet"],
    ]


def test_lines_of_static_and_of_moving_masks_both_end_at_the_dense_arm():
    suite = load_suite(ROOT / "experiments" / "suites" / "cifar-mini.yaml")
    arms = finished(suite, RESULTS / "cifar-mini")
    lines = density_series({name: each for name, each in arms.items() if not each.arm.has_own_length})
    assert [names for names in lines if len(names) > 1] == [
        ["static-0.1", "static-0.2", "static-0.5", "treenet"],
        ["set-0.1", "set-0.2", "set-0.5", "treenet"],
        ["rigl-0.1", "rigl-0.2", "rigl-0.5", "treenet"],
    ]


def test_the_arms_of_a_line_over_length_differ_in_nothing_else():
    suite = load_suite(ROOT / "experiments" / "suites" / "motion.yaml")
    arms = finished(suite, RESULTS / "motion")
    lines = series(arms, lambda runs: runs.budget["steps"])
    assert [names for names in lines if len(names) > 1] == [
        ["static-0.1", "static-0.1-x2", "static-0.1-x4"],
        ["set-0.1", "set-0.1-x2", "set-0.1-x4"],
    ]


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.parent.name)
def test_committed_tables_are_those_of_the_committed_files(report):
    suite = load_suite(ROOT / "experiments" / "suites" / f"{report.parent.name}.yaml")
    assert report.read_text(encoding="utf-8") == report_text(suite, report.parent)


def test_every_table_of_the_document_is_made_of_the_committed_files():
    document = (RESULTS / "README.md").read_text(encoding="utf-8")
    for report in REPORTS:
        suite = load_suite(ROOT / "experiments" / "suites" / f"{report.parent.name}.yaml")
        assert f"<!-- {suite.name}: Quality -->" in document
        assert refreshed(document, suite, report.parent) == document
    assert not re.search(r"^\|", re.sub(r"<!-- [\w-]+: .*?<!-- end -->", "", document, flags=re.DOTALL), re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "start", "end", "least"),
    [
        ("docs/results.md", "# Results", "```bash", 30),
        ("docs/images.md", "## Compare", "corruptions and what limits", 20),
        ("README.md", "- With the paper's settings", "**Where the zeros go.**", 5),
    ],
)
def test_every_figure_of_a_page_of_results_is_in_a_report(page, start, end, least):
    text = (ROOT / page).read_text(encoding="utf-8")
    suites = ("cpu-mini", "cifar-mini", "motion", "motion-images")
    report = "".join((RESULTS / suite / "report.md").read_text(encoding="utf-8") for suite in suites)
    figures = set(re.findall(r"\d+\.\d{2,3}(?: ± \d+\.\d+)?", text[text.index(start) : text.index(end)]))
    assert len(figures) > least and not {figure for figure in figures if figure not in report}


def test_the_page_of_results_is_one_screen():
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8").count("\n") <= 50


def test_every_figure_on_the_comparison_of_texts_is_in_a_table_or_a_result():
    pages = [RESULTS / "cpu-mini" / "report.md", RESULTS / "demo" / "explain.md"]
    known = {number for page in pages for number in re.findall(r"\d+\.\d+", page.read_text(encoding="utf-8"))}
    for path in (RESULTS / "demo").glob("*.jsonl"):
        known |= {f"{record['perplexity']:.2f}" for record in read_metrics(path) if record["event"] == "eval"}
    for path in RESULTS.glob("cpu-mini*/**/*.json"):
        found = json.loads(path.read_text())
        found = found["texts"]["wikipedia"] if "texts" in found else found
        known |= {f"{value:.2f}" for value in found.get("ensemble_perplexities", {}).values()}
    figures = figures_of_prose("## cpu-mini", "### Before")
    goals, papers = {"0.95", "1.00", "0.90", "0.96"}, {"0.91", "0.97"}
    assert len(figures) > 20 and figures - known <= goals | papers


@pytest.mark.parametrize(("suite", "end"), [("motion", "## motion-images"), ("motion-images", "## gpu-60m")])
def test_every_figure_on_moving_masks_is_in_a_table(suite, end):
    known = re.findall(r"\d+\.\d+", (RESULTS / suite / "report.md").read_text(encoding="utf-8"))
    figures = figures_of_prose(f"## {suite}\n", end)
    settings = {"0.02", "0.95"}  # of the embedding, and beta2
    assert len(figures) > 5 and figures - settings <= {*known}


def figures_of_prose(start: str, end: str) -> set[str]:
    """The numbers of two and three digits behind the point in a part of the document, without its tables."""
    document = (RESULTS / "README.md").read_text(encoding="utf-8")
    text = document[document.index(start) : document.index(end)]
    prose = re.sub(r"<!-- [\w-]+: .*?<!-- end -->", "", text, flags=re.DOTALL)
    return set(re.findall(r"(?<![\d.])\d+\.\d{2,3}(?![\d.])", prose))


def test_every_trial_that_the_document_quotes_is_what_its_file_says():
    directory = RESULTS / "trials"
    document = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    quoted = re.findall(r"`([\w.]+-?[\w.]*/[\w.-]+)` (\d+\.\d)", document)
    named = {line.split("|")[0] for line in (directory / "overrides.txt").read_text().splitlines()[1:]}
    assert len(quoted) > 10
    for name, value in quoted:
        last = [record for record in read_metrics(directory / f"{name}.jsonl") if record["event"] == "eval"][-1]
        assert f"{last['perplexity']:.1f}" == value and name in named, name
