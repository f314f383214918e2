"""From a source of images to uint8 pixels, one image at a time, by its number.

[`ImageConfig`] says what a source is. Parquet files, local or remote, are read through ``datasets``, which keeps them
on disk as memory-mapped tables, so that any image can be had by its number without reading those before it.
"""

import hashlib
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check, one_line
from .augmentation import random_box
from .config import SOURCE
from .errors import DataError
from .image_config import ImageConfig
from .prepared import shuffled
from .sources import find_files

DIGITS = Path(__file__).parent / "digits" / "digits.npz"
DIGITS_SPLITS = {"train": slice(None, -360), "validation": slice(-360, None)}  # the last fifth, as the source has them
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
ACCEPTED = (
    "digits:train, digits:validation, an existing folder of class folders, .parquet files, hub:<repo>, "
    "or a list of the last two"
)
KEEP_BYTES = 2 << 30  # a set that is no larger is decoded once


class BadImageError(DataError):
    """One image that cannot be used; ``on_bad_image="skip"`` leaves it out."""


@dataclass(frozen=True)
class Classes:
    """Classes that labels are to be numbered by.

    Attributes:
        names: in their order.
        owner: who has them, for messages.
    """

    names: list[str]
    owner: str


@dataclass(eq=False)
class ImageSet:
    """Images and their classes.

    Attributes:
        source: where they are from, for messages.
        records: the paths of image files; a column of their bytes or of ``{"bytes", "path"}``; or the pixels of all,
            uint8 ``[records, H, W, 3]``.
        labels: int64 ``[records]``.
        classes: names of the classes.
        config: how to read them.
        chosen: numbers of the records that belong to the set, in its order.
        size: height and width of all images as they are handed out.
    """

    source: str
    records: Sequence[Any]
    labels: np.ndarray
    classes: list[str]
    config: ImageConfig
    chosen: np.ndarray
    size: tuple[int, int]
    _kept: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.chosen)

    def fingerprint(self) -> str:
        """Tells sets apart: the number of images, their labels and their size."""
        labels = self.labels[self.chosen]
        return f"{len(self)} of {self.size} ({hashlib.sha256(labels.tobytes()).hexdigest()[:12]})"

    def read(self, number: int, draws: Sequence[float] | None = None) -> np.ndarray:
        """The pixels of one image, uint8 ``[H, W, 3]``; of a random crop if ``draws`` are given, see `random_box`.

        Raises:
            BadImageError: it cannot be decoded, or has another size where images are not scaled.
        """
        record, scaled = int(self.chosen[number]), self.config.image_size is not None
        if scaled and draws is not None:
            image = _decode(self.records[record], self._name(record))
        else:
            pixels = self._kept.get(record)
            if pixels is None:
                pixels = self._centre(record)
                if len(self) * pixels.nbytes <= KEEP_BYTES:
                    self._kept[record] = pixels
            if draws is None:
                return pixels
            image = _pillow().fromarray(pixels)
        return _scale(image, random_box(draws, *image.size, self.config.random_resized_crop), self.size)

    def _centre(self, record: int) -> np.ndarray:
        if self.config.image_size is None and isinstance(self.records, np.ndarray):
            return self.records[record]  # without Pillow, so that the digits need no package of their own
        image = _decode(self.records[record], self._name(record))
        width, height = image.size
        if self.config.image_size is None:
            if (height, width) != self.size:
                expected = f"{self.size[1]}x{self.size[0]} as of the others, or image_size to scale all"
                raise BadImageError(f"{self._name(record)}: is of {width}x{height} pixels; accepted is {expected}")
            return np.asarray(image)
        side = min(width, height) * self.config.center_crop
        left, top = (width - side) / 2, (height - side) / 2
        return _scale(image, (left, top, left + side, top + side), self.size)

    def _name(self, record: int) -> str:
        path = self.records[record]
        return path if isinstance(path, str) else f"{self.source}, image {record + 1}"


