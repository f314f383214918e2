"""The corruptions of ImageNet-C, CIFAR-C and Tiny ImageNet-C that need only torch and Pillow, at five severities.

Defined by Hendrycks & Dietterich 2019 (arXiv 1903.12261). The constants are those of the authors' programs
``make_cifar_c.py``, ``make_tinyimagenet_c.py`` and ``make_imagenet_c.py`` (github.com/hendrycks/robustness, directory
ImageNet-C/create_c), written for images of 32, 64 and 224 pixels. Left out are those that need photographs (frost), a
loop over pixels (glass blur) or OpenCV (spatter, snow, elastic transform).
"""

import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..checks import check, choice, integer

SEVERITIES = range(1, 6)
# Images whose shorter side is below the first bound get the constants for 32 pixels, below the second for 64.
BOUNDS = (48, 112)

# Of every corruption, the constants for images of 32, 64 and 224 pixels, of severities 1 to 5.
CONSTANTS: dict[str, tuple[list[Any], list[Any], list[Any]]] = {
    # Standard deviation of the noise; of speckle noise as a share of the value.
    "gaussian_noise": ([0.04, 0.06, 0.08, 0.09, 0.10], [0.04, 0.08, 0.12, 0.15, 0.18], [0.08, 0.12, 0.18, 0.26, 0.38]),
    "speckle_noise": ([0.06, 0.1, 0.12, 0.16, 0.2], [0.15, 0.2, 0.25, 0.3, 0.35], [0.15, 0.2, 0.35, 0.45, 0.6]),
    # Photons of a value of 1.
    "shot_noise": ([500, 250, 100, 75, 50], [250, 100, 50, 30, 15], [60, 25, 12, 5, 3]),
    # Share of values that become 0 or 1.
    "impulse_noise": ([0.01, 0.02, 0.03, 0.05, 0.07], [0.01, 0.02, 0.05, 0.08, 0.14], [0.03, 0.06, 0.09, 0.17, 0.27]),
    # Standard deviation of the blur in pixels.
    "gaussian_blur": ([0.4, 0.6, 0.7, 0.8, 1], [0.5, 0.75, 1, 1.25, 1.5], [1, 2, 3, 4, 6]),
    # Radius of the disk and standard deviation of its smoothing.
    "defocus_blur": (
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        [(0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)],
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    ),
    # Radius and standard deviation of the streak.
    "motion_blur": (
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    ),
    # End and step of the zoom factors, for numpy.arange.
    "zoom_blur": (
        [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
    ),
    # Amount of the fog and decay of its roughness from scale to scale.
    "fog": (
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        [(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    ),
    # What is added to the value (of hue, saturation, value).
    "brightness": ([0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]),
    # Factor of the differences from the mean.
    "contrast": ([0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05], [0.4, 0.3, 0.2, 0.1, 0.05]),
    # Factor and summand of the saturation: 1 and 2 take colour away, 3 to 5 add it.
    "saturate": (
        [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
        [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)],
        [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)],
    ),
    # Factor of the sides.
    "pixelate": ([0.95, 0.9, 0.85, 0.75, 0.65], [0.9, 0.8, 0.7, 0.6, 0.5], [0.6, 0.5, 0.4, 0.3, 0.25]),
    # JPEG's quality.
    "jpeg_compression": ([80, 65, 58, 50, 40], [65, 58, 50, 40, 25], [25, 18, 15, 10, 7]),
}


def corrupt(images: torch.Tensor, name: str, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Images ``[n, 3, H, W]`` of uint8 with the corruption ``name``, in the same form; the images stay as they are.

    Args:
        images: on the CPU, sides of 8 pixels or more.
        name: one of ``CONSTANTS``.
        severity: 1 to 5.
        generator: what noise, directions and fog are drawn from, for all images together; see [`generator_of`].

    Raises:
        ValueError: an argument is none of these.
    """
    check("corruption", name, choice(CONSTANTS))
    check("severity", severity, integer(SEVERITIES[0], SEVERITIES[-1]))
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 8:
        form = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise ValueError(f"images={form}: accepted is uint8 [n, 3, H, W] with sides of 8 pixels or more")
    constants = CONSTANTS[name][sum(min(images.shape[2:]) >= bound for bound in BOUNDS)][severity - 1]
    corrupted = _FUNCTIONS[name](images.float() / 255, constants, generator)
    # Cut off to whole numbers, as in the published arrays; the summand is for those that rounding left just below one.
    return (corrupted.clamp(0, 1) * 255 + 1e-3).to(torch.uint8)


def generator_of(name: str, severity: int, seed: int = 0) -> torch.Generator:
    """A generator of a corruption's own: its draws do not depend on which others are made."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {severity}".encode()))


@dataclass(frozen=True)
class Normalisation:
    """Between images ``[n, 3, H, W]`` of uint8 and what a model takes, ``(image / 255 - mean) / std`` by channel."""

    mean: Sequence[float]
    std: Sequence[float]

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """What the model takes."""
        mean, std = self._by_channel()
        return (images.float() / 255 - mean) / std

    def images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The images that ``pixel_values`` were made from.

        Raises:
            ValueError: values lie outside 0 to 1, so they were made by another mean or standard deviation.
        """
        mean, std = self._by_channel()
        values = pixel_values.float().cpu() * std + mean
        if not ((values > -0.01) & (values < 1.01)).all():
            raise ValueError(
                f"pixel_values={float(values.min()):.3f} to {float(values.max()):.3f} without mean and std: accepted "
                "is 0 to 1, images normalised by image_mean and image_std of the checkpoint"
            )
        return (values * 255).round().clamp(0, 255).to(torch.uint8)

    def _by_channel(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)


# Each takes images in [0, 1], the constants of a severity and a generator.


def _gaussian_noise(x: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    return x + scale * torch.randn(x.shape, generator=generator)


def _speckle_noise(x: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    return x + x * scale * torch.randn(x.shape, generator=generator)


def _shot_noise(x: torch.Tensor, photons: float, generator: torch.Generator) -> torch.Tensor:
    return torch.poisson(x * photons, generator=generator) / photons


def _impulse_noise(x: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Of every channel by itself, half of the values become 1 (salt) and half 0 (pepper)."""
    hit = torch.rand(x.shape, generator=generator) < share
    return torch.where(hit, (torch.rand(x.shape, generator=generator) < 0.5).float(), x)


def _gaussian_blur(x: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    kernel = _gaussian(sigma, int(4 * sigma + 0.5))  # scikit-image ends it at 4 standard deviations
    return _convolve(x, torch.outer(kernel, kernel), "replicate")


def _defocus_blur(x: torch.Tensor, constants: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """By a disk, whose edge is smoothed by a Gaussian of 3 x 3 pixels, of 5 x 5 where the disk is large."""
    radius, sigma = constants
    # The published kernel has 8 pixels to each side or the radius if that is more; the zeros around it are left out.
    size = radius if radius > 8 else min(8, int(radius) + 2)
    square = torch.arange(-size, size + 1).square()
    disk = (square[:, None] + square <= radius**2).float()
    edge = _gaussian(sigma, 2 if radius > 8 else 1)
    kernel = _convolve((disk / disk.sum())[None, None], torch.outer(edge, edge), "reflect")[0, 0]
    return _convolve(x, kernel, "reflect")


def _motion_blur(x: torch.Tensor, constants: tuple[int, float], generator: torch.Generator) -> torch.Tensor:
    """By half a Gaussian along a line from each pixel, at -45 to 45 degrees: ImageMagick's MotionBlurImage."""
    radius, sigma = constants
    count, _, height, width = x.shape
    angle = torch.deg2rad(torch.rand(count, 1, generator=generator) * 90 - 45)
    weights = _gaussian(sigma, 2 * radius)[2 * radius :]
    total = torch.zeros(count, height, width, 3)
    for place, weight in enumerate(weights / weights.sum()):
        rows = (torch.arange(height) + (place * angle.sin() - 0.5).ceil().long()).clamp(0, height - 1)
        columns = (torch.arange(width) + (place * angle.cos() - 0.5).ceil().long()).clamp(0, width - 1)
        total += weight * x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return (total.permute(0, 3, 1, 2) * 255).round() / 255  # ImageMagick rounds


def _zoom_blur(x: torch.Tensor, constants: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """The mean of the image and of its enlargements."""
    factors = np.arange(1, *constants).tolist()
    total = x.clone()
    for factor in factors:
        sides = x.shape[2:]
        kept = [math.ceil(side / factor) for side in sides]
        top, left = ((side - part) // 2 for side, part in zip(sides, kept))
        middle = x[:, :, top : top + kept[0], left : left + kept[1]]
        large = F.interpolate(middle, [round(part * factor) for part in kept], mode="bilinear", align_corners=True)
        top, left = ((grown - side) // 2 for grown, side in zip(large.shape[2:], sides))
        total += large[:, :, top : top + sides[0], left : left + sides[1]]
    return total / (len(factors) + 1)


def _fog(x: torch.Tensor, constants: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    amount, decay = constants
    brightest = x.amax((1, 2, 3), keepdim=True)
    side = 2 ** math.ceil(math.log2(max(x.shape[2:])))
    fog = _plasma(len(x), side, decay, generator)[:, None, : x.shape[2], : x.shape[3]]
    return (x + amount * fog) * brightest / (brightest + amount)


def _plasma(count: int, side: int, decay: float, generator: torch.Generator) -> torch.Tensor:
    """Maps ``[count, side, side]`` from 0 to 1 by the diamond-square algorithm; the side is a power of 2."""
    height = torch.zeros(count, side, side)
    step, roughness = side, 100.0

    def rough_mean(total: torch.Tensor) -> torch.Tensor:
        return total / 4 + roughness**2 * (2 * torch.rand(total.shape, generator=generator) - 1)

    while step >= 2:
        half = step // 2
        corners = height[:, ::step, ::step]
        sides = corners + corners.roll(-1, 1)
        centres = height[:, half::step, half::step]  # a view, as the corners are
        centres.copy_(rough_mean(sides + sides.roll(-1, 2)))
        height[:, ::step, half::step] = rough_mean(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        height[:, half::step, ::step] = rough_mean(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, roughness = half, roughness / decay
    height -= height.amin((1, 2), keepdim=True)
    return height / height.amax((1, 2), keepdim=True)


def _brightness(x: torch.Tensor, added: float, generator: torch.Generator) -> torch.Tensor:
    value = x.amax(1, keepdim=True)
    raised = (value + added).clamp(max=1)
    return torch.where(value > 0, x * (raised / value), raised)  # hue and saturation stay; black becomes grey


def _contrast(x: torch.Tensor, factor: float, generator: torch.Generator) -> torch.Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _saturate(x: torch.Tensor, constants: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    factor, added = constants
    value = x.amax(1, keepdim=True)
    spread = value - x.amin(1, keepdim=True)
    changed = (spread / value.clamp(min=1e-9) * factor + added).clamp(0, 1) * value
    # Grey has no hue: the published program takes it for red.
    red = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)
    return value - changed * torch.where(spread > 0, (value - x) / spread, red)


def _pixelate(x: torch.Tensor, factor: float, generator: torch.Generator) -> torch.Tensor:
    from PIL import Image

    def coarse(image: Any) -> Any:
        small = image.resize([int(side * factor) for side in image.size], Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.BOX)

    return _with_pillow(x, coarse)


def _jpeg_compression(x: torch.Tensor, quality: int, generator: torch.Generator) -> torch.Tensor:
    from PIL import Image

    def compressed(image: Any) -> Any:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _with_pillow(x, compressed)


def _with_pillow(x: torch.Tensor, edit: Callable[[Any], Any]) -> torch.Tensor:
    from PIL import Image

    arrays = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    edited = np.stack([np.asarray(edit(Image.fromarray(array))) for array in arrays])
    return torch.from_numpy(edited).permute(0, 3, 1, 2).float() / 255


def _gaussian(sigma: float, radius: int) -> torch.Tensor:
    """Weights of a Gaussian at ``-radius`` to ``radius``, with sum 1."""
    weights = torch.exp(-torch.arange(-radius, radius + 1).double().square() / (2 * sigma**2))
    return (weights / weights.sum()).float()


def _convolve(x: torch.Tensor, kernel: torch.Tensor, border: str) -> torch.Tensor:
    """Every channel by a symmetric kernel, beyond the border continued as ``torch.nn.functional.pad`` says."""
    height, width = kernel.shape
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode=border)
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view(x.shape)


_FUNCTIONS = {name: globals()[f"_{name}"] for name in CONSTANTS}


def open_published(directory: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """One corruption of the arrays CIFAR-10-C or CIFAR-100-C (zenodo.org/records/2535967 and 3555552), not read yet.

    Returns:
        Images of ``<name>.npy``, uint8 ``[5 n, H, W, 3]``, severity after severity, and the labels ``[5 n]`` of
        ``labels.npy``. As they were published, ``n`` is 10,000 and the sides are 32.

    Raises:
        ValueError: a file is missing, or holds something else.
    """
    images, labels = (_array(directory / f"{file}.npy") for file in (name, "labels"))
    good = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and len(images) % 5 == 0
    if not good or labels.shape != images.shape[:1] or labels.dtype.kind not in "ui":
        raise ValueError(
            f"{directory / name}.npy is {images.dtype} {list(images.shape)} with {labels.dtype} labels "
            f"{list(labels.shape)}; accepted is uint8 [5 n, H, W, 3] with whole numbers [5 n]"
        )
    return images, labels


def read_published(directory: Path, name: str, severity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[n, 3, H, W]`` of uint8 and labels ``[n]`` of one severity, see [`open_published`]."""
    check("severity", severity, integer(SEVERITIES[0], SEVERITIES[-1]))
    images, labels = open_published(directory, name)
    count = len(images) // 5
    rows = slice((severity - 1) * count, severity * count)
    return torch.from_numpy(images[rows].copy()).permute(0, 3, 1, 2), torch.from_numpy(labels[rows].astype(np.int64))


def published_names(directory: Path) -> list[str]:
    """The corruptions whose arrays lie in ``directory``, all of them checked.

    Raises:
        ValueError: there are none, or one is not as it was published.
    """
    names = sorted(path.stem for path in directory.glob("*.npy") if path.stem != "labels")
    if not names:
        raise ValueError(f"{directory} has no arrays; accepted is a directory of CIFAR-10-C or CIFAR-100-C (*.npy)")
    for name in names:
        open_published(directory, name)
    return names


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}); accepted is a .npy array") from error
