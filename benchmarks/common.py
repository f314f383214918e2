"""What the benchmarks share: sides that take turns, figures beside their goals, and where they were measured."""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from nt_hf.cli.program import machine, provenance
from nt_hf.text import markdown_table

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Figure:
    """One measured number beside its goal.

    Attributes:
        row: of the table of goals in docs/performance.md.
        name: what was measured, on what.
        value: the number, a ratio within one run unless ``name`` says otherwise; ``None``: not measured, ``note`` says
            why.
        at_most, at_least: the goal, if there is one.
        note: what belongs to the number: absolute times, shapes, the other side.
    """

    row: int
    name: str
    value: float | None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def goal(self) -> str:
        bounds = (("≤", self.at_most), ("≥", self.at_least))
        return " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)

    @property
    def verdict(self) -> str:
        """ "met", "MISSED", "not run", or nothing where there is no goal."""
        if self.value is None:
            return "not run"
        if not self.goal:
            return ""
        met = (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )
        return "met" if met else "MISSED"


def seconds(function: Callable[[], object]) -> float:
    """Of one call, the device's work included."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each side's calls: every round calls each side once, so that what disturbs a machine disturbs all.

    The first ``warm_up`` rounds do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warm_up + rounds):
        for name, side in sides.items():
            times[name].append(seconds(side))
    return {name: values[warm_up:] for name, values in times.items()}


def ratio(times: Mapping[str, list[float]], side: str, reference: str) -> float:
    """Median over the rounds of a side's time divided by that of the ``reference``."""
    return statistics.median(a / b for a, b in zip(times[side], times[reference]))


def peak_bytes(function: Callable[[], object]) -> int | None:
    """Memory that a call needs beyond what is in use; ``None`` where the system does not tell."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free already is no use of memory
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the process's peak
        before = _resident("VmRSS")
        function()
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Of fp32 products, for a while; see ``train.matmul_precision`` in docs/train.md."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matmul_peak(dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """FLOP/s of the fastest of several square matrix products."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(12))


def bandwidth(size: int = 2**26) -> float:
    """Bytes a second, read and written, of a copy of ``size`` floats."""
    source, target = torch.ones(size, device=DEVICE), torch.empty(size, device=DEVICE)
    return 8 * size / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(7))


def conditions() -> dict[str, Any]:
    """Where and by what the figures were measured."""
    made_on = machine()
    cpu = f"{made_on['cpu']}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": made_on["gpu"] or cpu, **provenance()}


def table(figures: list[Figure]) -> str:
    """The figures as Markdown, goal and value side by side."""
    rows = [["", "figure", "goal", "measured", "", "note"]]
    for figure in figures:
        value = "" if figure.value is None else f"{figure.value:.3g}"
        rows.append([str(figure.row), figure.name, figure.goal, value, figure.verdict, figure.note])
    return markdown_table(rows)


def as_json(figures: list[Figure], measured_on: dict[str, Any]) -> dict[str, Any]:
    """A part of a benchmark: its figures and the machine."""
    rows = [vars(figure) | {"goal": figure.goal, "verdict": figure.verdict} for figure in figures]
    return {"machine": measured_on, "figures": rows}


def figures(parts: Mapping[str, Any]) -> list[Figure]:
    """Of all parts, in their order."""
    names = [field.name for field in fields(Figure)]
    return [Figure(**{name: row[name] for name in names}) for part in parts.values() for row in part["figures"]]
