"""lm-eval's tasks for the module `zero_shot`: by name, with data from the hub or from local files of json lines."""

import contextlib
import gzip
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.tasks import TaskManager

from ..checks import one_line

#: The paper's seven tasks and MMLU.
DEFAULT_TASKS = (
    "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "mmlu",
)  # fmt: skip
_ALL = Path(lm_eval.tasks.__file__).parent
# The folders of lm-eval that hold them: reading all of its 14,000 files takes longer than scoring a small model.
_FOLDERS = ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa", "mmlu/default")
# Of lm-eval's command line; nothing is drawn at random without examples in the prompt.
SEED = 1234


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the running commentary and the progress bars of lm-eval and datasets."""
    loggers = [logging.getLogger("lm_eval"), logging.getLogger("transformers")]
    levels, bars_were_off = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's bars cannot be switched off
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if not bars_were_off:
            datasets.enable_progress_bars()


@dataclass(frozen=True)
class _LocalSet:
    """A data set as json lines: the name of its file, without extension, and the fields that a line must have."""

    file: str
    fields: Mapping[str, type]


_ANSWERED = {"choices": dict, "answerKey": str}
LOCAL_SETS = {
    "boolq": _LocalSet("boolq_superglue_validation", {"question": str, "passage": str, "label": int}),
    "piqa": _LocalSet("piqa_validation", {"goal": str, "sol1": str, "sol2": str, "label": int}),
    "hellaswag": _LocalSet(
        "hellaswag_validation", {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str}
    ),
    "winogrande": _LocalSet(
        "winogrande_xl_validation", {"sentence": str, "option1": str, "option2": str, "answer": str}
    ),
    "arc_easy": _LocalSet("arc_easy_test", {"question": str, **_ANSWERED}),
    "arc_challenge": _LocalSet("arc_challenge_test", {"question": str, **_ANSWERED}),
    "openbookqa": _LocalSet("openbookqa_test", {"question_stem": str, **_ANSWERED}),
    "mmlu": _LocalSet("mmlu_test", {"question": str, "subject": str, "choices": list, "answer": int}),
}
_EXTENSIONS = (".jsonl", ".jsonl.gz")


def _set_of(task: str) -> str:
    return "mmlu" if task.startswith("mmlu_") else task


def local_file(data_root: Path, task: str) -> Path:
    """The file of a task's local data set; all subjects of MMLU share one.

    Raises:
        ValueError: the task has no local form, or its file is missing.
    """
    local = LOCAL_SETS.get(_set_of(task))
    if local is None:
        raise ValueError(
            f"task={task!r}: cannot be read from data_root; accepted is {', '.join(LOCAL_SETS)}, or no data_root, to "
            "read it from the hub"
        )
    for extension in _EXTENSIONS:
        if (path := data_root / (local.file + extension)).is_file():
            return path
    raise ValueError(f"task={_set_of(task)!r}: {data_root} has no {local.file}{' or '.join(_EXTENSIONS)}")


def read_items(path: Path, task: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first ``limit`` items of a task's local data set; of MMLU's file those of the task's subject.

    Raises:
        ValueError: the file cannot be read or has no item, or a line lacks a field; the message names the line.
    """
    fields = LOCAL_SETS[_set_of(task)].fields
    items = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(items) == limit:
                    break
                item = _item(line, fields, f"{path}, line {number}") if line.strip() else None
                if item and task in (_set_of(task), f"mmlu_{item.get('subject')}"):
                    items.append(item)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error
    if not items:
        raise ValueError(f"{path}: holds no items of {task}")
    return items


