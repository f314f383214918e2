"""Compares results of eval/zero_shot.py side by side, with a paired bootstrap over the items.

    python eval/compare.py dense.json neurotrails.json --output comparison
    python eval/compare.py neurotrails.json --output comparison                         # its trails and its ensemble
    python eval/compare.py dense.json "neurotrails.json:head 0" --output comparison     # one trail of it

Differences are from the first; where 0 lies outside the 95 % interval stands a star. Many rows and columns give some
stars by chance.
"""

import argparse
from pathlib import Path

from nt_hf.cli.program import check_output, provenance, run, write_json, write_whole
from nt_hf.evaluation.comparison import compare, comparison_table, plot_comparison, read_columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="FILE[:SCORER]", help="JSON files of eval/zero_shot.py")
    parser.add_argument("--output", type=Path, required=True, help="a directory for the table, JSON and plots")
    args = parser.parse_args()

    check_output(args.output, directory=True)
    columns = read_columns(args.results)
    rows, notes = compare(columns)
    text = "\n".join([comparison_table(columns, rows), "", *(f"- {note}" for note in notes)]).rstrip()
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "comparison.md", text + "\n")
    names = [column.name for column in columns]
    write_json(args.output / "comparison.json", {"columns": names, "rows": rows, "notes": notes, **provenance()})
    plot_comparison(columns, rows, args.output / "comparison")


if __name__ == "__main__":
    run(main)
