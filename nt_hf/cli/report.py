"""Writes the table and the plot of a run, also while the run is still training.

    nt-hf report runs/demo

They are in the run's folder report/; the table is printed, too.
"""

from collections.abc import Sequence
from pathlib import Path

from ..training.report import write_report
from .program import verb_parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = verb_parser("report", __doc__)
    parser.add_argument("run", type=Path, help="the directory of a run of nt-hf train")
    run_dir = parser.parse_args(argv).run
    if not (run_dir / "metrics.jsonl").is_file():
        raise ValueError(f"{run_dir}: has no metrics.jsonl; accepted is the directory of a run")
    table, files = write_report(run_dir)
    print(f"{table}\n\nwritten: {', '.join(map(str, files))}")