def open_images(
    source: str | Sequence[str], config: ImageConfig, like: ImageSet | None = None, classes: Classes | None = None
) -> ImageSet:
    """The images of a source.

    Args:
        source: see [`ImageConfig`].
        config: how to read them.
        like: the training images, whose classes and size these must have.
        classes: those that the labels are of; by default those of ``like``, or the source's own. Where the source names
            its classes, labels are numbered by these names, otherwise they are the numbers of ``classes``.

    Raises:
        DataError: the source cannot be found or read, holds no images, or does not fit to ``like`` and ``classes``; a
            label is none of a class.
        ValueError: ``source`` is neither a string nor a list of strings.
    """
    check("source", source, SOURCE)
    entries = [os.path.expanduser(source)] if isinstance(source, str) else list(source)
    name = ", ".join(entries)
    if len(entries) == 1 and name.partition(":")[0] == "digits":
        records, labels, names = _digits(name)
    elif len(entries) == 1 and os.path.isdir(name):
        records, labels, names = _folder(name)
    else:
        records, labels, names = _table(entries, config)
    if not len(labels):
        raise DataError(f"{name}: holds no images")
    classes = classes or (like and Classes(like.classes, like.source))
    labels, class_names = _numbered(name, labels, names, classes)
    chosen, side = np.arange(len(labels)), config.image_size
    images = ImageSet(name, records, labels, class_names, config, chosen, (side or 0, side or 0))
    if side is None:
        images.size = like.size if like else _first_size(images)
    if config.crop_padding >= min(images.size):
        raise DataError(f"{name}: crop_padding={config.crop_padding}: accepted is less than a side of {images.size}")
    return images


def open_training_images(config: ImageConfig, classes: Classes | None = None) -> tuple[ImageSet, ImageSet]:
    """The images for training and for validation.

    Args:
        config: what to read, and how.
        classes: see [`open_images`].

    Raises:
        DataError: see [`open_images`]; or ``validation_share`` leaves one of them without images.
    """
    train = open_images(config.train, config, classes=classes)
    if not config.validation_share:
        return train, open_images(config.validation, config, like=train)
    held_out = round(config.validation_share * len(train))
    if not 0 < held_out < len(train):
        raise DataError(
            f"{train.source}: validation_share={config.validation_share} is {held_out} of {len(train)} images; "
            "accepted is a share that leaves some for both"
        )
    order = shuffled(np.arange(len(train)), len(train), f"validation/{config.split_seed}")
    return replace(train, chosen=np.sort(order[held_out:])), replace(train, chosen=np.sort(order[:held_out]))


# ------------------------------------------------------------------------------------------------------------------
# Sources: records, labels, names of the classes (None: the labels are numbers without names)

Found = tuple[Sequence[Any], np.ndarray, list[str] | None]


def _digits(source: str) -> Found:
    split = source.removeprefix("digits").removeprefix(":") or "train"
    if split not in DIGITS_SPLITS:
        raise DataError(f"{source}: accepted is {' or '.join(f'digits:{name}' for name in DIGITS_SPLITS)}")
    with np.load(DIGITS) as content:
        grey, labels = (content[name][DIGITS_SPLITS[split]] for name in ("images", "labels"))
    grey = (grey * (255 / 16)).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3), labels.astype(np.int64), [str(digit) for digit in range(10)]


def _folder(root: str) -> Found:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{root}: holds no folders; accepted is a folder with one of images for each class")
    if splits := SPLIT_NAMES.intersection(names):
        split = os.path.join(root, min(splits))
        raise DataError(f"{root}: holds the splits of a data set; accepted is one of them, such as {split}")
    records, labels = [], []
    for label, name in enumerate(names):
        walk = os.walk(os.path.join(root, name), followlinks=True)
        files = [os.path.join(folder, file) for folder, _, found in walk for file in found]
        files = sorted(file for file in files if file.lower().endswith(IMAGE_FILES))
        if not files:
            raise DataError(f"{os.path.join(root, name)}: holds no images; accepted are {', '.join(IMAGE_FILES)}")
        records += files
        labels += [label] * len(files)
    return records, np.array(labels), names


