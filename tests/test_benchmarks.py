"""The benchmarks' figures: how they are judged, and that the page shows what was measured."""

import json

import pytest
import torch
from conftest import ROOT, script

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, SparsityConfig, draw_masks

common = script("benchmarks/common.py")
Figure = common.Figure


@pytest.mark.parametrize(
    ("value", "bounds", "verdict"),
    [
        (1.0, {}, ""),
        (1.03, {"at_most": 1.03}, "met"),
        (1.04, {"at_most": 1.03}, "MISSED"),
        (1.6, {"at_least": 1.6}, "met"),
        (1.59, {"at_least": 1.6}, "MISSED"),
        (None, {"at_least": 1.25}, "not run"),
    ],
)
def test_a_figure_is_judged_by_its_goal(value, bounds, verdict):
    assert Figure(1, "name", value, **bounds).verdict == verdict


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []
    times = common.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert common.ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == 2.0


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("performance-*.json")), ids=lambda path: path.stem)
def test_the_page_shows_what_was_measured(path):
    parts = json.loads(path.read_text())
    figures = common.figures(parts)
    rows = [row for part in parts.values() for row in part["figures"]]
    assert [(row["goal"], row["verdict"]) for row in rows] == [(each.goal, each.verdict) for each in figures]
    assert set(range(1, 10)) <= {figure.row for figure in figures} <= set(range(1, 13))
    assert common.table(figures) in (ROOT / "docs" / "performance.md").read_text()
    for part in parts.values():
        assert part["machine"]["device"] and part["machine"]["command"].startswith("python benchmarks/run.py")


def test_gradients_and_masks_of_a_fresh_model_are_as_chance_makes_them():
    explain = script("benchmarks/explain.py")
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = NeuroTrailsLlamaConfig(**size, num_attention_heads=2, num_ensemble_heads=3, blocks_in_head=1)
    model = NeuroTrailsLlamaForCausalLM(config).train()
    ids = [torch.randint(64, (4, 16))]
    assert explain.unevenness(model) == (None, None)
    draw_masks(model, SparsityConfig(density=0.5, distribution="uniform"))
    assert explain.unevenness(model) == pytest.approx((1, 1), abs=0.1)
    assert -0.5 < explain.head_cosine(model, ids, model.model.layers) < 0.5
    for head in (1, 2):
        model.model.heads[head].load_state_dict(model.model.heads[0].state_dict())
        model.lm_heads[head].load_state_dict(model.lm_heads[0].state_dict())
    assert explain.head_cosine(model, ids, model.model.layers) == pytest.approx(1, abs=1e-4)
    assert explain.head_cosine(model, ids, torch.nn.ModuleList()) is None
