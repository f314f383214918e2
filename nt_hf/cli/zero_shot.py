"""Zero-shot scores of a checkpoint's ensemble and trails on the paper's tasks, by lm-eval.

    nt-hf evaluate zero-shot --model runs/20m/checkpoint-20000 --output zero_shot.json --heads each

The data come from the hub, or with --data_root from json lines. The tasks run one after the other, and the file is
written after each: what an interrupted run has reached stays, marked as incomplete.
"""

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.tokenizers import check_vocabulary, load_tokenizer
from ..evaluation.perplexity import load_config, load_for_evaluation
from ..evaluation.zero_shot import TrailsLM, average, choose_scorers, combine_tasks, results_table, score_task
from ..evaluation.zero_shot_tasks import DEFAULT_TASKS, SEED, Tasks, choose_tasks
from ..files import write_json
from ..models.configuration_neurotrails import ENSEMBLE_MODES
from ..training.device import peak_memory
from .program import check_output, provenance, verb_parser

logger = logging.getLogger("nt_hf.zero_shot")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    began = time.perf_counter()
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: accepted is a number from 1")
    if args.batch_size != "auto" and not (args.batch_size.isdecimal() and int(args.batch_size)):
        raise ValueError(f"--batch_size {args.batch_size}: accepted are 'auto' and numbers from 1")
    check_output(args.output)
    config = load_config(args.model)
    scorers = choose_scorers(config, args.heads)
    tokenizer = load_tokenizer(str(args.model))
    check_vocabulary(tokenizer, config.vocab_size)
    tasks = Tasks(args.data_root)
    groups, skipped = choose_tasks(tasks, args.tasks and args.tasks.split(","))

    model = load_for_evaluation(args.model)
    if args.ensemble_mode:
        model.config.ensemble_mode = args.ensemble_mode
    lm = TrailsLM(model, tokenizer, scorers, None if args.batch_size == "auto" else int(args.batch_size))
    report = {
        "complete": False,
        "results": {},
        "average": {},
        "members": {},
        "skipped": skipped,
        "failed": {},
        "model": str(args.model),
        "scorers": {scorer.name: scorer.heads for scorer in scorers},
        "ensemble_mode": model.config.ensemble_mode,
        "limit": args.limit,
        "data_root": args.data_root and str(args.data_root),
        "seed": SEED,
        **provenance("lm_eval", "datasets"),
        "model_config": model.config.to_dict(),
        "tasks": {},
    }

    def write() -> None:
        write_json(args.output, report)

    for name, members in groups.items():
        score_group(lm, tasks, name, members, args.limit, report, write)
        report |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory(model.device)}
        write()
    if report["results"]:
        print(results_table(report["results"]))
    for reason in skipped.values():
        print(f"not run: {reason}")
    report["complete"] = not report["failed"]
    write()
    if report["failed"]:
        raise ValueError(f"{', '.join(report['failed'])} failed; {args.output} holds the others, marked as incomplete")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = verb_parser("evaluate zero-shot", __doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="a checkpoint directory, of a multi-head or a stock model"
    )
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--tasks", help=f"lm-eval's names, with commas; default: {','.join(DEFAULT_TASKS)}")
    parser.add_argument("--data_root", type=Path, help="a directory of json lines to read instead of the hub")
    parser.add_argument("--heads", default="ensemble", help="'ensemble', 'each' (it and every trail), or as in '0,2'")
    parser.add_argument("--ensemble_mode", choices=ENSEMBLE_MODES, help="default: the model's own")
    parser.add_argument("--limit", type=int, help="only the first items of each task, so many")
    parser.add_argument("--batch_size", default="auto", help="rows a batch, or 'auto'")
    return parser.parse_args(argv)


def score_group(
    lm: TrailsLM, tasks: Tasks, name: str, members: Sequence[str], limit: int | None, report: dict[str, Any],
    write: Callable[[], None],
) -> None:  # fmt: skip
    """Scores the tasks of a group and adds them to the report, which is written after each."""
    scored: dict[str, Any] = {}
    for task in members:
        try:
            result = score_task(lm, tasks.load(task, limit), limit)
        except (ValueError, FloatingPointError) as error:
            report["failed"][task] = str(error)
            logger.warning("%s failed: %s", task, error)
            continue
        report["tasks"][task] = scored[task] = result
        logger.info("%s: %d items, %.1f s", task, result.items, result.seconds)
        if result.truncated:
            count, total = result.truncated, result.requests
            logger.warning(
                "%s: %d of %d contexts were longer than the model's and lost their beginning", task, count, total
            )
        write()
    if len(scored) == len(members):
        by_size = tasks.by_size(name)
        report["results"][name] = scored[name].scores if by_size is None else combine_tasks(scored, by_size)
        weights = [result.items if by_size else 1 for result in scored.values()]
        report["members"][name] = {"tasks": members, "weights": weights}
    report["average"] = average(report["results"])
