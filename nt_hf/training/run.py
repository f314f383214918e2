"""A training run: from a configuration to checkpoints, metrics and a report."""

import contextlib
import dataclasses
import itertools
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed

from ..config import RunConfig, load_run_config
from ..files import write_atomic
from ..sparsity.measures import TopologyUpdate
from ..sparsity.sharding import full_tensor, require_equal_replicas
from ..sparsity.sparsifier import Sparsifier
from .batches import Batch, grouped
from .checkpoint import Progress, TrainingState, cannot_continue, load_model, load_training_state, save_checkpoint
from .device import HostCopy, peak_memory
from .initial_model import first_masks, initial_model
from .launch import (
    end_training,
    fastest_precision,
    lock_run,
    main_process_only,
    settle_precision,
    start_processes,
)
from .manifest import clean_up, first_intact, set_aside
from .metrics import read_metrics
from .model_setup import place_model, running_statistics, wrap_model
from .optimizer import learning_rate, make_optimizer
from .report import training_card, write_report
from .resume import changed_keys, find_resume, recorded_precision, refuse_changes
from .run_log import RunLog, start_tracker
from .signals import EXIT_PREEMPTED, Preemption
from .tasks import task_of

logger = logging.getLogger(__name__)


def run_training(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: str = "auto",
    resume_override: bool = False,
    log_with: str = "none",
) -> None:
    """Starts or continues a run on the processes that a launcher has started; see [`TrainingRun`] for the arguments.

    Raises:
        ValueError: a setting, the data or the checkpoint to continue from does not fit; nothing has been written.
        OSError: a file cannot be read or written.
        FloatingPointError: a loss or a weight is not finite.
        SystemExit: a signal stopped the run (`EXIT_PREEMPTED`).
    """
    # Settled before anything runs and kept in run.yaml: a run stays bit for bit the same when it is continued.
    settled = settle_precision(config.train, recorded_precision(resume, run_dir))
    if config.train.precision == "auto" and settled.precision != (fastest := fastest_precision()):
        logger.warning(
            "train.precision=auto: the run goes on in %s, as it began; a new one would take %s here",
            settled.precision,
            fastest,
        )
    config = dataclasses.replace(config, train=settled)
    with Preemption() as preemption:
        accelerator, sharding = start_processes(config.train, run_dir, log_with)
        with lock_run(run_dir, accelerator):
            run = TrainingRun(config, run_dir, accelerator, preemption, sharding)
            run.setup(resume, resume_override)
            if log_with != "none":
                start_tracker(accelerator, config, run_dir, run.state.progress.step)
            run.train()


@dataclasses.dataclass
class StepResult:
    """What one optimizer step gives. The tensors are on the device, which may not have computed them yet.

    Attributes:
        rate: the learning rate.
        head_losses: mean loss of each head over this process's targets, ``[heads]``.
        grad_norm: norm of the gradient before clipping, ``[]``; ``None`` where nothing asked for it.
        update: the topology update of the step, if it had one.
    """

    rate: float
    head_losses: torch.Tensor
    grad_norm: torch.Tensor | None
    update: TopologyUpdate | None


