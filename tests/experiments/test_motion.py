"""What it brings that masks move: the pairs that are compared, the intervals, and what updates did."""

import math
import statistics
from dataclasses import replace

import pytest
from suite_runs import edited, tiny_suite

from experiments import suite_report
from experiments.finished import Finished
from experiments.motion import motion_table, updates_table
from experiments.suite import load_suite
from experiments.text_tables import gains_of_motion
from nt_hf.text import pyplot


def made_up(suite, name, perplexities, density=0.5, steps=8, interval=3):
    """An arm with the results of some seeds."""
    results = {
        seed: {
            "texts": {"text": {"ensemble_perplexities": {"logits": perplexity}}},
            "validation": {"ensemble_mode": "logits", "density": density},
            "config": {"sparsity": {"update_interval": interval}},
            "budget": {"steps": steps, "tokens": steps * 1000_000},
        }
        for seed, perplexity in perplexities.items()
    }
    return Finished(suite.arms[name], results, [])


def test_static_masks_less_moving_ones(tmp_path):
    arms = {"still": {"label": "still"}, "rival": {"label": "rival"}}
    arms |= {name: {"label": name, "learning_rate_of": "still"} for name in ("moves", "longer", "alone", "other")}
    arms["of rival"] = {"label": "of rival", "change_of": "moves"}
    suite = load_suite(edited(tiny_suite(tmp_path), arms=arms, baseline="still", rival="rival"))
    still = made_up(suite, "still", {0: 100.0, 1: 102.0, 2: 104.0}, interval=0)
    factors = (0.99, 0.97, 0.98)
    results = {
        "still": still,
        "moves": made_up(suite, "moves", {seed: (100 + 2 * seed) * factors[seed] for seed in (2, 1, 0)}),
        "longer": made_up(suite, "longer", {0: 50.0}, steps=16),  # against shorter training: says nothing
        "alone": made_up(suite, "alone", {1: 51.0, 7: 40.0}, density=0.1),
        "other": made_up(suite, "other", {0: 1.0}, interval=0),  # does not move
        "of rival": made_up(suite, "of rival", {0: 49.5}),  # a change of moving masks
    }
    table = motion_table(suite, results, gains_of_motion(suite))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    gains = [-math.log(factor) for factor in factors]
    margin = 4.30265 * statistics.stdev(gains) / 3**0.5
    shares = [100 * (1 - factor) for factor in factors]
    share_margin = 4.30265 * statistics.stdev(shares) / 3**0.5
    mean, share = statistics.fmean(gains), statistics.fmean(shares)
    assert rows == [
        ["0.5", "8.00", "moves", "still", "3",
         f"{share:+.2f} [{share - share_margin:+.2f}, {share + share_margin:+.2f}]",
         f"{mean:+.4f} [{mean - margin:+.4f}, {mean + margin:+.4f}]"],
        ["0.5", "8.00", "of rival", "moves", "1", "+50.00", f"{math.log(2):+.4f}"],
        ["0.5", "8.00", "of rival", "still", "1", "+50.50", f"{-math.log(0.495):+.4f}"],
        ["0.1", "8.00", "alone", "still", "1", "+50.00", f"{math.log(2):+.4f}"],
    ]  # fmt: skip
    assert motion_table(suite, {"still": still}, gains_of_motion(suite)) is None


def test_the_plot_has_a_line_over_density_and_one_over_length(tmp_path, monkeypatch):
    sparse = {"sparsity": {"density": 0.1}}
    arms = {
        "still": {"label": "still"},
        "still 0.1": {"label": "still 0.1", "config": sparse},
        "still, 2x": {"label": "still, 2x", "times": 2},
        "moves": {"label": "moves", "learning_rate_of": "still"},
        "moves 0.1": {"label": "moves 0.1", "learning_rate_of": "still 0.1", "config": sparse},
        "moves, 2x": {"label": "moves, 2x", "learning_rate_of": "still, 2x", "times": 2},
    }
    suite = load_suite(edited(tiny_suite(tmp_path), arms=arms, baseline="still", rival="moves"))
    results = {}
    for name in arms:
        density, steps = 0.1 if "0.1" in name else 0.5, 16 if "2x" in name else 8
        perplexities, interval = ({0: 100.0, 1: 100.0}, 0) if "still" in name else ({0: 98.0, 1: 96.0}, 3)
        results[name] = made_up(suite, name, perplexities, density, steps, interval)
    figures = []
    monkeypatch.setattr(suite_report, "save", lambda plt, figure, path: figures.append(figure))
    suite_report.plot_motion(pyplot(), suite, {name: results[name] for name in ("still", "moves")}, tmp_path)
    assert not figures, "a line has two points"
    suite_report.plot_motion(pyplot(), suite, results, tmp_path)
    [figure] = figures
    density, length = (axis.containers[0] for axis in figure.axes)
    assert density.get_label() == "moves 0.1 to moves" and length.get_label() == "moves to moves, 2x"
    assert list(density[0].get_xdata()) == [0.1, 0.5] and list(length[0].get_xdata()) == [8.0, 16.0]
    assert list(density[0].get_ydata()) == list(length[0].get_ydata()) == pytest.approx([3.0, 3.0])
    [[low, high], _] = density[2][0].get_segments()
    assert (low[1], high[1]) == pytest.approx((3.0 - 12.7062, 3.0 + 12.7062), rel=1e-4)  # t of two seeds, error of 1


def test_what_updates_did(tmp_path):
    suite = load_suite(
        edited(tiny_suite(tmp_path), arms={"a": {"label": "a"}, "b": {"label": "b"}}, baseline="a", rival="b")
    )

    def updates(*kept):
        return [
            {"grown_kept": k, "ever_active": 0.1 * n, "dead_rows": n, "dead_columns": 0} for n, k in enumerate(kept)
        ]

    arms = {
        "a": replace(made_up(suite, "a", {0: 1.0, 1: 1.0}), updates=[updates(None, 0.5, 0.7), updates(None, 0.7, 0.7)]),
        "b": replace(made_up(suite, "b", {0: 1.0}), updates=[updates(None)]),  # nothing was kept or dropped again
    }
    row = [cell.strip() for cell in updates_table(arms).splitlines()[-1].strip("|").split("|")]
    assert row == ["a", "3", "0.650 ± 0.071", "0.600 ± 0.141", "0.200 ± 0.000", "2.0 ± 0.0", "0.0 ± 0.0"]
    assert updates_table({"b": arms["b"]}) is None
