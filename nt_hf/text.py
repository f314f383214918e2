"""How results are written for readers: tables, strict JSON, plots."""

import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


def markdown_table(rows: Sequence[Sequence[str]], align: str = "<") -> str:
    """A Markdown table whose first row is the head; its columns are aligned for readers of plain text, too.

    ``align`` has ``<`` or ``>`` for each column; its last character is that of all further columns.
    """
    cells, widths = _aligned(rows, align)
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    rule = "|".join("-" * (width + 1) + (":" if _side(align, i) == ">" else "-") for i, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def plain_table(rows: Sequence[Sequence[str]], align: str = "<>", indent: str = "  ") -> str:
    """Lines of columns two spaces apart, with the ``align`` of [`markdown_table`]. An empty row is an empty line."""
    cells, _ = _aligned(rows, align)
    return "\n".join((indent + "  ".join(row)).rstrip() for row in cells)


def _aligned(rows: Sequence[Sequence[str]], align: str) -> tuple[list[list[str]], list[int]]:
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return [[f"{cell:{_side(align, i)}{widths[i]}}" for i, cell in enumerate(row)] for row in rows], widths


def _side(align: str, column: int) -> str:
    return align[min(column, len(align) - 1)]


def score_text(value: float, stderr: float | None) -> str:
    """A score with its standard error, where there is one."""
    return f"{value:.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def strict_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or holds NaN or Infinity, which Python alone takes for numbers of JSON.
    """

    def refuse(number: str) -> None:
        raise ValueError(f"{number} is no number of JSON")

    return json.loads(text, parse_constant=refuse)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files; ``None``, with a warning, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("no plots: matplotlib is not installed (pip install 'nt_hf[plots]')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
