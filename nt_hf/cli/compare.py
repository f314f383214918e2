"""Compares results of nt-hf evaluate zero-shot side by side, with a paired bootstrap over the items.

    nt-hf evaluate compare dense.json neurotrails.json --output comparison
    nt-hf evaluate compare neurotrails.json --output comparison                         # its trails and its ensemble
    nt-hf evaluate compare dense.json "neurotrails.json:head 0" --output comparison     # one trail of it

Differences are from the first; where 0 lies outside the 95 % interval stands a star. Many rows and columns give some
stars by chance.
"""

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.comparison import compare_columns, comparison_table, plot_comparison, read_columns
from ..files import write_atomic, write_json
from .program import check_output, provenance, verb_parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = verb_parser("evaluate compare", __doc__)
    parser.add_argument("results", nargs="+", metavar="FILE[:SCORER]", help="JSON files of nt-hf evaluate zero-shot")
    parser.add_argument("--output", type=Path, required=True, help="a directory for the table, JSON and plots")
    args = parser.parse_args(argv)

    check_output(args.output, directory=True)
    columns = read_columns(args.results)
    rows, notes = compare_columns(columns)
    text = "\n".join([comparison_table(columns, rows), "", *(f"- {note}" for note in notes)]).rstrip()
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomic(args.output / "comparison.md", text + "\n")
    names = [column.name for column in columns]
    write_json(args.output / "comparison.json", {"columns": names, "rows": rows, "notes": notes, **provenance()})
    plot_comparison(columns, rows, args.output / "comparison")
