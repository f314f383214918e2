"""Compares methods on the same text: trains every arm of a suite from several seeds, evaluates, and reports.

    python recipes/compare.py --suite recipes/suites/cpu-mini.yaml --data_root data
    python recipes/compare.py --suite recipes/suites/cpu-mini.yaml --report

The runs are the ordinary recipe's. First every arm's learning rate is chosen from the suite's grid at a share of the
budget, on a validation text of its own; then the arms are trained, the first seed of all before the second of any.
Finished runs are skipped, and killed ones continue from their checkpoints, when the same command is started again.
Results are small and kept in --results; checkpoints are in --runs and may be deleted once their result is there.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.suite import (
    METRICS,
    RESULT,
    Run,
    Suite,
    budget,
    load_suite,
    main_runs,
    matching,
    place,
    read_result,
    result_record,
    run_tree,
    tuned,
    tuning_runs,
)
from experiments.suite_report import refreshed, report_text, write_report
from nt_hf.cli.program import check_output, provenance, run, write_json, write_whole
from nt_hf.data.streams import load_tokenizer, read_texts
from nt_hf.evaluation.diversity import measure_diversity
from nt_hf.evaluation.perplexity import DocumentWindows, evaluate, load_for_evaluation
from nt_hf.training.metrics import read_metrics
from nt_hf.training.signals import EXIT_PREEMPTED

logger = logging.getLogger("nt_hf.compare")

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Places:
    """Where things are: the suite, the data, the runs with their checkpoints, and the results."""

    suite: Path
    data_root: str
    runs: Path
    results: Path

    def fill(self, value: Any) -> Any:
        return place(value, data_root=self.data_root, runs=str(self.runs))


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
    parser.add_argument("--suite", type=Path, required=True, help="a YAML file, see recipes/suites")
    parser.add_argument("--data_root", default="data", help="what {data_root} in the suite stands for (%(default)s)")
    parser.add_argument("--runs", type=Path, help="directory of the runs; default: runs/<suite>")
    parser.add_argument("--results", type=Path, help="directory of the results; default: docs/results/<suite>")
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
    runs, results = args.runs or Path("runs") / suite.name, args.results or ROOT / "docs" / "results" / suite.name
    places = Places(args.suite, args.data_root, runs, results)
    check_output(places.runs, directory=True, option="--runs")
    check_output(places.results, directory=True, option="--results")
    if args.document and not args.document.is_file():
        raise ValueError(f"--document {args.document}: accepted is a Markdown file")
    known = every_run(suite, places.results)
    for glob in args.only:
        if not matching(known, [glob]):
            raise ValueError(
                f"--only {glob}: fits no run; accepted are globs of names such as {known[-1].name}, or "
                f"tuning/ARM/* and runs/ARM/*, of the arms {', '.join(suite.arms)}"
            )
    if args.list:
        print(listing(suite, places.results, matching(known, args.only)))
        return
    if args.evaluate:
        write_result(suite, places, find_run(suite, places.results, args.evaluate))
        return
    if not args.report:
        if any(not each.tuning for each in matching(known, args.only)):
            check_evaluation(suite, places)
        programs = Programs()
        try:
            with locked(places.runs):
                prepare(suite, places, programs)
                train_all(suite, places, matching(tuning_runs(suite), args.only), args.parallel, programs)
                main = matching(main_runs(suite, tuned(places.results, suite)), args.only)
                train_all(suite, places, main, args.parallel, programs)
        except Stopped:
            logger.info("stopped by a signal; the same command continues")
            sys.exit(EXIT_PREEMPTED)
        names = {each.name for each in main}
        for each in matching(known, args.only):
            if not each.tuning and each.name not in names:
                source = each.arm
                while source.learning_rate_of:
                    source = suite.arms[source.learning_rate_of]
                raise ValueError(
                    f"{each.name} has no learning rate yet; accepted first: --only 'tuning/{source.name}/*'"
                )
    print(report_text(suite, places.results))
    write_report(suite, places.results)
    if args.document:
        text = args.document.read_text(encoding="utf-8")
        write_whole(args.document, refreshed(text, suite, places.results))


def every_run(suite: Suite, results: Path) -> list[Run]:
    """All runs of a suite; a learning rate that is still to be chosen is the grid's first."""
    rates = dict.fromkeys(suite.arms, suite.tuning.learning_rates[0]) | tuned(results, suite)
    return [*tuning_runs(suite), *main_runs(suite, rates)]


