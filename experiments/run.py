"""Runs a suite: trains every arm from several seeds on the same data, evaluates them, and reports.

    python experiments/run.py --suite experiments/suites/cpu-mini.yaml --data_root data
    python experiments/run.py --suite experiments/suites/cpu-mini.yaml --report

The runs are those of the ordinary recipe. First every arm's learning rate is chosen from the suite's grid at a share of
the budget, on validation data of its own; then the arms are trained, the first seed of all before the second of any.
Finished runs are skipped, and killed ones continue from their checkpoints, when the same command is started again.
Results are small and kept in --results; checkpoints are in --runs and may be deleted once their result is there.
"""

import argparse
import concurrent.futures
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from nt_hf.cli import program
from nt_hf.cli.program import check_output, machine, provenance
from nt_hf.config import read_sections
from nt_hf.files import lock_directory, write_atomic, write_json
from nt_hf.training.metrics import last_record, read_metrics
from nt_hf.training.signals import EXIT_PREEMPTED

from experiments.evaluate import check_evaluation, evaluate_checkpoint
from experiments.suite import (
    METRICS_FILE,
    RESULT_FILE,
    Paths,
    Run,
    Suite,
    budget,
    load_suite,
    main_runs,
    matching,
    read_result,
    result_record,
    run_tree,
    tuned,
    tuning_runs,
)
from experiments.suite_report import refreshed, report_text, write_report

logger = logging.getLogger("nt_hf.experiments")

ROOT = Path(__file__).parents[1]


@dataclass
class Programs:
    """The programs that are running, which a signal to this one saves and stops."""

    running: set[subprocess.Popen] = field(default_factory=set)
    stopping: bool = False

    def __post_init__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_) -> None:
        self.stopping = True
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)

    def call(self, program: str, *arguments: str, threads: int | None = None, log: Path | None = None) -> None:
        """Runs a program of this repository to its end; with a ``log`` its messages go there.

        Raises:
            Stopped: a signal came, before or meanwhile.
            ValueError: it failed; the message is its last line.
        """
        environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        with tempfile.TemporaryFile("w+") if log is None else open(log, "a+") as messages:
            if self.stopping:
                raise Stopped
            process = subprocess.Popen(
                [sys.executable, str(ROOT / program), *arguments], env=environment, stdout=messages, stderr=messages,
                start_new_session=True,  # Ctrl-C reaches it through here alone, as SIGTERM
            )  # fmt: skip
            self.running.add(process)
            if self.stopping:  # just now, too late for the signal's handler to know of it
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self.running.discard(process)
            if self.stopping:
                raise Stopped
            if code:
                messages.seek(0)
                last = (messages.read().strip().splitlines() or [f"exit code {code}"])[-1]
                raise ValueError(f"{program}: {last.removeprefix('error: ')}")


class Stopped(Exception):
    """A signal stopped the programs; what they had reached is saved."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True, help="a YAML file, see experiments/suites")
    parser.add_argument("--data_root", default="data", help="what {data_root} in the suite stands for (%(default)s)")
    parser.add_argument("--runs", type=Path, help="directory of the runs; default: runs/<suite>")
    parser.add_argument("--results", type=Path, help="directory of the results; default: experiments/results/<suite>")
    parser.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="runs to make, as 'runs/single/*'")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, which share the cores (%(default)s)")
    parser.add_argument("--list", action="store_true", help="show the runs and what they cost, and train nothing")
    parser.add_argument("--report", action="store_true", help="write tables and plots of the results there are, only")
    parser.add_argument("--document", type=Path, help="renew the tables that this Markdown file shows, too")
    parser.add_argument("--evaluate", metavar="RUN", help="evaluate this trained run (again), only")
    args = parser.parse_args()
    if args.parallel < 1:
        raise ValueError(f"--parallel {args.parallel}: accepted is a number from 1")

    suite = load_suite(args.suite)
    results = args.results or ROOT / "experiments" / "results" / suite.name
    paths = Paths(args.suite, args.data_root, args.runs or Path("runs") / suite.name, results)
    check_output(paths.runs, directory=True, option="--runs")
    check_output(paths.results, directory=True, option="--results")
    if args.document and not args.document.is_file():
        raise ValueError(f"--document {args.document}: accepted is a Markdown file")
    known = every_run(suite, paths.results)
    for glob in args.only:
        if not matching(known, [glob]):
            raise ValueError(
                f"--only {glob}: fits no run; accepted are globs of names such as {known[-1].name}, or "
                f"tuning/ARM/* and runs/ARM/*, of the arms {', '.join(suite.arms)}"
            )
    if args.list:
        print(listing(suite, paths.results, matching(known, args.only)))
        return
    if args.evaluate:
        write_result(suite, paths, find_run(suite, paths.results, args.evaluate))
        return
    if not args.report:
        if any(not run.tuning for run in matching(known, args.only)):
            check_evaluation(suite, paths)
        programs = Programs()
        try:
            with lock_directory(paths.runs):
                prepare(suite, paths, programs)
                train_all(suite, paths, matching(tuning_runs(suite), args.only), args.parallel, programs)
                main = matching(main_runs(suite, tuned(paths.results, suite)), args.only)
                train_all(suite, paths, main, args.parallel, programs)
        except Stopped:
            logger.info("stopped by a signal; the same command continues")
            sys.exit(EXIT_PREEMPTED)
        names = {run.name for run in main}
        for run in matching(known, args.only):
            if not run.tuning and run.name not in names:
                source = run.arm
                while source.learning_rate_of:
                    source = suite.arms[source.learning_rate_of]
                raise ValueError(
                    f"{run.name} has no learning rate yet; accepted first: --only 'tuning/{source.name}/*'"
                )
    print(report_text(suite, paths.results))
    write_report(suite, paths.results)
    if args.document:
        text = args.document.read_text(encoding="utf-8")
        write_atomic(args.document, refreshed(text, suite, paths.results))


def every_run(suite: Suite, results: Path) -> list[Run]:
    """All runs of a suite; a learning rate that is still to be chosen is the grid's first."""
    rates = dict.fromkeys(suite.arms, suite.tuning.learning_rates[0]) | tuned(results, suite)
    return [*tuning_runs(suite), *main_runs(suite, rates)]


