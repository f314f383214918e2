"""Zero-shot scores of a checkpoint's ensemble and trails on the paper's tasks, by lm-eval.

    python eval/zero_shot.py --model runs/20m/checkpoint-20000 --output zero_shot.json --heads each

The data come from the hub, or with --data_root from json lines. The tasks run one after the other, and the file is
written after each: what an interrupted run has reached stays, marked as incomplete.
"""

import argparse
import logging
import time
from pathlib import Path

from nt_hf.cli.program import check_output, provenance, run, write_json
from nt_hf.data.streams import check_vocabulary, load_tokenizer
from nt_hf.evaluation.perplexity import load_config, load_for_evaluation
from nt_hf.evaluation.zero_shot import TrailsLM, average, choose_scorers, combine_tasks, results_table, score_task
from nt_hf.evaluation.zero_shot_tasks import DEFAULT_TASKS, SEED, Tasks, local_file
from nt_hf.models.configuration_neurotrails_llama import ENSEMBLE_MODES
from nt_hf.training.device import peak_memory

logger = logging.getLogger("nt_hf.zero_shot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory, NeuroTrails or stock Llama")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--tasks", help=f"lm-eval's names, with commas; default: {','.join(DEFAULT_TASKS)}")
    parser.add_argument("--data_root", type=Path, help="a directory of json lines to read instead of the hub")
    parser.add_argument("--heads", default="ensemble", help="'ensemble', 'each' (it and every trail), or as in '0,2'")
    parser.add_argument("--ensemble_mode", choices=ENSEMBLE_MODES, help="default: the model's own")
    parser.add_argument("--limit", type=int, help="only the first items of each task, so many")
    parser.add_argument("--batch_size", default="auto", help="rows a batch, or 'auto'")
    args = parser.parse_args()

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
    names = [name.strip() for name in args.tasks.split(",")] if args.tasks else DEFAULT_TASKS
    tasks.check(names)
    wanted: dict[str, list[str]] = {}  # what gets a score of its own, and the tasks it consists of
    for name in names:
        leaves = tasks.leaves(name)
        wanted |= {leaf: [leaf] for leaf in leaves} if tasks.by_size(name) is None else {name: leaves}
    skipped = {}
    if args.data_root:
        for name, leaves in wanted.items():
            try:
                local_file(args.data_root, leaves[0])
            except ValueError as error:
                if args.tasks:
                    raise
                skipped[name] = str(error)
        wanted = {name: leaves for name, leaves in wanted.items() if name not in skipped}
        if not wanted:
            reason = next(iter(skipped.values()))
            raise ValueError(f"--data_root {args.data_root}: has the data of none of the tasks; {reason}")

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
    results = {}
    for name, leaves in wanted.items():
        done = {}
        for leaf in leaves:
            try:
                done[leaf] = score_task(lm, tasks.load(leaf, args.limit), args.limit)
            except (ValueError, FloatingPointError) as error:
                report["failed"][leaf] = str(error)
                logger.warning("%s failed: %s", leaf, error)
                continue
            report["tasks"][leaf] = found = done[leaf]
            logger.info("%s: %d items, %.1f s", leaf, found.items, found.seconds)
            if found.truncated:
                logger.warning(
                    "%s: %d of %d contexts were longer than the model's and lost their beginning",
                    leaf, found.truncated, found.requests,
                )  # fmt: skip
            write_json(args.output, report)
        if len(done) == len(leaves):
            by_size = tasks.by_size(name)
            results[name] = done[name].scores if by_size is None else combine_tasks(done, by_size)
            weights = [result.items if by_size else 1 for result in done.values()]
            report["members"][name] = {"tasks": leaves, "weights": weights}
        report |= {"results": results, "average": average(results)}
        report |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory(model.device)}
        write_json(args.output, report)
    if results:
        print(results_table(results))
    for reason in skipped.values():
        print(f"not run: {reason}")
    report["complete"] = not report["failed"]
    write_json(args.output, report)
    if report["failed"]:
        raise ValueError(f"{', '.join(report['failed'])} failed; {args.output} holds the others, marked as incomplete")


if __name__ == "__main__":
    run(main)
