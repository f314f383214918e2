"""The pages of the experiments on stock models are made of the result files beside them."""

import pytest
from conftest import ROOT, script

RESULTS = ROOT / "experiments" / "results"


@pytest.mark.parametrize(("name", "folder"), [("upcycling", "upcycling"), ("heads_differ", "heads-differ")])
def test_committed_pages_are_those_of_the_committed_files(name, folder):
    page = (RESULTS / folder / "README.md").read_text(encoding="utf-8")
    assert script(f"experiments/{name}.py").report(RESULTS / folder) == page
