"""Corruptions against what the published definitions give pixel by pixel, and the reader of published arrays."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch

from nt_hf.evaluation import corruptions as c
from nt_hf.evaluation.corruptions import CONSTANTS, SEVERITIES, Normalisation, corrupt, generator_of


def images(side: int = 32, count: int = 4) -> torch.Tensor:
    """Waves of several colours with noise; the first has a grey half and a black corner."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.arange(side).float()
    shift, pace = (torch.rand(count, 3, 1, 1, generator=generator) for _ in range(2))
    waves = torch.sin(6 * shift + pace * grid[:, None] / 2 + shift * grid / 3)
    pixels = 127 + 90 * waves + 15 * torch.randn(count, 3, side, side, generator=generator)
    pixels[0, :, : side // 2] = pixels[0, :, : side // 2].mean(0)
    pixels[0, :, :4, :4] = 0
    return pixels.clamp(0, 255).to(torch.uint8)


def made(name: str, severity: int, x: torch.Tensor) -> torch.Tensor:
    return corrupt(x, name, severity, generator_of(name, severity))


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.float() - y.float()).abs().mean())


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("side", [32, 64, 120])
def test_a_corruption_repeats_stays_in_form_and_grows_with_severity(name, side):
    x = images(side)
    before = x.clone()
    found = [made(name, severity, x) for severity in SEVERITIES]
    assert torch.equal(x, before)
    for severity, y in zip(SEVERITIES, found):
        assert y.dtype == torch.uint8 and y.shape == x.shape and not torch.equal(x, y)
        assert torch.equal(y, made(name, severity, x))
    # With the same directions and maps of fog at every severity.
    distances = [distance(x, corrupt(x, name, severity, generator_of(name, 1))) for severity in SEVERITIES]
    # Severities 1 and 2 of saturate take colour away, 3 to 5 add it: they grow among themselves.
    # A few neighbours are published with as strong an effect: a longer streak of equal width, fog of equal amount.
    for part in (distances[:2], distances[2:]) if name == "saturate" else (distances,):
        assert all(later > 0.98 * earlier for earlier, later in itertools.pairwise(part)), distances
        assert part[-1] > 1.05 * part[0], distances
    assert distances[0] > 0.5 and distances[-1] < 100


def test_every_corruption_has_five_severities_for_three_sizes():
    assert all([len(values) for values in sizes] == [5, 5, 5] for sizes in CONSTANTS.values())
    for side, column in ((8, 0), (32, 0), (47, 0), (48, 1), (64, 1), (111, 1), (112, 2)):
        factor = CONSTANTS["contrast"][column][3]
        x = torch.stack([torch.zeros(side, side), torch.full((side, side), 200.0)]).mean(0)
        x[0] = 50.0
        pixels = x.to(torch.uint8).expand(1, 3, side, side)
        mean = pixels.float().mean()
        low = made("contrast", 4, pixels)[0, 0, 0, 0]
        assert abs(float((50 - mean) * factor + mean) - float(low)) <= 1, side


@pytest.mark.parametrize("name", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_colours_change_as_in_hue_saturation_and_value(name, severity):
    x = images()[:1]
    found = made(name, severity, x)[0].flatten(1).T.tolist()
    constants = CONSTANTS[name][0][severity - 1]
    for before, after in zip(x[0].flatten(1).T.tolist(), found):
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in before))
        if name == "brightness":
            value = min(1, value + constants)
        else:
            saturation = min(1, saturation * constants[0] + constants[1])
        expected = [channel * 255 for channel in colorsys.hsv_to_rgb(hue, saturation, value)]
        assert max(abs(a - math.floor(e)) for a, e in zip(after, expected)) <= 1


def test_noise_has_its_published_strength():
    grey = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    value = 128 / 255
    for severity in SEVERITIES:
        at = {name: CONSTANTS[name][0][severity - 1] for name in CONSTANTS}
        noise = {name: made(name, severity, grey).float() / 255 for name in at if name.endswith("noise")}
        assert float(noise["gaussian_noise"].std()) == pytest.approx(at["gaussian_noise"], rel=0.03)
        assert float(noise["speckle_noise"].std()) == pytest.approx(value * at["speckle_noise"], rel=0.03)
        assert float(noise["shot_noise"].std()) == pytest.approx((value / at["shot_noise"]) ** 0.5, rel=0.03)
        assert float((noise["impulse_noise"] != value).float().mean()) == pytest.approx(at["impulse_noise"], rel=0.1)
        assert float((noise["impulse_noise"] == 1).float().mean()) == pytest.approx(at["impulse_noise"] / 2, rel=0.15)


