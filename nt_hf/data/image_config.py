"""The section ``data`` of a run over images."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import SWITCH, TEXT, Rule, check, check_fields, choice, integer, list_of, number, optional, setting
from .config import SOURCE

# Means and standard deviations of the training images' red, green and blue, on a scale from 0 to 1.
STATISTICS = {
    "digits": ((0.3054, 0.3054, 0.3054), (0.3755, 0.3755, 0.3755)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_COLOURS = list_of(number(), "", length=3)


def _is_statistics(value: object) -> bool:
    if isinstance(value, str):
        return value in STATISTICS
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_COLOURS.valid, value))
    return pair and all(deviation > 0 for deviation in value[1])


NORMALIZE = Rule(
    _is_statistics,
    f"{', '.join(STATISTICS)}, or [[mean, mean, mean], [std, std, std]] with std above 0",
    tuple(STATISTICS),
)
AREA = Rule(
    lambda value: list_of(number("(0, 1]"), "", length=2).valid(value) and value[0] <= value[1],
    "the least and the largest share of the area, two numbers in (0, 1]",
)


@dataclass
class ImageConfig:
    """What images to read and how to make batches of them.

    A source is ``digits:train`` (short: ``digits``) or ``digits:validation``, the sample that comes with the package; a
    folder with one folder for each class; or parquet files: a path or glob, a URL, ``hub:<repo>[@<revision>][:<config>
    [:<split>]]``, or a list of those.

    Attributes:
        train, validation: sources. Classes and their order are those of ``train``.
        validation_share: above 0, this share of ``train`` is held out and takes the place of ``validation``, so that
            settings are not chosen on the images of the final result.
        split_seed: of the choice of that share; not the run's seed, so that runs from several seeds are compared on
            the same images.
        image_field, label_field: columns of parquet files: encoded images, and whole numbers from 0.
        image_size: side of the square that images are scaled to; None takes them as they are, all of one size.
        center_crop: where images are scaled, the side of the square around the middle that is taken, as a share of the
            shorter side. ImageNet's usual evaluation scales the side to 256 and takes 224: 0.875.
        normalize: mean and standard deviation of each colour, from 0 to 1, or the data set whose values to take.
        flip: mirror half of the training images, left to right.
        crop_padding: move training images by up to so many pixels each way; reflections fill the border.
        random_resized_crop: least and largest share of the area that a random crop of a training image has, before it
            is scaled to the size of a batch; its sides relate as 3:4 to 4:3.
        mixup: alpha of the distribution Beta(alpha, alpha) by which pairs of training images are mixed; 0: none.
        label_smoothing: this share of a training label is spread over all classes.
        order_per_head: each head sees the training images in an order of its own.
        num_workers: threads that prepare batches ahead of their use; 0: the consumer's own.
        on_bad_image: ``"error"`` or ``"skip"`` (counted and logged) for images that cannot be read.

    Raises:
        ValueError: a field has a value that is not accepted.
    """

    train: str | list[str] = setting("digits:train", SOURCE)
    validation: str | list[str] = setting("digits:validation", SOURCE)
    validation_share: float = setting(0.0, number("[0, 1)", "a share of the training images"))
    split_seed: int = setting(0, integer(0))
    image_field: str = setting("image", TEXT)
    label_field: str = setting("label", TEXT)
    image_size: int | None = setting(None, optional(integer(1)))
    center_crop: float = setting(1.0, number("(0, 1]", "a share of the shorter side"))
    normalize: str | list[list[float]] = setting("digits", NORMALIZE)
    flip: bool = setting(False, SWITCH)
    crop_padding: int = setting(0, integer(0))
    random_resized_crop: list[float] | None = setting(None, optional(AREA))
    mixup: float = setting(0.0, number("[0, inf)"))
    label_smoothing: float = setting(0.0, number("[0, 1)"))
    order_per_head: bool = setting(False, SWITCH)
    num_workers: int = setting(0, integer(0))
    on_bad_image: str = setting("error", choice(["error", "skip"]))

    def __post_init__(self):
        check_fields(self)
        scaled = Rule(lambda share: share == 1 or self.image_size is not None, "1 where image_size is null")
        check("center_crop", self.center_crop, scaled)

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of red, green and blue."""
        mean, std = STATISTICS[self.normalize] if isinstance(self.normalize, str) else self.normalize
        return mean, std
