"""What a run tells while it trains: metrics, trackers, a progress bar or lines of a log."""

import contextlib
import logging
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..config import RunConfig, TrainConfig
from ..files import write_text
from ..models.configuration_neurotrails import MultiHeadConfig
from ..plan.hardware import peak_tflops
from .checkpoint import Progress
from .launch import wants_bf16
from .metrics import Metrics
from .tasks import Task

logger = logging.getLogger(__name__)


class RunLog:
    """The records of a run, written by the main process.

    Args:
        path: of the metrics; its directory must exist.
        task: of the run.
        train: its settings.
        model: the model's configuration.
        accelerator: of this process, with the trackers that also get all numbers.
        progress: how far the run is when the log is opened.
        continued: keep the records up to that step.
    """

    def __init__(
        self,
        path: Path,
        task: Task,
        train: TrainConfig,
        model: MultiHeadConfig,
        accelerator: Accelerator,
        progress: Progress,
        *,
        continued: bool,
    ):
        device = accelerator.device
        self.path, self._task, self._train, self._accelerator = path, task, train, accelerator
        if accelerator.is_main_process:
            self._metrics = Metrics(path, progress.step if continued else None)
        peak = train.peak_tflops
        if not peak and device.type == "cuda" and wants_bf16(train):
            peak = peak_tflops(torch.cuda.get_device_name(device))
        self._flops_per_unit = task.flops_per_unit(model) if peak else None
        self._peak_flops = peak * 1e12 * accelerator.num_processes if self._flops_per_unit else None
        self.stopwatch = Stopwatch(progress.units)

    def start_bar(self, step: int) -> None:
        """Shows a progress bar on a terminal; a log file gets a line per logged step instead."""
        show = self._accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=self._train.max_steps, initial=step, disable=not show, unit="step", dynamic_ncols=True)

    def write(self, event: str, **values: Any) -> None:
        """Writes a record to the metrics and to the trackers."""
        if self._accelerator.is_main_process:
            self._metrics.write(event, **values)
            self._accelerator.log(dict(flat_numbers(event, values)), step=values["step"])

    def write_step(self, record: Mapping[str, Any], head_losses: Sequence[float], grad_norm: float) -> None:
        """Writes the record of a training step, completed by what was measured and by the speed since the last one.

        Args:
            record: with ``step``, the task's unit and ``data_wait``, the seconds that training has waited for data.
            head_losses: mean loss of each head.
            grad_norm: norm of the gradient before clipping.
        """
        train, task, step = self._train, self._task, record["step"]
        loss = sum(head_losses) / len(head_losses)
        figures = task.loss_figures(loss)
        seconds, speed = self.stopwatch.lap(record[task.unit])
        mfu = self._flops_per_unit * speed / self._peak_flops if self._peak_flops else None
        self.write(
            "train", **{**record, "data_wait": record["data_wait"] / seconds}, loss=loss, **figures,
            head_losses=head_losses, grad_norm=grad_norm, **{f"{task.unit}_per_second": speed},
            mfu=mfu,
        )  # fmt: skip
        shown = [f"loss {loss:.3f}", *(f"{name} {value:.1f}" for name, value in figures.items())]
        shown.append(f"{speed:,.0f} {task.unit}/s")
        if mfu is not None:
            shown.append(f"MFU {mfu:.1%}")
        status = ", ".join(shown)
        self.bar.set_postfix_str(status)
        if self.bar.disable:
            left = tqdm.format_interval((train.max_steps - step) * task.units_per_step / speed)
            logger.info("step %d of %d: %s, %s left", step, train.max_steps, status, left)


def start_tracker(accelerator: Accelerator, config: RunConfig, run_dir: Path, step: int) -> None:
    """Starts the tracker that the accelerator was made for, under the name of the run's directory.

    A run that continues after ``step`` steps continues in the tracker, too: in TensorBoard what came after them is
    hidden; wandb finds it by the id that is in the directory, trackio by its name.
    """
    settings = {
        f"{section}/{key}": value if isinstance(value, int | float | str) else str(value)
        for section, values in config.to_dict().items()
        for key, value in values.items()
    }
    options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1} if step else {}}
    if accelerator.is_main_process:
        identity = run_dir / "tracker_id"
        if not (step and identity.is_file()):
            write_text(identity, uuid.uuid4().hex[:12])
        resume = "allow" if step else "never"
        options["wandb"] = {"name": run_dir.name, "id": identity.read_text(), "resume": resume}
        options["trackio"] = {"name": run_dir.name, "resume": resume}
    accelerator.init_trackers("nt_hf", config=settings, init_kwargs=options)


def flat_numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in nested records as ``name/key/index``, for trackers."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat_numbers(f"{name}/{key}", item)


class Stopwatch:
    """Time that training takes between two log lines; evaluations and saves do not count.

    Args:
        units: of the task (tokens, for example) that training has seen when it starts.
    """

    def __init__(self, units: int):
        self._start, self._units = time.perf_counter(), units

    def lap(self, units: int) -> tuple[float, float]:
        """Seconds since the last lap, and units per second in it."""
        seconds = time.perf_counter() - self._start
        speed = (units - self._units) / seconds
        self._start, self._units = time.perf_counter(), units
        return seconds, speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time that the block takes."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin
