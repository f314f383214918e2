"""Tables in Markdown that are aligned for readers of plain text."""

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is the head, its columns aligned for readers of plain text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def score_text(value: float, stderr: float | None) -> str:
    """A score with its standard error, where there is one."""
    return f"{value:.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")
