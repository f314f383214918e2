"""Batches of images for training and evaluation, prepared ahead of their use, exact to resume."""

import collections
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch

from ..checks import integer, optional, setting
from .augmentation import BOX, draw, mix, move_and_flip, smooth
from .errors import DataError
from .image_sets import BadImageError, ImageSet
from .prepared import shuffled
from .streams import RankOptions, saved_place

logger = logging.getLogger(__name__)

AHEAD = 2  # batches that each thread prepares before they are asked for


@dataclass(eq=False, repr=False)
class ImageBatches(RankOptions):
    """Iterable over batches of images, for one rank.

    A batch is a dict of ``pixel_values``, float32 ``[batch_size, 3, H, W]``, normalised, channels last in memory; and
    ``labels``, int64 ``[batch_size]``, or with mixup or label smoothing float32 shares of classes ``[batch_size,
    classes]``. With ``heads``, both have one more dimension in front: every head sees the same images in an epoch, each
    in an order and with an augmentation of its own.

    For training, images are permuted in each epoch anew and augmented as the set's configuration says, and batches
    follow without end, across the ends of epochs. Otherwise the images come once, in their order, as they are; the
    last batch can be smaller, and some ranks can have one batch fewer.

    The order of the images belongs to the run, not to its ranks: the ``k``-th batch of ``rank`` has the images number
    ``(k * world_size + rank) * batch_size`` and following of that order. So the images of an optimizer step and their
    augmentation (but for mixup, which mixes within a batch) are the same for any number of ranks and of batches it
    takes them in, and the place in the order is one number.

    Every ``iter()`` starts from the beginning, except the first after ``load_state_dict``.

    Args:
        images: the set.
        training: whether the batches are for training.
        heads: number of heads with an order of their own; None for one order for all.
        seed: of order and augmentation.
        further ones: those of [`RankOptions`]; ``batch_size`` are the images of each head.

    Attributes:
        wait_seconds: time that the consumer has waited for batches.
        bad_images: images that this rank has skipped, as of the latest batch. In training, others of the batch take
            their place, so that it keeps its size; otherwise it becomes smaller.

    Raises:
        ValueError: an argument has a value that is not accepted.
        DataError: (while iterating) an image cannot be read and ``on_bad_image`` is ``"error"``; or none can be read,
            in training none of a batch.
    """

    images: ImageSet
    _: KW_ONLY
    training: bool = True
    heads: int | None = setting(None, optional(integer(1)))
    seed: int = setting(0, integer(0))

    def __post_init__(self):
        super().__post_init__()
        self.wait_seconds = 0.0
        self.bad_images = 0
        self._used = 0  # images, by all ranks
        self._resume = False

    @property
    def epoch(self) -> int:
        """Passes that all ranks together have finished, as of the latest batch of each."""
        return self._used // len(self.images)

    @property
    def bad_lines(self) -> int:
        """``bad_images``, by the name that training asks any data for."""
        return self.bad_images

    def state_dict(self) -> dict:
        """The place after the latest batch that was handed out, as plain json. Every rank has its own."""
        return {"settings": self._settings(), "images": self._used, "bad_images": self.bad_images}

    def load_state_dict(self, states: Sequence[dict]) -> None:
        """Makes the next ``iter()`` go on where ``states`` were taken: those of all ranks of that run.

        The number of ranks and the batch size may change, the order of the images stays.

        Raises:
            ValueError: the states belong to other images or another order, or are no such states.
        """
        place = saved_place(states, "images", self._settings(), "ImageBatches")
        bad = [state.get("bad_images") for state in states]
        if not all(isinstance(count, int) and count >= 0 for count in bad):
            raise ValueError(f"data state: not one that ImageBatches wrote (bad_images={bad})")
        self._used, self.bad_images = place, sum(bad[self.rank :: self.world_size])
        self._resume = True

    def _settings(self) -> dict[str, Any]:
        return {"images": self.images.fingerprint(), "seed": self.seed, "heads": self.heads, "training": self.training}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if not self._resume:
            self._used = self.bad_images = 0
        self._resume = False
        start, asked = self._used, time.perf_counter()
        for turn, (batch, problems) in enumerate(self._prepared(start), 1):
            self.wait_seconds += time.perf_counter() - asked
            self._used = min(start + turn * self.world_size * self.batch_size, self._end(start))
            for problem in problems:
                self.bad_images += 1
                if self.bad_images.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, …: a log that stays readable
                    logger.warning("skipped %s (bad images so far: %d)", problem, self.bad_images)
            if len(batch["labels"]):
                yield batch
            asked = time.perf_counter()
        if self.bad_images == len(self.images):
            raise DataError(f"{self.images.source}: none of its images can be read")

    def _end(self, start: int) -> float:
        return float("inf") if self.training else max(start, len(self.images))

    def _prepared(self, start: int) -> Iterator[tuple[dict[str, torch.Tensor], list[str]]]:
        """The batches from an image of the order on, each with what is wrong with the images that were left out."""
        firsts = itertools.count(start + self.rank * self.batch_size, self.world_size * self.batch_size)
        firsts = itertools.takewhile(lambda first: first < self._end(start), firsts)
        workers = self.images.config.num_workers
        if not workers:
            yield from map(self._batch, firsts)
            return
        pool = ThreadPoolExecutor(workers, "images")
        try:
            ahead = itertools.islice(firsts, AHEAD * workers)
            batches = collections.deque(pool.submit(self._batch, first) for first in ahead)
            while batches:
                batch = batches.popleft().result()
                batches.extend(pool.submit(self._batch, first) for first in itertools.islice(firsts, 1))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(self, first: int) -> tuple[dict[str, torch.Tensor], list[str]]:
        problems: list[str] = []
        if self.heads is None:
            return self._ordered(first, self.seed, problems), problems
        # Head 0 sees the order that all heads would share. The seeds of the others are unlikely to be another run's.
        batches = [self._ordered(first, self.seed + 1_000_003 * head, problems) for head in range(self.heads)]
        stacked = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
        return {**stacked, "pixel_values": channels_last(stacked["pixel_values"])}, problems

    def _ordered(self, first: int, seed: int, problems: list[str]) -> dict[str, torch.Tensor]:
        """The batch from the image number ``first`` of an order on; adds what is wrong with images to ``problems``."""
        images, config = self.images, self.images.config
        positions = np.arange(first, int(min(first + self.batch_size, self._end(0))))
        numbers, epochs = positions % len(images), positions // len(images)
        if self.training:
            for epoch in np.unique(epochs):
                in_epoch = epochs == epoch
                numbers[in_epoch] = shuffled(numbers[in_epoch], len(images), f"{seed}/{epoch}")
        draws = draw(seed, first, len(numbers))
        crops = self.training and config.random_resized_crop is not None
        read, good = [], []
        for row, number in enumerate(numbers.tolist()):
            try:
                read.append(images.read(number, draws[row, BOX].tolist() if crops else None))
                good.append(row)
            except BadImageError as error:
                if config.on_bad_image == "error":
                    raise BadImageError(f"{error} (on_bad_image='skip' would leave it out)") from None
                problems.append(str(error))
        if self.training:
            if not read:
                raise DataError(f"{images.source}: of {len(numbers)} images in a row none can be read ({problems[-1]})")
            filled = np.resize(np.arange(len(read)), len(numbers))
            read, good = [read[i] for i in filled], [good[i] for i in filled]
        labels = torch.from_numpy(images.labels[images.chosen[numbers[good]]])
        height, width = images.size
        pixels = torch.from_numpy(np.array(read, dtype=np.uint8).reshape(-1, height, width, 3))
        pixels = pixels.permute(0, 3, 1, 2)
        if self.training:
            pixels = move_and_flip(pixels, draws[good], config.crop_padding, config.flip)
        pixel_values = normalised(pixels, *config.statistics)
        if self.training and (config.mixup or config.label_smoothing):
            labels = smooth(labels, len(images.classes), config.label_smoothing)
            if config.mixup:
                pixel_values, labels = mix(pixel_values, labels, config.mixup, f"{seed}/{first}")
        return {"pixel_values": channels_last(pixel_values), "labels": labels}


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """Images ``[..., 3, H, W]`` with the colours of a pixel side by side in memory, where convolutions are fastest."""
    return images.movedim(-3, -1).contiguous().movedim(-1, -3)


def normalised(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """What a model takes, float32, of pixels uint8 ``[n, 3, H, W]``: ``(pixels / 255 - mean) / std``."""
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    return pixels.float().div_(255).sub_(mean).div_(std)