def _table(entries: list[str], config: ImageConfig) -> Found:
    for entry in entries:
        if not entry.startswith("hub:") and not entry.endswith(".parquet"):
            raise DataError(f"{entry}: accepted is {ACCEPTED}")
    files, name = find_files(entries), ", ".join(entries)
    if other := next((file for file in files if not file.endswith(".parquet")), None):
        raise DataError(f"{other}: accepted are .parquet files")
    try:
        import datasets
        import pyarrow

        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what is wrong is raised, too
        table = datasets.load_dataset("parquet", data_files=files, split="train")
    except ModuleNotFoundError as error:
        raise DataError(f"{name}: {error.name} is not installed: pip install 'nt_hf[images]'") from error
    except Exception as error:  # damaged, not found, gated: libraries raise errors of many types
        raise DataError(f"{name}: cannot be read ({one_line(error.__cause__ or error)})") from error
    for column in (config.image_field, config.label_field):
        if column not in table.column_names:
            raise DataError(f"{name}: has no column {column!r}, its columns are {', '.join(table.column_names)}")
    records, column = table.data.column(config.image_field), table.data.column(config.label_field)
    if not pyarrow.types.is_integer(column.type) or column.null_count:
        problem = f"is of type {column.type} with {column.null_count} nulls; accepted are whole numbers"
        raise DataError(f"{name}: column {config.label_field!r} {problem}")
    names = getattr(table.features[config.label_field], "names", None)
    return records, column.to_numpy().astype(np.int64), names


def _numbered(
    source: str, labels: np.ndarray, names: list[str] | None, classes: Classes | None
) -> tuple[np.ndarray, list[str]]:
    """Labels as numbers of ``classes``, if they are given, else of the source's own, and the names of these classes."""
    largest = int(labels.max())
    own = names or (classes.names if classes else [str(label) for label in range(largest + 1)])
    outside = np.flatnonzero((labels < 0) | (labels >= len(own)))
    if len(outside):
        first = outside[0]
        raise DataError(f"{source}, image {first + 1}: label={labels[first]}: accepted is 0 to {len(own) - 1}")
    if not classes or own == classes.names:
        return labels, own
    if unknown := sorted(set(own) - set(classes.names)):
        raise DataError(
            f"{source}: class {unknown[0]!r} is none of those of {classes.owner}; accepted are {_some(classes.names)}"
        )
    return np.array([classes.names.index(name) for name in own])[labels], classes.names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _first_size(images: ImageSet) -> tuple[int, int]:
    """Height and width of the first image that can be read."""
    if isinstance(images.records, np.ndarray):
        return images.records.shape[1:3]
    for record in range(len(images.records)):
        try:
            width, height = _decode(images.records[record], images._name(record)).size
            return height, width
        except BadImageError:
            if images.config.on_bad_image == "error":
                raise
    raise DataError(f"{images.source}: holds no image that can be read")


# ------------------------------------------------------------------------------------------------------------------
# Pillow


def _pillow():
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise DataError("Pillow is not installed: pip install 'nt_hf[images]'") from error
    return Image


def _decode(record: Any, name: str):
    """A record as a Pillow image in RGB."""
    pillow = _pillow()
    if isinstance(record, np.ndarray):
        return pillow.fromarray(record)
    content = record if isinstance(record, str) else record.as_py()
    if isinstance(content, dict):
        content = content.get("bytes") or content.get("path")
    if not isinstance(content, bytes | str):
        raise BadImageError(f"{name}: is {content!r:.40}; accepted are the bytes of an image file")
    try:
        with pillow.open(content if isinstance(content, str) else io.BytesIO(content)) as image:
            mode = image.mode
            if not mode.startswith(("I", "F")):
                return image.convert("RGB")
    except Exception as error:  # each format raises errors of its own
        raise BadImageError(f"{name}: cannot be read as an image ({one_line(error)})") from error
    raise BadImageError(f"{name}: is of mode {mode}; accepted are 8 bits a channel, which others would be clipped to")


def _scale(image, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """The part of an image within ``box`` at another size; bilinear, smoothed where it becomes smaller."""
    pillow = _pillow()
    return np.asarray(image.resize(size[::-1], pillow.Resampling.BILINEAR, box=box))
