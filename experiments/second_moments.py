"""What dense second moments change: how far grown weights step, how large they become, what the next update drops.

    python experiments/second_moments.py --data_root data

RigL's arms of the suite ``motion`` are trained up to their second update, with either kind of second moment and either
memory of Adam's. Up to the first update the kinds are the same, so the same weights grow there. What follows compares
these with the weights that were active before and stay active.

The suite's text is prepared by ``experiments/run.py --suite experiments/suites/motion.yaml --only 'tuning/dense/*'``.
Finished runs are skipped. --report makes the page from the results alone.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from nt_hf.cli import program
from nt_hf.cli.program import machine, provenance
from nt_hf.config import load_run_config
from nt_hf.files import write_json, write_text
from nt_hf.models.masks import get_mask, masked_modules
from nt_hf.text import markdown_table
from nt_hf.training.launch import start_processes
from nt_hf.training.run import TrainingRun
from nt_hf.training.signals import Preemption

import torch

from experiments.finished import spread
from experiments.suite import Paths, load_suite, main_runs, run_tree, tuned

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "experiments" / "suites" / "motion.yaml"
RESULTS = ROOT / "experiments" / "results" / "second-moments"
ARMS = ("rigl-0.1", "rigl-moments-0.1", "rigl-0.1-beta", "rigl-moments-0.1-beta")
# Steps behind the first update at which grown weights are looked at; 99 is the last before the second update.
LATER = (0, 10, 50, 99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", default="data", help="what {data_root} in the suite stands for (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/motion"), help="the suite's (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write the page of the results there are, only")
    args = parser.parse_args()
    suite, suite_results = load_suite(SUITE), ROOT / "experiments" / "results" / "motion"
    paths = Paths(SUITE, args.data_root, args.runs, suite_results)
    for run in () if args.report else main_runs(suite, tuned(suite_results, suite)):
        result = args.results / run.arm.name / f"seed-{run.seed}.json"
        if run.arm.name in ARMS and run.seed in suite.seeds[: args.seeds] and not result.is_file():
            found = observe(paths.fill(run_tree(suite, run)))
            label = {"arm": run.arm.name, "beta2": run_tree(suite, run)["train"]["betas"][1], "seed": run.seed}
            write_json(result, {**label, **found, **provenance(), "machine": machine()})
    page = report(args.results)
    write_text(args.results / "README.md", page)
    print(page)


def observe(tree: dict[str, Any]) -> dict[str, Any]:
    """Trains a run to its second update; what became of the weights that its first update grew.

    Returns:
        ``later``: for each step of `LATER` the medians of grown weights over those of weights that stayed active, of
        the root of Adam's second moment (``second_moment``), of ``abs(m) / sqrt(v)`` (``step``) and of ``abs(w)``
        (``weight``); ``kept``: the share of grown weights that the second update keeps.
    """
    config = load_run_config([tree])
    with tempfile.TemporaryDirectory() as folder, Preemption() as preemption:
        accelerator, _ = start_processes(config.train, Path(folder), "none")
        run = TrainingRun(config, Path(folder), accelerator, preemption)
        run.setup(resume="never")
        run.run_log.start_bar(0)
        modules, first, later = masked_modules(run.model), config.sparsity.update_interval, {}
        groups = iter(run._next_group, None)
        for _ in range(first - 1):
            run.step(next(groups))
        before = [get_mask(module) for module in modules.values()]
        run.step(next(groups))
        after = [get_mask(module) for module in modules.values()]
        grown = [new & ~old for new, old in zip(after, before)]
        stayed = [new & old for new, old in zip(after, before)]
        for since in range(first):
            if since in LATER:
                states = [(module.weight, run.state.optimizer.state[module.weight]) for module in modules.values()]
                values = [figures(weight, state) for weight, state in states]
                later[since] = {n: median(values, n, grown) / median(values, n, stayed) for n in values[0]}
            update = run.step(next(groups)).update
        return {"later": later, "kept": update.grown_kept}


def figures(weight: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of each weight, by name; see `observe`."""
    root = state["exp_avg_sq"].sqrt()
    return {"second_moment": root, "step": state["exp_avg"].abs() / root, "weight": weight.detach().abs()}


def median(values: list[dict[str, torch.Tensor]], name: str, masks: list[torch.Tensor]) -> float:
    return torch.cat([tensors[name][mask] for tensors, mask in zip(values, masks)]).median().item()


def report(results: Path) -> str:
    """The page of the results there are."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*/seed-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["arm"], []).append(result)
    rows = [
        ["second moments of grown weights", "beta2", "seeds", "steps later", "root of second moment", "step", "weight",
         "kept by the next update"]
    ]  # fmt: skip
    for arm in ARMS:
        for since in map(str, LATER if arm in found else ()):
            several = found[arm]
            kind = "average of dense squares" if "moments" in arm else "square of the gradient"
            cells = [spread([r["later"][since][name] for r in several]) for name in ("second_moment", "step", "weight")]
            kept = spread([r["kept"] for r in several], 3) if since == str(LATER[-1]) else ""
            rows.append([kind, f"{several[0]['beta2']:g}", str(len(several)), since, *cells, kept])
    return "\n\n".join(
        [
            "# What dense second moments change",
            "`python experiments/second_moments.py` makes what is below; `--report` makes this page from the files "
            "beside it. RigL at density 0.1: the weights that the first update grew, in medians over those that stayed "
            "active; mean and standard deviation over seeds. A step is the first moment over the root of the second.",
            markdown_table(rows),
        ]
    ) + "\n"  # fmt: skip


if __name__ == "__main__":
    program.run(main)