class TrainingRun:
    """One training run on this process: `setup`, then `train`, which calls `step`, `evaluate`, `log`, `save`, `stop`.

    All processes of a run do the same in the same order; only the main process writes and logs.

    Args:
        config: the whole configuration.
        run_dir: directory for checkpoints, metrics and the report.
        accelerator: of this process.
        preemption: knows whether a signal asked the process to stop.
        sharding: settings of FSDP2; ``None`` for one process or DDP.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        accelerator: Accelerator,
        preemption: Preemption,
        sharding: FullyShardedDataParallelPlugin | None = None,
    ):
        self.config, self.run_dir = config, run_dir
        self.accelerator, self.preemption, self.sharding = accelerator, preemption, sharding
        self.device, self.is_main = accelerator.device, accelerator.is_main_process
        self.passes = config.train.accumulation_steps(accelerator.num_processes)[1]
        self.last_saved: Path | None = None
        self.updates = 0  # since this process started
        # The first step with a loss that is not finite, -1 for none: kept on the device, so that no step waits for it.
        self.first_bad_step = torch.tensor(-1, device=self.device)
        self.unlogged: tuple[dict[str, Any], HostCopy] | None = None
        # How many processes had received a signal, at the last two steps.
        self.signals: Sequence[HostCopy | None] = (None, None)
        self.seconds_waited = 0.0  # for data, since the last logged step
        if not self.is_main:
            logging.getLogger("nt_hf").setLevel(logging.WARNING)

    # ------------------------------------------------------------------------------------------------- setup

    def setup(self, resume: str = "auto", resume_override: bool = False) -> None:
        """Reads or makes everything that training needs. Nothing is written before all of it is known to fit.

        Args:
            resume: ``"auto"`` continues from the newest intact checkpoint of ``run_dir``, ``"never"`` starts a new run,
                a path continues from that checkpoint.
            resume_override: continue although the configuration changed.

        Raises:
            ValueError: something does not fit, or the data cannot be read.
        """
        config, train = self.config, self.config.train
        set_seed(train.seed)
        torch.set_float32_matmul_precision(train.matmul_precision)
        checkpoint = main_process_only(lambda: first_intact(find_resume(resume, self.run_dir)), self.accelerator)
        written = (checkpoint or self.run_dir) / "run.yaml"
        continues = written.is_file() and (checkpoint or resume != "never")
        previous = load_run_config([written]) if continues else config
        previous.train = settle_precision(previous.train, recorded="auto")
        changes = changed_keys(config, previous, written)

        self.task = task = task_of(config, self.accelerator)
        shape = task.model_config()
        batches = task.training_batches(shape.num_ensemble_heads)
        self.validation = task.validation_batches()
        if changes and resume_override:
            logger.warning("continuing with another configuration: %s", changes)
        elif changes:
            refuse_changes(changes, written, checkpoint and cannot_continue(checkpoint, task, batches))
        task.check_model(shape)

        if checkpoint:
            self.model = load_model(checkpoint, task)
        else:
            self.model = initial_model(config, shape, task).to(self.device)
            first_masks(self.model, config, task)
        place_model(self.model, train, self.accelerator, self.sharding)
        optimizer = make_optimizer(self.model, train)
        sparsifier = Sparsifier(self.model, optimizer, config.sparsity, total_steps=train.max_steps)
        progress = Progress(0, 0, False, self.accelerator.num_processes, task.fingerprint)
        self.state = TrainingState(self.accelerator, self.model, task, optimizer, sparsifier, batches, config, progress)
        if checkpoint:
            self._restore(checkpoint, previous)
        self.wrapped = wrap_model(self.model, train, self.accelerator, self.sharding)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.statistics = list(running_statistics(self.model).values())
        self._read_ahead()
        self._open_files(continued=checkpoint is not None)

    def _restore(self, checkpoint: Path, previous: RunConfig) -> None:
        """Loads the training state of a checkpoint, written with the configuration ``previous``."""
        train, key = self.config.train, self.task.fingerprint_key
        load_training_state(checkpoint, self.state)
        self.last_saved = checkpoint
        progress = self.state.progress
        if progress.fingerprint != self.task.fingerprint:
            value = getattr(self.config.data, key.partition(".")[2])
            raise ValueError(f"{key}={value!r}: {checkpoint} was trained with {self.task.misfit}")
        progress.processes = self.accelerator.num_processes
        rate, rate_before = (learning_rate(progress.step, settings) for settings in (train, previous.train))
        if rate != rate_before and progress.step < train.max_steps:
            logger.info(
                "the learning rate of the next step is %.3g; without the changes it would be %.3g", rate, rate_before
            )

    def _read_ahead(self) -> None:
        """Reads the first batches before anything is written: unreadable data leaves no run behind."""
        next(iter(self.validation), None)
        self.groups = grouped(self.state.batches, self.passes)
        if self.state.progress.step < self.config.train.max_steps:
            self.groups = itertools.chain([next(self.groups)], self.groups)

    def _open_files(self, continued: bool) -> None:
        """Makes the run's directory as it has to be at the step that the run starts from."""
        progress = self.state.progress
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            clean_up(self.run_dir)
            set_aside(self.run_dir, after=progress.step)
            write_atomic(self.run_dir / "run.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        path = self.run_dir / "metrics.jsonl"
        self.run_log = RunLog(
            path, self.task, self.config.train, self.model.config, self.accelerator, progress, continued=continued
        )

    # -------------------------------------------------------------------------------------------------- loop

    def train(self) -> None:
        """Trains to the last step and writes the report, or until a signal: then it saves and exits.

        Raises:
            FloatingPointError: a loss or a weight is not finite.
            SystemExit: a signal came (`EXIT_PREEMPTED`).
        """
        train, progress = self.config.train, self.state.progress
        self.describe()
        if not progress.evaluated:
            with self.run_log.stopwatch.paused():
                if not self.evaluate():
                    self.stop()
        self.run_log.start_bar(progress.step)
        while progress.step < train.max_steps:
            result = self.step(self._next_group())
            self.log()  # of an earlier step: the device is busy with this one meanwhile
            self._after_step(result)
            stopping = self._signal_received()
            if stopping or self._is_due(train.eval_steps) or self._is_due(train.save_steps):
                self.log()
                with self.run_log.stopwatch.paused():
                    self._evaluate_and_save(stopping)
        self.run_log.bar.close()
        self.finish()

    def _next_group(self) -> list[Batch]:
        begin = time.perf_counter()
        group = next(self.groups)
        self.seconds_waited += time.perf_counter() - begin
        return group

    def _is_due(self, interval: int) -> bool:
        """Whether what happens every ``interval`` steps happens after this one; all does after the last."""
        step = self.state.progress.step
        return step % interval == 0 or step == self.config.train.max_steps

    def step(self, group: Sequence[Batch]) -> StepResult:
        """One optimizer step over the batches of a group: forward and backward passes, topology update, update."""
        state, train, step = self.state, self.config.train, self.state.progress.step + 1
        head_losses = self._accumulate_gradients(group)
        self._average_statistics()
        bad = (self.first_bad_step < 0) & ~head_losses.mean().isfinite()
        self.first_bad_step = torch.where(bad, step, self.first_bad_step)
        if state.sparsifier.update_is_next:
            self.require_finite()

        rate = learning_rate(step - 1, train)
        for parameter_group in state.optimizer.param_groups:
            parameter_group["lr"] = rate * parameter_group["learning_rate_factor"]
        update = state.sparsifier.step()  # may move weights; from here on gradients are masked
        grad_norm = None
        if train.max_grad_norm or step % train.log_steps == 0 or step == train.max_steps:
            limit = train.max_grad_norm or float("inf")
            grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.progress.step = step
        state.progress.units += self.task.units_per_step
        self.run_log.bar.update()
        return StepResult(rate, head_losses, grad_norm, update)

    def _accumulate_gradients(self, group: Sequence[Batch]) -> torch.Tensor:
        """Forward and backward passes over a group; returns this process's share of the heads' losses, ``[heads]``.

        Every pass adds its share of the mean over the targets of the whole step, on all processes: so each target
        counts the same, however the step is divided.
        """
        accelerator, processes = self.accelerator, self.accelerator.num_processes
        # Filled on the device: copying a number from the host to the device would wait for the device.
        counts = [
            torch.full((), number, device=self.device)
            for number in (*self.task.count_targets(group), int(self.preemption.received))
        ]
        *targets, signals = accelerator.reduce(torch.stack(counts)).unbind()
        # One number for all heads, or one per head. Gradients are averaged over processes, but the loss is to be the
        # mean over all targets: hence the division.
        targets = torch.stack(targets) / processes
        self.signals = (self.signals[1], HostCopy(received=signals))
        head_losses = torch.zeros(self.model.config.num_ensemble_heads, device=self.device)
        for number, batch in enumerate(group, 1):
            last = number == len(group)
            if self.sharding:
                self.model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or self.sharding else accelerator.no_sync(self.wrapped):
                loss, of_heads = self.task.losses(self.wrapped, batch, targets)
                accelerator.backward(loss * len(of_heads) if self.config.train.head_loss == "sum" else loss)
            head_losses += of_heads.detach() / processes
        return head_losses

    def _average_statistics(self) -> None:
        """Makes running statistics, which every process takes of its own batches, the mean over all processes."""
        if self.statistics and self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(torch.cat([values.flatten() for values in self.statistics]), "mean")
            for values, new in zip(self.statistics, mean.split([values.numel() for values in self.statistics])):
                values.copy_(new.view_as(values))

    def _after_step(self, result: StepResult) -> None:
        """Logs a topology update and prepares the record of a step that is to be logged."""
        step, sparsifier, batches = self.state.progress.step, self.state.sparsifier, self.state.batches
        if result.update:
            active = sparsifier.report().overall.active
            self.run_log.write("update", **dataclasses.asdict(result.update), active=active)
            self.updates += 1
            replicas = not self.sharding and self.accelerator.num_processes > 1
            if replicas and self.updates % self.config.train.check_interval == 0:
                require_equal_replicas(self.model, self.state.optimizer)
        if not self._is_due(self.config.train.log_steps):
            return
        record = {
            "step": step, self.task.unit: self.state.progress.units, "lr": result.rate, "epoch": batches.epoch,
            "bad_lines": batches.bad_lines, "data_wait": self.seconds_waited, "peak_memory": peak_memory(self.device),
        }  # fmt: skip
        measured = HostCopy(
            head_losses=self.accelerator.reduce(result.head_losses),
            grad_norm=result.grad_norm,
            first_bad_steps=self.accelerator.gather(self.first_bad_step[None]),
        )
        self.unlogged, self.seconds_waited = (record, measured), 0.0
        if self.device.type == "cpu":  # a CPU has computed them by now
            self.log()

    def _evaluate_and_save(self, stopping: bool) -> None:
        """After a step: evaluates and saves if that is due; saves and exits if a signal came."""
        train, progress = self.config.train, self.state.progress
        # The loss was finite before the step; to be worth saving, the weights must be finite after it.
        finite = full_tensor(torch.nn.utils.get_total_norm(self.parameters)).isfinite()
        self.first_bad_step = torch.where(finite, self.first_bad_step, progress.step)
        self.require_finite()
        progress.evaluated = not self._is_due(train.eval_steps)
        if not progress.evaluated and not stopping:
            stopping = not self.evaluate()
        if stopping or self._is_due(train.save_steps):
            self.save()
        if stopping:
            self.stop()

    # ------------------------------------------------------------------------- evaluation, metrics, checkpoints

    def evaluate(self) -> bool:
        """Scores the validation data.

        Returns:
            Whether it was finished: a signal ends it early, and the continued run begins it again.
        """
        progress, task = self.state.progress, self.task
        result = task.evaluate(self.model, self.validation, stop=lambda: self.preemption.received)
        if self.accelerator.reduce(torch.tensor(int(self.preemption.received), device=self.device)):
            return False
        logger.info("step %d: validation %s", progress.step, task.summary(result))
        density = self.state.sparsifier.report().overall.density
        counted = {f"training_{task.unit}": progress.units}
        self.run_log.write("eval", step=progress.step, **counted, density=density, **result)
        progress.evaluated = True
        return True

    def log(self) -> None:
        """Writes what the last logged step measured, if that is not done; waits until the device has computed it."""
        if self.unlogged is None:
            return
        (record, measured), self.unlogged = self.unlogged, None
        values = measured.read()
        self._require_no_bad_step(values["first_bad_steps"])
        self.run_log.write_step(record, values["head_losses"], values["grad_norm"])

    def save(self) -> None:
        """Writes a checkpoint of the last step."""
        card = ""
        if self.is_main:
            records = read_metrics(self.run_log.path)
            card = training_card(self.model, self.config, self.task, self.state.progress.step, records)
        self.last_saved = save_checkpoint(self.run_dir, self.state, card)

    def stop(self) -> NoReturn:
        """Saves what is not saved, and exits with `EXIT_PREEMPTED`."""
        step = self.state.progress.step
        if step and self.last_saved != self.run_dir / f"checkpoint-{step}":
            self.save()
        end_training(self.accelerator)
        logger.info("stopped at step %d; the same command continues from %s", step, self.last_saved or "the beginning")
        sys.exit(EXIT_PREEMPTED)

    def finish(self) -> None:
        """Writes the report."""
        if self.is_main:
            table, files = write_report(self.run_dir)
            listed = ", ".join(map(str, files))
            logger.info("\n%s\n\n%s holds the checkpoint; report: %s", table, self.last_saved, listed)
        end_training(self.accelerator)

    # -------------------------------------------------------------------------------------------------- checks

    def require_finite(self) -> None:
        """Ends the run on every process when any had a loss or weights that are not finite; nothing is saved any more.

        Raises:
            FloatingPointError: there was one; the message names the step and the last good checkpoint.
        """
        self._require_no_bad_step(self.accelerator.gather(self.first_bad_step[None]).tolist())

    def _require_no_bad_step(self, first_bad_steps: Sequence[int]) -> None:
        """The same, from the first bad step of each process, -1 for none."""
        if bad := [step for step in first_bad_steps if step >= 0]:
            raise FloatingPointError(
                f"loss or weights are not finite at step {min(bad)}; the last good checkpoint is "
                f"{self.last_saved or 'none yet'}. A lower train.learning_rate or train.max_grad_norm=1.0 may help"
            )

    def _signal_received(self) -> bool:
        """Whether any process had received a signal when the step before the last one began.

        All processes must agree, but nobody waits for the answer of the last step, which the device is still at.
        """
        return self.signals[0] is not None and self.signals[0].read()["received"] > 0

    def describe(self) -> None:
        """Says in one line what is about to run."""
        config, processes = self.model.config, self.accelerator.num_processes
        method = "" if processes == 1 else " (FSDP2)" if self.sharding else " (DDP)"
        progress = self.state.progress
        logger.info(
            "%s: %.1fM parameters, %s, density %.3f of the masked weights, %s",
            f"resuming {self.last_saved} at step {progress.step}" if self.last_saved else "new run",
            sum(parameter.numel() for parameter in self.model.parameters()) / 1e6,
            config.topology,
            self.state.sparsifier.report().overall.density, f"{processes} processes{method}",
        )  # fmt: skip