def test_blurs_spread_a_point_by_their_kernel():
    point = torch.zeros(1, 3, 33, 33)
    point[:, :, 16, 16] = 1
    spread = c._gaussian_blur(point, 1.5, None)[0, 0]
    for row, column in ((16, 16), (17, 16), (18, 19), (16, 22)):
        weight = math.exp(-((row - 16) ** 2 + (column - 16) ** 2) / 4.5) / (2 * math.pi * 2.25)
        assert float(spread[row, column]) == pytest.approx(weight, rel=2e-3)
    disk = c._defocus_blur(point, (3, 0.1), None)[0, 0]
    inside = (torch.arange(33) - 16).square()[:, None] + (torch.arange(33) - 16).square() <= 9
    assert torch.allclose(disk, inside / 29, atol=1e-4)
    # Against the direction of reading: each pixel sees what lies ahead of it on the line, so a point leaves a streak.
    streak = c._motion_blur(point, (6, 2), torch.Generator().manual_seed(0))[0, 0]
    reached = streak.nonzero()
    assert float(streak.sum()) == pytest.approx(1, abs=0.03) and float(streak[16, 16]) == streak.max()
    assert reached[:, 1].max() == 16 and reached[:, 1].min() < 13
    slopes = (reached[:-1, 0] - 16) / (reached[:-1, 1] - 16).clamp(max=-1)
    assert slopes.abs().max() <= 1 or len(reached) < 4
    assert torch.allclose(c._zoom_blur(torch.full_like(point, 0.3), (1.26, 0.01), None), torch.tensor(0.3))


def test_fog_is_a_map_from_0_to_1_that_is_rougher_where_it_decays_less():
    smooth, rough = (c._plasma(3, 64, decay, torch.Generator().manual_seed(0)) for decay in (3, 1.4))
    for fog in (smooth, rough):
        assert (
            fog.shape == (3, 64, 64) and fog.amin((1, 2)).tolist() == [0] * 3 and fog.amax((1, 2)).tolist() == [1] * 3
        )
    steps = [(fog[:, 1:] - fog[:, :-1]).abs().mean() for fog in (smooth, rough)]
    assert steps[1] > 2 * steps[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((images(), "fogg", 1), r"^corruption='fogg': accepted is gaussian_noise, .*\(did you mean fog\?\)$"),
        ((images(), "fog", 6), "^severity=6: accepted is a whole number from 1 to 5$"),
        ((images().float(), "fog", 1), r"^images=float32 \[4, 3, 32, 32\]: accepted is uint8 \[n, 3, H, W\]"),
        ((images()[:, :1], "fog", 1), r"^images=uint8 \[4, 1, 32, 32\]: accepted is "),
        ((images(7), "fog", 1), "sides of 8 pixels or more$"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt(*arguments[:3], torch.Generator())


def test_normalising_and_back_gives_the_same_images():
    scale = Normalisation((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(scale.images(scale.pixel_values(x)), x)
    with pytest.raises(ValueError, match=r"^pixel_values=-?[0-9.]+ to [0-9.]+ without mean and std: accepted is 0"):
        scale.images(2 * scale.pixel_values(x))


def test_published_arrays_are_read_severity_by_severity(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (30, 9, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", array)
    np.save(tmp_path / "labels.npy", np.arange(30, dtype=np.uint8))
    assert c.published_names(tmp_path) == ["fog"]
    for severity in SEVERITIES:
        x, labels = c.read_published(tmp_path, "fog", severity)
        assert labels.tolist() == list(range(6 * severity - 6, 6 * severity)) and x.shape == (6, 3, 9, 8)
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), array[6 * severity - 6 : 6 * severity])
    for name, content in (("fog", array[:29]), ("fog", array.astype(float)), ("labels", np.arange(29))):
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        np.save(folder / "fog.npy", array)
        np.save(folder / "labels.npy", np.arange(30))
        np.save(folder / f"{name}.npy", content)
        with pytest.raises(ValueError, match=r"accepted is uint8 \[5 n, H, W, 3\] with whole numbers \[5 n\]$"):
            c.published_names(folder)
    (folder / "labels.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"labels.npy cannot be read \(.*\); accepted is a .npy array$"):
        c.read_published(folder, "fog", 1)
