"""How results are written for readers: tables, strict JSON, plots."""

import json
import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is the head, its columns aligned for readers of plain text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


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
