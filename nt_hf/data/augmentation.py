"""Random changes of training images, as pure functions of images and of numbers drawn for each.

What happens to an image depends on the seed and its place in the order of training alone. So a run that stops and
resumes needs no state of a generator, and the number of processes and of loader threads does not matter. Only mixup
knows the batch.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch

DRAWS = 8  # of each image; a multiple of 4, the numbers of one step of Philox
FLIP, DOWN, RIGHT, BOX = 0, 1, 2, slice(3, 7)  # who uses which of them
RATIOS = (math.log(3 / 4), math.log(4 / 3))  # of width to height, as of torchvision's RandomResizedCrop


def draw(seed: int, first: int, count: int) -> np.ndarray:
    """Random numbers in [0, 1) for the images number ``first`` and following of a run's order: ``[count, DRAWS]``.

    By the counter-based generator Philox 4x64 (Salmon et al. 2011), whose stream numpy keeps between its versions.
    """
    generator = np.random.Philox(key=seed, counter=first * DRAWS // 4)
    return (generator.random_raw(count * DRAWS) >> np.uint64(11)).reshape(count, DRAWS) * 2.0**-53


def random_box(
    draws: Sequence[float], width: int, height: int, shares: Sequence[float]
) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of a random crop, in pixels (Szegedy et al. 2015, arXiv 1409.4842).

    Args:
        draws: four numbers in [0, 1): area, ratio of the sides, place across and down.
        width, height: of the image. A side that would be longer than the image's is cut to it.
        shares: least and largest area, as shares of the image's.
    """
    area, ratio, across, down = draws
    area = width * height * (shares[0] + area * (shares[1] - shares[0]))
    ratio = math.exp(RATIOS[0] + ratio * (RATIOS[1] - RATIOS[0]))
    wide, high = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = across * (width - wide), down * (height - high)
    return left, top, min(left + wide, width), min(top + high, height)


def move_and_flip(images: torch.Tensor, draws: np.ndarray, padding: int, flip: bool) -> torch.Tensor:
    """Moves each image by up to ``padding`` pixels each way, and mirrors half of them.

    The same as to pad by reflection, as wide residual networks do (Zagoruyko & Komodakis 2016, arXiv 1605.07146), to
    cut out a window at random and to mirror it.

    Args:
        images: ``[n, channels, H, W]``, sides above ``padding``.
        draws: ``[n, DRAWS]``.
        padding: pixels; 0 does not move.
        flip: whether to mirror.
    """
    if not padding and not flip:
        return images
    count, channels, height, width = images.shape
    drawn = torch.from_numpy(draws)
    offsets = (drawn[:, [DOWN, RIGHT]] * (2 * padding + 1)).long() - padding
    rows = _reflected(torch.arange(height) + offsets[:, :1], height)
    columns = _reflected(torch.arange(width) + offsets[:, 1:], width)
    if flip:
        columns = torch.where(drawn[:, FLIP, None] < 0.5, columns.flip(1), columns)
    places = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, -1)
    return images.view(count, channels, -1).gather(2, places.expand(-1, channels, -1)).view_as(images)


def _reflected(places: torch.Tensor, length: int) -> torch.Tensor:
    """Places up to one length outside of a line, mirrored at its first and last pixel."""
    return (length - 1) - ((length - 1) - places.abs()).abs()


def smooth(labels: torch.Tensor, classes: int, share: float) -> torch.Tensor:
    """Labels ``[n]`` as float32 shares of classes ``[n, classes]``, of which ``share`` is spread over all classes."""
    targets = torch.full((len(labels), classes), share / classes)
    return targets.scatter_(1, labels[:, None], 1 - share + share / classes)


def mix(pixel_values: torch.Tensor, targets: torch.Tensor, alpha: float, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412): each image with the one before it, whose order is random already.

    Args:
        pixel_values: ``[n, 3, H, W]``.
        targets: shares of classes ``[n, classes]``.
        alpha: the share of an image is drawn once for the batch from Beta(alpha, alpha).
        key: of that draw.
    """
    share = random.Random(key).betavariate(alpha, alpha)
    return torch.lerp(pixel_values.roll(1, 0), pixel_values, share), torch.lerp(targets.roll(1, 0), targets, share)