def find_run(suite: Suite, results: Path, name: str) -> Run:
    runs = {each.name: each for each in every_run(suite, results)}
    if name not in runs:
        raise ValueError(f"--evaluate {name}: accepted are the runs that --list shows")
    return runs[name]


def check_evaluation(suite: Suite, places: Places) -> None:
    """Looks for what the runs will be scored on before any is trained.

    Raises:
        ValueError: something is not there.
    """
    for name, source in places.fill(suite.evaluation.texts).items():
        try:
            read_texts([source])
        except ValueError as error:
            raise ValueError(f"evaluation.texts.{name}: {error}") from error
    if suite.evaluation.zero_shot and not Path(folder := places.fill(suite.evaluation.zero_shot)).is_dir():
        raise ValueError(f"evaluation.zero_shot={folder}: accepted is a directory of json lines")


def listing(suite: Suite, results: Path, runs: Sequence[Run]) -> str:
    lines = []
    for each in runs:
        cost, done = budget(suite, each), "done" if (results / each.name / RESULT).is_file() else ""
        lines.append(
            f"{each.name:40} {cost.tokens / 1e6:8.2f}M tokens {cost.flops / 1e15:9.3f} PFLOP, "
            f"{cost.active / 1e6:.2f}M of {cost.stored / 1e6:.2f}M parameters active  {done}"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def locked(runs: Path) -> Iterator[None]:
    """Keeps other programs like this one from a directory, however this one ends.

    Raises:
        ValueError: another one is at work there.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{runs}: another recipes/compare.py is at work there; accepted are other --runs"
            ) from None
        yield


# --------------------------------------------------------------------------------------------------- preparation


def prepare(suite: Suite, places: Places, programs: Programs) -> None:
    """The tokenizer, if the suite trains one, and the tokens; what is there already stays."""
    wanted = suite.preparation
    if not wanted.text:
        return
    text = ["--data", *places.fill(wanted.text)]
    tokenizer = places.fill(wanted.tokenizer or "{runs}/tokenizer")
    if not wanted.tokenizer and not Path(tokenizer, "tokenizer.json").is_file():
        size = str(wanted.vocab_size)
        programs.call("recipes/train_tokenizer.py", *text, "--vocab_size", size, "--output", tokenizer)
    tokens = str(places.runs / "tokens")
    programs.call("recipes/prepare_c4.py", *text, "--tokenizer", tokenizer, "--output", tokens)


# ---------------------------------------------------------------------------------------------------------- runs


def train_all(suite: Suite, places: Places, runs: list[Run], parallel: int, programs: Programs) -> None:
    """Trains and evaluates the runs that have no result yet, ``parallel`` at a time.

    Raises:
        Stopped: a signal came.
        ValueError: some failed; the others were finished.
    """
    todo = [each for each in runs if not read_result(places.results, suite, each)]
    threads = max(1, (os.cpu_count() or 1) // parallel)
    failed = []
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(train_one, suite, places, each, threads, programs): each for each in todo}
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            name = futures[future].name
            try:
                logger.info("%d of %d: %s, perplexity %.2f", number, len(todo), name, future.result())
            except ValueError as error:
                failed.append(name)
                logger.error("%s failed: %s", name, error)
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} runs failed, for example {failed[0]}")


def train_one(suite: Suite, places: Places, each: Run, threads: int, programs: Programs) -> float:
    """Trains a run, or continues it, and writes its result; returns its validation perplexity."""
    run_dir = places.runs / each.name
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir / "config.yaml"
    write_whole(config, yaml.safe_dump(places.fill(run_tree(suite, each)), sort_keys=False))
    programs.call(
        "recipes/pretrain_c4.py", "--config", str(config), "--output_dir", str(run_dir),
        threads=threads, log=run_dir / "log.txt",
    )  # fmt: skip
    programs.call(
        "recipes/compare.py", "--suite", str(places.suite), "--data_root", places.data_root, "--runs", str(places.runs),
        "--results", str(places.results), "--evaluate", each.name,
        threads=threads, log=run_dir / "log.txt",
    )  # fmt: skip
    return read_result(places.results, suite, each)["validation"]["perplexity"]


# ---------------------------------------------------------------------------------------------------- evaluation


def write_result(suite: Suite, places: Places, each: Run) -> None:
    """Scores a trained run and writes its result and metrics."""
    run_dir, directory = places.runs / each.name, places.results / each.name
    records = read_metrics(run_dir / METRICS)
    steps = run_tree(suite, each)["train"]["max_steps"]
    last = next((record for record in reversed(records) if record["event"] == "eval"), None)
    if last is None or last["step"] < steps:
        raise ValueError(f"{run_dir} is not trained to its end, step {steps}")
    found: dict[str, Any] = {"validation": last, "train_seconds": training_seconds(records)}
    if not each.tuning:
        found |= evaluate_checkpoint(suite, places, each, run_dir / f"checkpoint-{steps}")
    made = provenance() | {"command": f"python recipes/compare.py --suite recipes/suites/{suite.name}.yaml"}
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / METRICS, (run_dir / METRICS).read_text())
    write_json(directory / RESULT, result_record(suite, each, **found, machine=machine(), **made))


def training_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Time of the training steps alone, however often the run was stopped."""
    done, seconds = 0, 0.0
    for record in records:
        if record["event"] == "train":
            seconds += (record["tokens"] - done) / record["tokens_per_second"]
            done = record["tokens"]
    return seconds


def evaluate_checkpoint(suite: Suite, places: Places, each: Run, checkpoint: Path) -> dict[str, Any]:
    """Perplexity on every text, diversity and calibration on the first, zero-shot scores."""
    wanted = suite.evaluation
    model = load_for_evaluation(checkpoint)
    tokenizer = load_tokenizer(str(checkpoint))
    length = model.config.max_position_embeddings
    found: dict[str, Any] = {"texts": {}}
    for name, source in places.fill(wanted.texts).items():
        windows = DocumentWindows(
            read_texts([source]), tokenizer, length=length, batch_size=wanted.batch_size, max_tokens=wanted.max_tokens
        )
        try:
            scores = evaluate(model, windows)
            scores.bytes = windows.bytes
            found["texts"][name] = scores.to_dict() | {"documents": windows.documents}
            if "diversity" not in found:
                found["diversity"] = measure_diversity(model, windows).to_dict()
        except FloatingPointError as error:
            raise FloatingPointError(f"{checkpoint}, text {name}: {error}") from error
    if wanted.zero_shot and each.seed in suite.seeds[: wanted.zero_shot_seeds]:
        if importlib.util.find_spec("lm_eval") is None:
            logger.warning("no zero-shot scores: lm_eval is not installed")
            return found
        found["zero_shot"] = zero_shot(suite, places, checkpoint)
    return found


def zero_shot(suite: Suite, places: Places, checkpoint: Path) -> dict[str, Any]:
    """The scores of ``eval/zero_shot.py``, without those of single items."""
    output = checkpoint.parent / "zero_shot.json"
    limit = suite.evaluation.zero_shot_limit
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "eval" / "zero_shot.py"), "--model", str(checkpoint), "--output", str(output),
            "--data_root", places.fill(suite.evaluation.zero_shot), *(["--limit", str(limit)] if limit else []),
        ],
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"eval/zero_shot.py failed on {checkpoint}; its own last line, above, says why")
    report = json.loads(output.read_text())
    return {"limit": limit, "results": report["results"], "average": report["average"]}


def machine() -> dict[str, Any]:
    """On what a result was made."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    model = None
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), None)
    return {"gpu": gpu, "cpu": model or platform.processor(), "cores": os.cpu_count()}


if __name__ == "__main__":
    run(main)
