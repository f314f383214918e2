"""Each augmentation next to a slow one that takes an image at a time."""

import math

import numpy as np
import torch

from nt_hf.data.augmentation import DRAWS, draw, mix, move_and_flip, random_box, smooth


def test_draws_are_uniform_and_belong_to_the_place_in_the_order():
    draws = draw(seed=3, first=0, count=4000)
    assert draws.shape == (4000, DRAWS) and draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 0.02 and np.abs(draws.var(0) - 1 / 12).max() < 0.005
    assert np.abs(np.corrcoef(draws.T) - np.eye(DRAWS)).max() < 0.06
    assert np.array_equal(draws[100:200], draw(3, 100, 100)), "however the order is cut into batches"
    assert not np.isclose(draws[:, 0], draw(4, 0, 4000)[:, 0]).any()


def test_move_and_flip_is_padding_by_reflection_a_crop_and_a_mirror():
    images = torch.randint(0, 256, (200, 3, 6, 9), dtype=torch.uint8)
    draws = draw(0, 0, 200)
    got = move_and_flip(images, draws, padding=4, flip=True)
    flipped, corners = 0, set()
    for image, numbers, result in zip(images.numpy(), draws, got.numpy()):
        down, right = int(numbers[1] * 9), int(numbers[2] * 9)
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        expected = padded[:, down : down + 6, right : right + 9]
        if numbers[0] < 0.5:
            expected, flipped = expected[:, :, ::-1], flipped + 1
        corners.add((down, right))
        assert np.array_equal(result, expected)
    assert 70 < flipped < 130 and {down for down, _ in corners} == set(range(9)) == {right for _, right in corners}
    only_flipped = move_and_flip(images, draws, padding=0, flip=True)
    assert all(torch.equal(b, a.flip(2) if d[0] < 0.5 else a) for a, b, d in zip(images, only_flipped, draws))
    assert move_and_flip(images, draws, padding=0, flip=False) is images


def test_random_boxes_have_the_areas_and_ratios_asked_for():
    width, height = 50, 40
    boxes = np.array([random_box(row[3:7], width, height, (0.1, 0.4)) for row in draw(0, 0, 2000)])
    left, top, right, bottom = boxes.T
    areas, ratios = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    assert 0.1 <= areas.min() < 0.11 and 0.39 < areas.max() <= 0.4 + 1e-9 and abs(areas.mean() - 0.25) < 0.01
    assert 3 / 4 - 1e-9 <= ratios.min() < 0.76 and 1.32 < ratios.max() <= 4 / 3 + 1e-9
    assert abs(np.log(ratios).mean()) < 0.02 and left.min() < 1 and right.max() > width - 1
    # A crop of the whole area is as wide as the image at most, and its height follows from the area.
    low, high = math.sqrt(0.75), math.sqrt(4 / 3)
    assert np.allclose(random_box((1, 0, 1, 1), 40, 40, (1, 1)), (40 - 40 * low, 0, 40, 40))
    assert np.allclose(random_box((1, 1, 0, 0), 40, 40, (1, 1)), (0, 0, 40, 40 / high))


def test_smooth_labels_and_mixup():
    labels = torch.tensor([2, 0, 1])
    targets = smooth(labels, 4, 0.1)
    logits = torch.randn(3, 4)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), expected)
    assert torch.equal(smooth(labels, 4, 0.0), torch.eye(4)[labels])
    images = torch.randn(3, 3, 2, 2)
    mixed, soft = mix(images, targets, 0.4, "key")
    share = ((mixed[1] - images[0]) / (images[1] - images[0])).mean()
    assert 0 <= share <= 1
    for i in range(3):
        torch.testing.assert_close(mixed[i], share * images[i] + (1 - share) * images[i - 1])
        torch.testing.assert_close(soft[i], share * targets[i] + (1 - share) * targets[i - 1])
    assert torch.equal(mixed, mix(images, targets, 0.4, "key")[0])
    shares = [mix(torch.tensor([0.0, 1.0]), targets[:2], 0.5, f"0/{i}")[0][1].item() for i in range(1000)]
    assert abs(np.mean(shares) - 0.5) < 0.05 and abs(np.var(shares) - 1 / 8) < 0.02, "Beta(0.5, 0.5)"
