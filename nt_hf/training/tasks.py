"""What a run trains for: what differs between models of text and of images. `TrainingRun` knows nothing of either."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from ..config import RunConfig
from ..data.config import DataConfig
from ..data.image_sets import open_training_images
from ..data.images import ImageBatches
from ..data.prepared import token_batches, tokenizer_fingerprint
from ..data.streams import HeadBatches
from ..data.tokenizers import check_vocabulary, load_tokenizer
from ..evaluation.perplexity import evaluate, perplexity
from ..evaluation.validation_images import evaluate_images
from ..files import write_text, writing
from ..models.auto import NeuroTrailsForCausalLM, NeuroTrailsForImageClassification
from ..models.configuration_neurotrails import MultiHeadConfig
from ..models.losses import IGNORE_INDEX
from ..plan.flops import training_flops_per_token
from ..plan.images import image_flops
from ..sparsity.sharding import is_sharded
from .batches import Batch, Batches, count_targets, limited, synchronized, to_device, until

CALIBRATION_ROWS = 8  # of a forward pass, which looks at one block of the model


class Task(Protocol):
    """What a model is trained for, on this process.

    Attributes:
        models: loads checkpoints of the task's models, of any family.
        unit: what the model learns from, in the plural; progress and speed are counted in it.
        units_per_step: that many in an optimizer step.
        fingerprint: of what gives a model's inputs and outputs their meaning; a run keeps it.
        fingerprint_key: the setting that it follows from.
        misfit: what a checkpoint of another fingerprint was trained with, in words.
        pipeline: what the hub calls such models.
    """

    models: ClassVar[type]
    unit: ClassVar[str]
    units_per_step: int
    fingerprint: str
    fingerprint_key: ClassVar[str]
    misfit: ClassVar[str]
    pipeline: ClassVar[str]

    def model_config(self) -> MultiHeadConfig:
        """The model's configuration, with what follows from the data."""

    def check_model(self, model: MultiHeadConfig) -> None:
        """Raises ValueError unless the data fit the model."""

    def training_batches(self, heads: int) -> Batches:
        """The training data, in one order for all heads or in a separate order for each."""

    def validation_batches(self) -> Iterable[Batch]:
        """The validation data, once."""

    def saliency_loss(self, model: nn.Module) -> torch.Tensor:
        """The loss on some training data, the same on every process, for first masks that saliency chooses."""

    def calibration_batches(self, rows: int, device: torch.device) -> list[Batch]:
        """Inputs of the model from the training data, the same on every process, for first masks of a trained model."""

    def count_targets(self, group: Sequence[Batch]) -> list[int]:
        """Number of targets of some batches: one number, or one for each head that has batches of its own."""

    def losses(self, model: nn.Module, batch: Batch, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a forward pass adds to a step's loss, and to the heads' mean losses ``[heads]``.

        Args:
            model: to run, perhaps wrapped.
            batch: of this process.
            targets: mean number of targets of the step on a process, ``[]`` or one for each head. Dividing by it makes
                all targets of a step count the same, however it is divided into passes and processes.
        """

    def evaluate(self, model: nn.Module, validation: Iterable[Batch], stop: Callable[[], bool]) -> dict[str, Any]:
        """Scores the validation data, or as much of them as come before ``stop()``; ready for JSON."""

    def summary(self, result: dict[str, Any]) -> str:
        """Such a result in some words."""

    def loss_figures(self, loss: float) -> dict[str, float]:
        """What else a training loss says."""

    def flops_per_unit(self, model: MultiHeadConfig) -> float | None:
        """FLOPs of training on one unit, where they are known."""

    def save(self, folder: Path) -> None:
        """Writes what a model's user needs to make inputs."""


def task_of(config: RunConfig, accelerator: Accelerator) -> Task:
    """The task of a run, which follows from the kind of its data.

    Raises:
        ValueError: the data, or what they are read by, cannot be found or read.
    """
    return (TextTask if isinstance(config.data, DataConfig) else ImageTask)(config, accelerator)


class TextTask:
    """Next tokens of a text.

    Args:
        config: of the run.
        accelerator: of this process.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """

    models = NeuroTrailsForCausalLM
    unit = "tokens"
    fingerprint_key = "data.tokenizer"
    misfit = "another tokenizer"
    pipeline = "text-generation"

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self._config, self._accelerator = config, accelerator
        self.units_per_step = config.train.batch_size * config.data.sequence_length
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self._tokenizer.model_max_length = config.data.sequence_length
        self.fingerprint = tokenizer_fingerprint(self._tokenizer)

    def model_config(self) -> MultiHeadConfig:
        tokenizer = self._tokenizer
        return self._config.model_config(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def check_model(self, model: MultiHeadConfig) -> None:
        check_vocabulary(self._tokenizer, model.vocab_size)

    def _batches(self, source: str | Sequence[str], **options: Any) -> Batches:
        """Batches of a source, read as the configuration says, or with other options of `token_batches`."""
        data, accelerator = self._config.data, self._accelerator
        usual = {
            "batch_size": self._config.train.accumulation_steps(accelerator.num_processes)[0],
            "sequence_length": data.sequence_length,
            "packing": data.packing,
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
            "num_workers": data.num_workers,
            "on_bad_line": data.on_bad_line,
            "text_field": data.text_field,
        }
        return token_batches(source, self._tokenizer, **{**usual, **options})

    def training_batches(self, heads: int) -> Batches:
        data, seed = self._config.data, self._config.train.seed
        # Head 0 reads in the order that all heads would share. Seeds of the others are unlikely to be another run's.
        seeds = [seed + 1_000_003 * head for head in range(heads if data.order_per_head else 1)]
        streams = [
            self._batches(data.train, shuffle_block=data.shuffle_block, seed=stream_seed) for stream_seed in seeds
        ]
        return HeadBatches(streams) if data.order_per_head else streams[0]

    def validation_batches(self) -> Iterable[Batch]:
        return self._batches(self._config.data.validation, num_workers=0, epochs=1)

    def _rows_of_training(self, rows: int) -> Batch:
        alone = {"rank": 0, "world_size": 1, "num_workers": 0, "seed": self._config.train.seed}
        return next(iter(self._batches(self._config.data.train, batch_size=rows, **alone)))

    def calibration_batches(self, rows: int, device: torch.device) -> list[Batch]:
        batch = self._rows_of_training(rows)
        del batch["labels"]
        parts = zip(*(value.to(device).split(CALIBRATION_ROWS) for value in batch.values()))
        return [dict(zip(batch, part), use_cache=False) for part in parts]

    def saliency_loss(self, model: nn.Module) -> torch.Tensor:
        train = self._config.train
        batch = self._rows_of_training(train.micro_batch_size or min(train.batch_size, 32))
        return model(**{key: value.to(model.device) for key, value in batch.items()}, use_cache=False).loss

    def count_targets(self, group: Sequence[Batch]) -> list[int]:
        return count_targets(group)

    def losses(self, model: nn.Module, batch: Batch, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(**to_device(batch, targets.device), use_cache=False, num_items_in_batch=targets)
        return output.loss, output.head_losses

    def evaluate(self, model: nn.Module, validation: Iterable[Batch], stop: Callable[[], bool]) -> dict[str, Any]:
        accelerator, data = self._accelerator, self._config.data
        share = data.validation_tokens and -(-data.validation_tokens // accelerator.num_processes)
        passes = self._config.train.accumulation_steps(accelerator.num_processes)[1]
        batches = limited(validation, share, stop, multiple=passes)
        if is_sharded(model):
            row = torch.zeros(1, data.sequence_length, dtype=torch.long)
            empty = {"input_ids": row, "attention_mask": row + 1, "labels": row + IGNORE_INDEX}
            batches = synchronized(batches, empty, accelerator)
        return evaluate(
            model,
            batches,
            autocast=accelerator.autocast,
            reduce=lambda sums: accelerator.reduce(sums.to(accelerator.device)),
        ).to_dict()

    def summary(self, result: dict[str, Any]) -> str:
        heads = ", ".join(f"{value:.2f}" for value in result["head_perplexities"])
        return f"perplexity {result['perplexity']:.2f} (heads {heads}), disagreement {result['disagreement']:.3f}"

    def loss_figures(self, loss: float) -> dict[str, float]:
        return {"perplexity": perplexity(loss)}

    def flops_per_unit(self, model: MultiHeadConfig) -> float | None:
        data = self._config.data
        return training_flops_per_token(model, data.sequence_length, data.order_per_head)

    def save(self, folder: Path) -> None:
        with writing(folder / "tokenizer.json"):
            self._tokenizer.save_pretrained(folder)


class ImageTask:
    """Classes of images.

    Args:
        config: of the run.
        accelerator: of this process.

    Raises:
        DataError: the images cannot be found or read.
    """

    models = NeuroTrailsForImageClassification
    unit = "images"
    fingerprint_key = "data.train"
    misfit = "other classes"
    pipeline = "image-classification"

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self._config, self._accelerator = config, accelerator
        self.units_per_step = config.train.batch_size
        self._rows = config.train.accumulation_steps(accelerator.num_processes)[0]
        self._ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        self._train, self._validation = open_training_images(config.data)
        names = json.dumps(self._train.classes)
        self.fingerprint = f"{len(self._train.classes)} ({hashlib.sha256(names.encode()).hexdigest()[:12]})"

    def model_config(self) -> MultiHeadConfig:
        classes, (height, width) = self._train.classes, self._train.size
        return self._config.model_config(
            id2label=dict(enumerate(classes)),
            label2id={name: label for label, name in enumerate(classes)},
            image_size=height if height == width else [height, width],
        )

    def check_model(self, model: MultiHeadConfig) -> None:
        sides, patch = self._train.size, getattr(model, "patch_size", 1)
        if any(side % patch for side in sides):
            raise ValueError(f"model.patch_size={patch}: accepted is a divisor of the images' sides {sides}")

    def training_batches(self, heads: int) -> Batches:
        own = heads if self._config.data.order_per_head else None
        seed = self._config.train.seed
        return ImageBatches(self._train, batch_size=self._rows, heads=own, seed=seed, **self._ranks)

    def validation_batches(self) -> Iterable[Batch]:
        return ImageBatches(self._validation, batch_size=self._rows, training=False, **self._ranks)

    def calibration_batches(self, rows: int, device: torch.device) -> list[Batch]:
        batch = next(iter(ImageBatches(self._train, batch_size=rows, seed=self._config.train.seed)))
        return [{"pixel_values": part.to(device)} for part in batch["pixel_values"].split(CALIBRATION_ROWS)]

    def saliency_loss(self, model: nn.Module) -> torch.Tensor:
        train = self._config.train
        rows = train.micro_batch_size or min(train.batch_size, 128)
        batch = next(iter(ImageBatches(self._train, batch_size=rows, seed=train.seed)))
        return model(**to_device(batch, model.device)).loss

    def count_targets(self, group: Sequence[Batch]) -> list[int]:
        return [sum(_count_images(batch) for batch in group)]

    def losses(self, model: nn.Module, batch: Batch, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(**to_device(batch, targets.device))
        share = _count_images(batch) / targets.squeeze()
        return output.loss * share, output.head_losses * share

    def evaluate(self, model: nn.Module, validation: Iterable[Batch], stop: Callable[[], bool]) -> dict[str, Any]:
        accelerator = self._accelerator
        batches = until(validation, stop)
        if is_sharded(model):
            image = torch.zeros(1, 3, *self._train.size)
            batches = synchronized(
                batches, {"pixel_values": image, "labels": torch.tensor([IGNORE_INDEX])}, accelerator
            )
        return evaluate_images(
            model,
            batches,
            autocast=accelerator.autocast,
            reduce=lambda sums: accelerator.reduce(sums.to(accelerator.device)),
        )

    def summary(self, result: dict[str, Any]) -> str:
        heads = ", ".join(f"{value:.4f}" for value in result["head_accuracies"])
        return (
            f"accuracy {result['accuracy']:.4f} (heads {heads}), NLL {result['loss']:.4f}, ECE {result['ece']:.4f}, "
            f"disagreement {result['disagreement']:.3f}"
        )

    def loss_figures(self, loss: float) -> dict[str, float]:
        return {}

    def flops_per_unit(self, model: MultiHeadConfig) -> float | None:
        return 3 * image_flops(model, self._config.data.order_per_head).total

    def save(self, folder: Path) -> None:
        data = self._config.data
        mean, std = data.statistics
        settings: dict[str, Any] = {
            "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": False,
            "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(mean), "image_std": list(std),
        }  # fmt: skip
        if side := data.image_size:
            settings |= {
                "do_resize": True, "size": {"shortest_edge": round(side / data.center_crop)}, "resample": 2,
                "do_center_crop": True, "crop_size": {"height": side, "width": side},
            }  # fmt: skip
        write_text(folder / "preprocessor_config.json", json.dumps(settings, indent=2))


def _count_images(batch: Batch) -> int:
    """The images of a batch, or of each head's."""
    return batch["pixel_values"].shape[-4]