def find_run(suite: Suite, results: Path, name: str) -> Run:
    runs = {run.name: run for run in every_run(suite, results)}
    if name not in runs:
        raise ValueError(f"--evaluate {name}: accepted are the runs that --list shows")
    return runs[name]


def listing(suite: Suite, results: Path, runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        cost, done = budget(suite, run), "done" if (results / run.name / RESULT_FILE).is_file() else ""
        lines.append(
            f"{run.name:40} {cost.units / 1e6:8.2f}M {suite.unit} {cost.flops / 1e15:9.3f} PFLOP, "
            f"{cost.active / 1e6:.2f}M of {cost.stored / 1e6:.2f}M parameters active  {done}"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- preparation


def prepare(suite: Suite, paths: Paths, programs: Programs) -> None:
    """The tokenizer, if the suite trains one, and the tokens; what is there already stays."""
    preparation = suite.preparation
    if not preparation.text:
        return
    text = ["--data", *paths.fill(preparation.text)]
    tokenizer = paths.fill(preparation.tokenizer or "{runs}/tokenizer")
    if not preparation.tokenizer and not Path(tokenizer, "tokenizer.json").is_file():
        size = str(preparation.vocab_size)
        programs.call("recipes/train_tokenizer.py", *text, "--vocab_size", size, "--output", tokenizer)
    tokens = str(paths.runs / "tokens")
    programs.call("recipes/prepare_c4.py", *text, "--tokenizer", tokenizer, "--output", tokens)


# ---------------------------------------------------------------------------------------------------------- runs


def train_all(suite: Suite, paths: Paths, runs: list[Run], parallel: int, programs: Programs) -> None:
    """Trains and evaluates the runs that have no result yet, ``parallel`` at a time.

    Raises:
        Stopped: a signal came.
        ValueError: some failed; the others were finished.
    """
    todo = [run for run in runs if not read_result(paths.results, suite, run)]
    threads = max(1, (os.cpu_count() or 1) // parallel)
    failed = []
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(train_one, suite, paths, run, threads, programs): run for run in todo}
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            name = futures[future].name
            try:
                logger.info("%d of %d: %s, validation loss %.4f", number, len(todo), name, future.result())
            except ValueError as error:
                failed.append(name)
                logger.error("%s failed: %s", name, error)
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} runs failed, for example {failed[0]}")


def train_one(suite: Suite, paths: Paths, run: Run, threads: int, programs: Programs) -> float:
    """Trains a run, or continues it, and writes its result; returns its validation loss."""
    run_dir = paths.runs / run.name
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir / "config.yaml"
    write_atomic(config, yaml.safe_dump(paths.fill(run_tree(suite, run)), sort_keys=False))
    programs.call(
        "recipes/train_images.py" if suite.of_images else "recipes/pretrain_c4.py",
        "--config", str(config), "--output_dir", str(run_dir),
        threads=threads, log=run_dir / "log.txt",
    )  # fmt: skip
    programs.call(
        "experiments/run.py", "--suite", str(paths.suite), "--data_root", paths.data_root, "--runs", str(paths.runs),
        "--results", str(paths.results), "--evaluate", run.name,
        threads=threads, log=run_dir / "log.txt",
    )  # fmt: skip
    return read_result(paths.results, suite, run)["validation"]["loss"]


# ---------------------------------------------------------------------------------------------------- evaluation


def write_result(suite: Suite, paths: Paths, run: Run) -> None:
    """Scores a trained run and writes its result and metrics."""
    run_dir, directory = paths.runs / run.name, paths.results / run.name
    records = read_metrics(run_dir / METRICS_FILE)
    steps = run_tree(suite, run)["train"]["max_steps"]
    last = last_record(records, "eval")
    if last is None or last["step"] < steps:
        raise ValueError(f"{run_dir}: is not trained to its end, step {steps}")
    result: dict[str, Any] = {"validation": last, "train_seconds": training_seconds(records, suite.unit)}
    if not run.tuning:
        result |= evaluate_checkpoint(suite, paths, run, run_dir / f"checkpoint-{steps}")
    origin = provenance() | {"command": f"python experiments/run.py --suite experiments/suites/{suite.name}.yaml"}
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / METRICS_FILE, (run_dir / METRICS_FILE).read_text())
    precision = read_sections([run_dir / "run.yaml"])["train"]["precision"]
    write_json(directory / RESULT_FILE, result_record(suite, run, precision, **result, machine=machine(), **origin))


def training_seconds(records: Sequence[Mapping[str, Any]], unit: str) -> float:
    """Time of the training steps alone, however often the run was stopped."""
    done, seconds = 0, 0.0
    for record in records:
        if record["event"] == "train":
            seconds += (record[unit] - done) / record[f"{unit}_per_second"]
            done = record[unit]
    return seconds


if __name__ == "__main__":
    program.run(main)
