"""The pages of the experiments that are no suites are made of the result files beside them."""

import pytest
from conftest import ROOT, script

RESULTS = ROOT / "experiments" / "results"


@pytest.mark.parametrize("name", ["upcycling", "heads_differ", "second_moments"])
def test_committed_pages_are_those_of_the_committed_files(name):
    results = RESULTS / name.replace("_", "-")
    assert script(f"experiments/{name}.py").report(results) == (results / "README.md").read_text(encoding="utf-8")
