"""Sparse training with `transformers.Trainer`, of any model: one callback drives the `Sparsifier`.

```python
config = SparsityConfig(density=0.5)
draw_masks(model, config)
trainer = Trainer(model, args, train_dataset=dataset, callbacks=[SparsityCallback(config)])
trainer.train()  # or trainer.train(resume_from_checkpoint=True)
```

Inactive weights must lose their gradients before these are clipped, and no event of Trainer lies between ``backward``
and its clipping. So the callback clips: from the begin of a step until ``on_pre_optimizer_step`` Trainer reads a
``max_grad_norm`` of 0, with which it only measures the norm, and there the callback masks and clips to the true limit.
That event comes once an optimizer step, when all micro-batches are accumulated and all processes have the same
gradients; hooks on the gradients, the other way to come before Trainer, would run for each micro-batch and process.
The limit is taken for a step at a time, not for the whole run, so that checkpoints (``training_args.bin``) hold the
true one.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .config import SparsityConfig
from .measures import TopologyUpdate
from .sparsifier import Sparsifier

STATE_FILE = "sparsifier.safetensors"

_SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


class _SuspendedLimit(float):
    """A ``max_grad_norm`` of 0 that knows the true limit, even where an error ended the step that took it."""

    def __new__(cls, limit):
        zero = super().__new__(cls, 0.0)
        zero.limit = _true_limit(limit)
        return zero


def _true_limit(limit):
    return getattr(limit, "limit", limit)


class SparsityCallback(TrainerCallback):
    """Keeps Trainer's model sparse, moves its masks, and saves in each checkpoint what a resumed run needs.

    Before training the model needs masks, those of [`draw_masks`]; a run that resumes then loads its own.

    The numbers of the last update are added to Trainer's logs as ``sparsity/<field of TopologyUpdate>``, once, and
    ``grad_norm`` becomes the norm of the active gradient before clipping. The trackers of ``report_to`` come before
    this callback and see neither; name them after it instead:
    ``report_to="none", callbacks=[SparsityCallback(config), TensorBoardCallback()]``.

    Args:
        config: how the masks move; shares of the run are shares of Trainer's ``max_steps``.
        resume_from: the checkpoint of ``trainer.train(resume_from_checkpoint=...)``, needed only where that lies
            outside ``output_dir``: Trainer does not tell callbacks.

    Raises:
        ValueError: ``config`` is no [`SparsityConfig`]. When training begins: there are two such callbacks, fp16
            scales the gradients, DeepSpeed, FSDP or Megatron-LM shard the weights, the checkpoint lacks the
            sparsifier's state or has that of another run, or [`Sparsifier`] refuses the model.
    """

    sparsifier: Sparsifier | None = None  #: of the current run, or the last
    last_update: TopologyUpdate | None = None  #: of that run; ``None`` before its first

    def __init__(self, config: SparsityConfig, resume_from: str | Path | None = None) -> None:
        if not isinstance(config, SparsityConfig):
            raise ValueError(f"config={config!r}: accepted is a SparsityConfig")
        self.config, self.resume_from = config, resume_from
        self._unlogged: TopologyUpdate | None = None
        self._grad_norm: torch.Tensor | None = None

    def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs) -> None:
        """Binds a new [`Sparsifier`] to the model and its optimizer, and continues that of a resumed run."""
        # The state is new for each run, also for one that auto_find_batch_size begins again.
        if hasattr(state, "sparsity_callback"):
            raise ValueError("callbacks: holds two SparsityCallbacks; accepted is one")
        state.sparsity_callback = self
        accelerator = AcceleratorState()
        if accelerator.distributed_type in _SHARDED:
            raise ValueError(
                f"distributed_type={accelerator.distributed_type.value}: accepted is one process, or data parallel "
                "ones that hold all weights"
            )
        if accelerator.mixed_precision == "fp16":
            raise ValueError("fp16=True: accepted is bf16 or full precision, where gradients are not scaled")
        self.sparsifier = Sparsifier(model, optimizer, self.config, state.max_steps)
        # Of some models (ViT) save_pretrained renames the weights, and Trainer, which loads a checkpoint by the model's
        # own names, leaves them out: https://github.com/huggingface/transformers/issues/48805.
        if isinstance(model, PreTrainedModel) and "save_pretrained" not in vars(model):
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        self.last_update = self._unlogged = self._grad_norm = None
        if state.global_step:
            self._resume(Path(self.resume_from or _checkpoint(args, state)), state.global_step)
        elif self.resume_from is not None:
            raise ValueError(
                f"resume_from={str(self.resume_from)!r}: the run begins at step 0; accepted is None, or the "
                "checkpoint of trainer.train(resume_from_checkpoint=...)"
            )

    def _resume(self, checkpoint: Path, step: int) -> None:
        try:
            self.sparsifier.load_state_dict(load_file(checkpoint / STATE_FILE))  # of another run it raises
            if self.sparsifier.steps != step:
                raise ValueError(f"it is of step {self.sparsifier.steps} of another run")
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"resume_from={str(checkpoint)!r}: its {STATE_FILE} cannot continue step {step} ({error}); "
                "accepted is the checkpoint that training resumes from, written with a SparsityCallback"
            ) from None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Keeps Trainer from clipping."""
        args.max_grad_norm = _SuspendedLimit(args.max_grad_norm)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs) -> None:
        """Moves the masks when an update is due, masks the gradients, and clips them."""
        args.max_grad_norm = _true_limit(args.max_grad_norm)
        if update := self.sparsifier.step():
            self.last_update = self._unlogged = update
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        self._grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if args.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, args.max_grad_norm, self._grad_norm)

    def on_log(self, args, state, control, *, logs, **kwargs) -> None:
        """Adds the norm of the active gradient, and what the last update did, to a record of the training loss."""
        if "loss" not in logs:  # an evaluation's record, or the summary of the run
            return
        measures = {}
        if "grad_norm" in logs and self._grad_norm is not None:
            measures["grad_norm"] = self._grad_norm.item()
        if self._unlogged is not None:
            measures |= _measures(self._unlogged)
            self._unlogged = None
        for record in (logs, *state.log_history[-1:]):  # the history has its own copy
            record.update(measures)

    def on_save(self, args, state, control, **kwargs) -> None:
        """Saves the sparsifier's state beside the model's and the optimizer's."""
        # Trials of a hyperparameter search have directories of their own, and are not resumed.
        if args.should_save and not state.is_hyper_param_search:
            tensors = {name: value.contiguous() for name, value in self.sparsifier.state_dict().items()}
            save_file(tensors, _checkpoint(args, state) / STATE_FILE)

    def on_train_end(self, args, state, control, *, model, **kwargs) -> None:
        """Leaves arguments and model as they were."""
        args.max_grad_norm = _true_limit(args.max_grad_norm)
        if isinstance(vars(model).get("save_pretrained"), partial):
            del model.save_pretrained


def _checkpoint(args, state) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _measures(update: TopologyUpdate) -> dict[str, float]:
    """The numbers of an update by their names in Trainer's logs."""
    values = asdict(update)
    values |= {f"density/{group}": density for group, density in values.pop("density_by_group").items()}
    return {f"sparsity/{name}": value for name, value in values.items() if value is not None}
