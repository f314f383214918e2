"""``metrics.jsonl``, what a run measures while it trains."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomic, writing

logger = logging.getLogger(__name__)


class Metrics:
    """``metrics.jsonl``: one JSON object a record, written as it happens.

    Args:
        path: the file; its directory must exist.
        resume_step: keep the records up to this step, those of a run that is continued, and drop the rest;
            ``None``: a new run, keep nothing.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = path
        old = read_metrics(path) if path.exists() and resume_step is not None else []
        kept = [record for record in old if record["step"] <= resume_step]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, event: str, **values: Any) -> dict[str, Any]:
        """Appends a record of kind ``event`` (``train``, ``update``, ``eval``) and returns it."""
        record = {"event": event, **values}
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        return record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, one a line; the last line, if a killed run left it unfinished, is dropped.

    Raises:
        ValueError: another line is no JSON object with an ``event`` and its ``step``; the message names it.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    unfinished = lines.pop()  # "" where all is well
    records = []
    for number, line in enumerate([*lines, *filter(None, [unfinished])], 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number > len(lines):
                logger.warning("%s: dropped an unfinished line", path)
                break
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int or "event" not in record:
            raise ValueError(f"{path}, line {number}: accepted is a JSON object with event and step, not {line[:60]!r}")
        records.append(record)
    return records


def last_record(records: Sequence[Mapping[str, Any]], event: str) -> Mapping[str, Any] | None:
    """The last record of an event; ``None`` if there is none."""
    return next((record for record in reversed(records) if record["event"] == event), None)