def _item(line: str, fields: Mapping[str, type], where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(item, dict):
        raise ValueError(f"{where}: accepted is an object with {', '.join(fields)}")
    for name, kind in fields.items():
        if not isinstance(item.get(name), kind):
            problem = "is missing" if name not in item else f"is {item[name]!r:.40}"
            raise ValueError(f"{where}: field {name!r} {problem}; accepted is {kind.__name__}")
    return item


class Tasks:
    """lm-eval's tasks by name, their data from the hub or from the files of ``data_root``."""

    def __init__(self, data_root: Path | None = None):
        if data_root is not None and not data_root.is_dir():
            raise ValueError(f"data_root={str(data_root)!r}: accepted is a directory of json lines")
        self.data_root = data_root
        with quiet():
            self._manager = TaskManager(include_path=[str(_ALL / name) for name in _FOLDERS], include_defaults=False)

    def check(self, names: Iterable[str]) -> None:
        """Refuses names that are nowhere in lm-eval's files; this takes a second.

        [`leaves`] knows for certain, but reads and understands all of its 14,000 files to find a rare one.

        Raises:
            ValueError: lm-eval knows no such name.
        """
        rare = {name for name in names if name not in self._manager.task_index}
        files = (path for path in _ALL.rglob("*") if path.suffix in ("", ".yaml", ".yml") and path.is_file())
        while rare and (path := next(files, None)):
            text = path.read_text(encoding="utf-8", errors="replace")
            rare = {name for name in rare if not (name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text))}
        if rare:
            raise ValueError(_unknown(min(rare)))

    def leaves(self, name: str) -> list[str]:
        """The tasks that a task, group or tag stands for.

        Raises:
            ValueError: lm-eval knows no such name.
        """
        if name not in self._manager.task_index:
            with quiet():
                self._manager = TaskManager()
        entry = self._manager.task_index.get(name)
        if entry is None:
            raise ValueError(_unknown(name))
        members = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
        if entry.kind.name not in ("TAG", "GROUP") or not isinstance(members, list):
            return [name]
        names = (member if isinstance(member, str) else member.get("task") for member in members)
        return [leaf for member in names for leaf in self.leaves(member)]

    def by_size(self, group: str) -> bool | None:
        """Whether a group's score weighs its tasks by their size; ``None`` where lm-eval gives it no score."""
        entry = self._manager.task_index[group]
        metrics = (entry.cfg or {}).get("aggregate_metric_list") if entry.kind.name == "GROUP" else None
        return metrics[0].get("weight_by_size", True) if metrics else None

    def load(self, name: str, limit: int | None = None) -> Any:
        """lm-eval's task with its data, at most the first ``limit`` items where they are local.

        Raises:
            ValueError: its data cannot be read, or it is no task of answers to choose from.
        """
        changes: dict[str, Any] = {"task": name}
        if self.data_root is not None:
            items = read_items(local_file(self.data_root, name), name, limit)
            changes |= {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)}, "test_split": "test"}
            changes |= dict.fromkeys(("training_split", "validation_split", "fewshot_split", "dataset_kwargs"))
        try:
            # Changes to a task that lm-eval knows are made within a group.
            with quiet():
                task = self._manager.load([{"group": "one", "task": [changes]}])["tasks"][name]
        except Exception as error:  # no network, a changed data set, a field of the wrong form: errors of many types
            hint = "" if self.data_root else "; data_root reads local files instead of the hub"
            raise ValueError(f"task={name!r}: its data cannot be read ({one_line(error)}){hint}") from error
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise ValueError(
                f"task={name!r}: is of the kind {task.OUTPUT_TYPE}; accepted are tasks scored by the likelihood of "
                "given answers; lm_eval --model hf runs the others"
            )
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
        return task


def choose_tasks(tasks: Tasks, names: Sequence[str] | None) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What is scored: groups and tasks by name with the tasks they consist of, and why default ones are left out.

    Args:
        tasks: all tasks.
        names: of tasks, groups and tags; ``None``: ``DEFAULT_TASKS``, of which those without local data are left out.

    Raises:
        ValueError: a task is unknown, its local data are missing, or the local data have none of the default tasks.
    """
    requested = [name.strip() for name in names or DEFAULT_TASKS]
    tasks.check(requested)
    groups: dict[str, list[str]] = {}
    for name in requested:
        members = tasks.leaves(name)
        groups |= {task: [task] for task in members} if tasks.by_size(name) is None else {name: members}
    skipped: dict[str, str] = {}
    if tasks.data_root is None:
        return groups, skipped
    for name, members in groups.items():
        try:
            local_file(tasks.data_root, members[0])
        except ValueError as error:
            if names:
                raise
            skipped[name] = str(error)
    groups = {name: members for name, members in groups.items() if name not in skipped}
    if not groups:
        reason = next(iter(skipped.values()))
        raise ValueError(f"data_root={str(tasks.data_root)!r}: has the data of none of the tasks; {reason}")
    return groups, skipped


def _unknown(name: str) -> str:
    return f"task={name!r}: accepted is {', '.join(DEFAULT_TASKS)}, and what `lm_eval ls tasks` lists"
