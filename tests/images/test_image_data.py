"""Image sources, and batches of them: order, resuming, shares of ranks, bad images."""

import io
import itertools
import json
import os
import subprocess
import sys

import hub_server
import numpy as np
import pytest
import torch
from PIL import Image

from nt_hf.data.augmentation import draw, mix, move_and_flip, random_box, smooth
from nt_hf.data.errors import DataError
from nt_hf.data.image_config import STATISTICS, ImageConfig
from nt_hf.data.image_sets import open_images, open_training_images
from nt_hf.data.images import ImageBatches, normalised

datasets = pytest.importorskip("datasets")
AUGMENTED = {"flip": True, "crop_padding": 2, "random_resized_crop": [0.3, 1.0], "mixup": 0.4, "label_smoothing": 0.1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def digits(**options):
    return open_images("digits", ImageConfig(**options))


def numbered(count, size=(5, 5)):
    """Images whose pixels hold their number."""
    return [np.full((*size, 3), number, np.uint8) for number in range(count)]


def encoded(pixels, mode=None, kind="png"):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def write_table(path, files, labels, names=None, image="image", label="label"):
    features = None
    if names:
        features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
    rows = {image: [{"bytes": content, "path": None} for content in files], label: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def write_folders(root, **classes):
    for name, files in classes.items():
        (root / name).mkdir(parents=True)
        for i, content in enumerate(files):
            (root / name / f"{i}.png").write_bytes(content)
    return str(root)


def take(batches, count):
    return list(itertools.islice(batches, count))


def equal(some, others):
    return len(some) == len(others) and all(torch.equal(a[key], b[key]) for a, b in zip(some, others) for key in a)


def numbers_in(batches):
    """The numbers of [`numbered`] images, out of batches without augmentation that took them as they are."""
    mean, std = STATISTICS["digits"]
    values = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in batches])
    return ((values * std[0] + mean[0]) * 255).round().int().tolist()


@pytest.fixture
def table(tmp_path):
    """20 images with labels 0 to 3."""
    return write_table(tmp_path / "x.parquet", map(encoded, numbered(20)), [i % 4 for i in range(20)])


def test_the_digits_come_with_the_package():
    train, validation = open_training_images(ImageConfig())
    assert (len(train), len(validation), train.classes) == (1437, 360, list("0123456789")) and train.size == (8, 8)
    (batch,) = ImageBatches(train, batch_size=1437, training=False)
    values, labels = batch["pixel_values"], batch["labels"]
    assert values.shape == (1437, 3, 8, 8) and values.dtype == torch.float32 and labels.dtype == torch.int64
    assert abs(values.mean()) < 1e-3 and abs(values.std() - 1) < 1e-3, "normalize=digits are their own statistics"
    nearest = torch.cdist(values.flatten(1)[1200:], values.flatten(1)[:1200]).argmin(1)
    assert (labels[nearest] == labels[1200:]).float().mean() > 0.9, "images belong to their labels"


def test_the_digits_need_neither_pillow_nor_datasets(tmp_path, monkeypatch):
    for name in ("PIL", "datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    train, _ = open_training_images(ImageConfig(flip=True, crop_padding=1))
    assert len(take(ImageBatches(train, batch_size=4), 2)) == 2
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(DataError, match=r"x\.parquet: datasets is not installed: pip install 'nt_hf\[images\]'$"):
        open_images(str(tmp_path / "x.parquet"), ImageConfig())
    with pytest.raises(DataError, match=r"^Pillow is not installed: pip install 'nt_hf\[images\]'$"):
        take(ImageBatches(digits(image_size=16, on_bad_image="skip"), batch_size=4), 1)


def test_folders_and_tables_hold_the_same_images(tmp_path):
    contents = [encoded(pixels) for pixels in numbered(6)]
    folder = write_folders(tmp_path / "train", cat=contents[:2], dog=contents[2:])
    labels = [0, 0, 1, 1, 1, 1]
    plain = write_table(tmp_path / "plain.parquet", contents, labels)
    named = write_table(tmp_path / "named.parquet", contents, labels, ["cat", "dog"], "img", "fine_label")
    halves = [
        write_table(tmp_path / f"half-{i}.parquet", contents[3 * i : 3 * i + 3], labels[3 * i : 3 * i + 3])
        for i in range(2)
    ]
    sets = [
        open_images(folder, ImageConfig()),
        open_images(plain, ImageConfig()),
        open_images(named, ImageConfig(image_field="img", label_field="fine_label")),
        open_images(halves, ImageConfig()),
        open_images(str(tmp_path / "half-*.parquet"), ImageConfig()),
    ]
    for images in sets:
        batches = list(ImageBatches(images, batch_size=4, training=False))
        assert numbers_in(batches) == list(range(6)) and torch.cat([b["labels"] for b in batches]).tolist() == labels
    assert [images.classes for images in sets] == [["cat", "dog"], ["0", "1"], ["cat", "dog"], ["0", "1"], ["0", "1"]]
    write_table(tmp_path / "plain.parquet", contents[:3], labels[:3])
    assert len(open_images(plain, ImageConfig())) == 3, "a file that has changed is read anew"


def test_bytes_without_a_struct_and_paths_without_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(numbered(2)[1]))
    path = str(tmp_path / "x.parquet")
    datasets.Dataset.from_dict({"image": [encoded(numbered(1)[0])], "label": [0]}).to_parquet(path)
    assert numbers_in(ImageBatches(open_images(path, ImageConfig()), batch_size=1, training=False)) == [0]
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "a.png")}], "label": [0]}
    datasets.Dataset.from_dict(rows).to_parquet(path)
    assert numbers_in(ImageBatches(open_images(path, ImageConfig()), batch_size=1, training=False)) == [1]


@pytest.mark.slow
def test_a_set_of_the_hub(tmp_path):
    content = (tmp_path / write_table(tmp_path / "x.parquet", map(encoded, numbered(3)), [0, 1, 0])).read_bytes()
    program = (
        "from nt_hf.data.image_config import ImageConfig\n"
        "from nt_hf.data.image_sets import open_images\n"
        "print(open_images('hub:a/b', ImageConfig()).labels.tolist())\n"
        "for source in ('hub:a/b:default:valid', 'hub:a/c'):\n"
        "    try: open_images(source, ImageConfig())\n"
        "    except ValueError as error: print(error)\n"
    )
    with hub_server.serve("a/b", {"data/train-00000-of-00001.parquet": content}) as (endpoint, _):
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path if folder)
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": path}
        run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True)
    lines = run.stdout.decode().splitlines()
    assert lines[0] == "[0, 1, 0]" and len(lines) == 3, run.stderr.decode()
    assert "unknown split 'valid'; accepted is one of train" in lines[1] and "hub:a/c: cannot be resolved" in lines[2]


def test_each_epoch_is_a_permutation_and_the_seed_decides(table):
    images = open_images(table, ImageConfig())
    order = numbers_in(take(ImageBatches(images, batch_size=8, seed=1), 5))
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20)) and order[:20] != order[20:]
    assert order == numbers_in(take(ImageBatches(images, batch_size=5, seed=1), 8)) != list(range(20)) * 2
    assert order != numbers_in(take(ImageBatches(images, batch_size=8, seed=2), 5))


@pytest.mark.parametrize("training", [True, False])
def test_ranks_share_the_images(table, training):
    images = open_images(table, ImageConfig())
    ranks = [ImageBatches(images, batch_size=3, training=training, rank=rank, world_size=2) for rank in range(2)]
    shares = [take(batches, 4) for batches in ranks]  # 24 images, or all 20 of the only epoch
    shares = [[number for batch in share for number in numbers_in([batch])] for share in shares]
    single = take(ImageBatches(images, batch_size=6, training=training), 4)
    steps = [sorted(shares[0][i : i + 3] + shares[1][i : i + 3]) for i in range(0, 12, 3)]
    assert steps == [sorted(numbers_in([batch])) for batch in single]
    if not training:
        assert sorted(shares[0] + shares[1]) == list(range(20)) and len(shares[0]) == 11


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("heads", [None, 2])
def test_a_resumed_run_sees_the_same_batches(workers, heads):
    images = digits(**AUGMENTED, num_workers=workers)
    options = {"batch_size": 100, "seed": 5, "heads": heads}
    expected = take(ImageBatches(images, **options), 34)  # two epochs and a little more
    stopped = ImageBatches(images, **options)
    assert equal(take(stopped, 20), expected[:20])
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = ImageBatches(digits(**AUGMENTED, num_workers=2 - workers), **options)
    resumed.load_state_dict([state])
    assert resumed.epoch == 1 and equal(take(resumed, 14), expected[20:]) and resumed.epoch == 2
    assert equal(take(resumed, 2), expected[:2]), "the iteration after it starts from the beginning"


def test_resuming_with_other_ranks_keeps_the_order_and_the_augmentation():
    images = digits(flip=True, crop_padding=2)
    rows = torch.cat([batch["pixel_values"] for batch in take(ImageBatches(images, batch_size=60), 4)])
    states = []
    for rank in range(2):
        batches = ImageBatches(images, batch_size=30, rank=rank, world_size=2)
        assert torch.equal(take(batches, 1)[0]["pixel_values"], rows[rank * 30 : rank * 30 + 30])
        states.append(batches.state_dict())
    resumed = ImageBatches(images, batch_size=90)
    resumed.load_state_dict(states)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in take(resumed, 2)]), rows[60:240])


def test_states_of_other_data_are_refused():
    images = digits()
    batches = ImageBatches(images, batch_size=10, world_size=2)
    state = batches.state_dict()
    for other, problem in [
        (ImageBatches(images, batch_size=10, seed=1), "seed=0"),
        (ImageBatches(images, batch_size=10, heads=2), "heads=None"),
        (ImageBatches(open_images("digits:validation", ImageConfig()), batch_size=10), "images='1437 of (8, 8)"),
    ]:
        with pytest.raises(ValueError, match="data state: was saved with") as error:
            other.load_state_dict([state])
        assert problem in str(error.value)
    for states in ([], [{}], [{**state, "images": -1}], [{**state, "images": "1"}], [None]):
        with pytest.raises(ValueError, match="data state: not one that ImageBatches wrote"):
            batches.load_state_dict(states)
    with pytest.raises(ValueError, match="all after as many"):
        batches.load_state_dict([state, {**state, "images": 20}])


def test_every_head_has_an_order_of_its_own(table):
    images = open_images(table, ImageConfig())
    batches = take(ImageBatches(images, batch_size=10, heads=3), 2)
    assert batches[0]["pixel_values"].shape == (3, 10, 3, 5, 5) and batches[0]["labels"].shape == (3, 10)
    orders = [numbers_in([{"pixel_values": batch["pixel_values"][head]} for batch in batches]) for head in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders) and len(set(map(tuple, orders))) == 3
    assert orders[0] == numbers_in(take(ImageBatches(images, batch_size=10), 2)), "as without"
    soft = take(ImageBatches(digits(mixup=0.2), batch_size=10, heads=2), 1)[0]["labels"]
    assert soft.shape == (2, 10, 10) and torch.allclose(soft.sum(-1), torch.ones(2, 10))


def test_augmentation_is_applied_in_training_only():
    plain, augmented = digits(), digits(flip=True, crop_padding=2)
    (raw,) = take(ImageBatches(plain, batch_size=50, seed=3), 1)
    (batch,) = take(ImageBatches(augmented, batch_size=50, seed=3), 1)
    expected = move_and_flip(raw["pixel_values"], draw(3, 0, 50), 2, True)
    assert torch.equal(batch["pixel_values"], expected) and torch.equal(batch["labels"], raw["labels"])
    soft = take(ImageBatches(digits(mixup=0.4, label_smoothing=0.1), batch_size=50, seed=3), 2)
    for batch, raw, key in zip(soft, take(ImageBatches(plain, batch_size=50, seed=3), 2), ("3/0", "3/50")):
        mixed, targets = mix(raw["pixel_values"], smooth(raw["labels"], 10, 0.1), 0.4, key)
        assert torch.equal(batch["pixel_values"], mixed) and torch.equal(batch["labels"], targets)
    both = [list(ImageBatches(images, batch_size=500, training=False)) for images in (plain, digits(**AUGMENTED))]
    assert equal(*both) and both[0][0]["labels"].dtype == torch.int64


def test_random_crops_are_cut_from_the_full_image(tmp_path):
    """Bilinear enlargement, written out for each pixel, next to Pillow's."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    folder = write_folders(tmp_path / "x", a=[encoded(pixels)])
    images = open_images(folder, ImageConfig(image_size=24, random_resized_crop=[0.1, 0.2], normalize="cifar10"))
    (batch,) = take(ImageBatches(images, batch_size=1), 1)
    left, top, right, bottom = random_box(draw(0, 0, 1)[0, 3:7], 30, 20, (0.1, 0.2))
    expected = np.empty((24, 24, 3))
    for row, column in itertools.product(range(24), range(24)):
        # The centre of the pixel in the image; neighbours outside of the crop's pixels do not count.
        y, x = top + (row + 0.5) * (bottom - top) / 24 - 0.5, left + (column + 0.5) * (right - left) / 24 - 0.5
        near = [
            (i, j, (1 - abs(y - i)) * (1 - abs(x - j)))
            for i in (int(np.floor(y)), int(np.floor(y)) + 1)
            for j in (int(np.floor(x)), int(np.floor(x)) + 1)
            if 0 <= i < 20 and 0 <= j < 30
        ]
        expected[row, column] = sum(w * pixels[i, j] for i, j, w in near) / sum(w for *_, w in near)
    mean, std = (np.array(values)[:, None, None] for values in STATISTICS["cifar10"])
    got = (batch["pixel_values"][0].numpy() * std + mean) * 255
    inner = np.abs(got - expected.transpose(2, 0, 1))[:, 2:-2, 2:-2]
    assert inner.max() < 1.5, "rounded twice"


def test_images_are_scaled_and_cut_around_the_middle(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[5:15, 15:25] = 200  # the middle square of half of the side
    folder = write_folders(tmp_path / "x", a=[encoded(pixels)])
    for share, side, bright in [(1.0, 20, 100), (0.5, 10, 100), (1.0, 10, 25)]:
        images = open_images(folder, ImageConfig(image_size=side, center_crop=share))
        shown = images.read(0)
        assert shown.shape == (side, side, 3) and abs(int((shown > 100).all(-1).sum()) - bright) <= 11, (share, side)


def test_known_statistics_and_given_ones():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    config = ImageConfig(normalize=[[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]])
    expected = (pixels / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(
        3, 1, 1
    )
    assert torch.equal(normalised(pixels, *config.statistics), expected)
    assert ImageConfig(normalize="cifar100").statistics == STATISTICS["cifar100"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    pixels = np.full((5, 5, 3), 255, np.uint8)
    content = encoded(pixels, mode, "tiff" if mode == "CMYK" else "png")
    folder = write_folders(tmp_path / "x", a=[content])
    assert np.abs(open_images(folder, ImageConfig()).read(0).astype(int) - 255).max() <= 1


def test_a_held_out_share_of_the_training_images(table):
    config = ImageConfig(train=table, validation="nowhere", validation_share=0.25)
    train, validation = open_training_images(config)
    read = [numbers_in(ImageBatches(images, batch_size=7, training=False)) for images in (train, validation)]
    assert len(read[1]) == 5 and sorted(read[0] + read[1]) == list(range(20)) and read[1] != list(range(5))
    assert sorted(numbers_in(take(ImageBatches(train, batch_size=5), 3))) == read[0]
    other = open_training_images(ImageConfig(train=table, validation_share=0.25, split_seed=1))[1]
    assert numbers_in(ImageBatches(other, batch_size=7, training=False)) != read[1]
    (batch,) = ImageBatches(validation, batch_size=5, training=False)
    assert batch["labels"].tolist() == [number % 4 for number in read[1]]
    with pytest.raises(DataError, match=r"validation_share=0\.01 is 0 of 20 images"):
        open_training_images(ImageConfig(train=table, validation_share=0.01))


def test_validation_has_the_classes_of_training(tmp_path):
    contents = [encoded(pixels) for pixels in numbered(3)]
    train = open_images(write_folders(tmp_path / "a", ant=contents, bee=contents, cat=contents), ImageConfig())
    fewer = open_images(write_folders(tmp_path / "b", bee=contents, cat=contents), ImageConfig(), like=train)
    assert fewer.labels.tolist() == [1, 1, 1, 2, 2, 2] and fewer.classes == train.classes
    other_order = write_table(tmp_path / "x.parquet", contents, [0, 1, 2], ["cat", "bee", "ant"])
    assert open_images(other_order, ImageConfig(), like=train).labels.tolist() == [2, 1, 0]
    with pytest.raises(DataError, match="class 'dog' is none of those of"):
        open_images(write_folders(tmp_path / "c", ant=contents, dog=contents), ImageConfig(), like=train)
    unnamed = write_table(tmp_path / "y.parquet", contents, [0, 1, 3])
    with pytest.raises(DataError, match=r"y\.parquet, image 3: label=3: accepted is 0 to 2"):
        open_images(unnamed, ImageConfig(), like=train)


def test_bad_images_are_named_or_skipped_and_counted(tmp_path, caplog):
    contents = [encoded(pixels) for pixels in numbered(12)]
    contents[2] = b"no image"
    contents[5] = contents[5][:50]
    contents[7] = encoded(np.zeros((5, 6, 3), np.uint8))
    contents[9] = encoded(np.zeros((5, 5), np.uint16))
    folder = write_folders(tmp_path / "x", a=contents[:6], b=contents[6:])
    table = write_table(tmp_path / "x.parquet", contents, [0] * 12)
    for source, name in ((folder, os.path.join("a", "2.png")), (table, "x.parquet, image 3")):
        images = open_images(source, ImageConfig())
        with pytest.raises(DataError, match="cannot be read as an image") as error:
            list(ImageBatches(images, batch_size=12, training=False))
        assert f"{name}: " in str(error.value) and "\n" not in str(error.value) and "on_bad_image" in str(error.value)
    problems = {}
    for number in (2, 5, 7, 9):
        with pytest.raises(DataError) as error:
            images.read(number)
        problems[number] = str(error.value)
    assert "is of 6x5 pixels; accepted is 5x5 as of the others, or image_size" in problems[7]
    assert "is of mode I;16; accepted are 8 bits" in problems[9]
    images = open_images(folder, ImageConfig(on_bad_image="skip"))
    evaluation = ImageBatches(images, batch_size=5, training=False)
    batches = list(evaluation)
    assert numbers_in(batches) == [0, 1, 3, 4, 6, 8, 10, 11] and [len(b["labels"]) for b in batches] == [4, 2, 2]
    assert evaluation.bad_images == evaluation.bad_lines == 4 and "bad images so far: 4" in caplog.text
    for heads in (None, 2):
        training = ImageBatches(images, batch_size=8, heads=heads)
        taken = take(training, 3)
        assert all(batch["labels"].shape[-1] == 8 for batch in taken), "others take their place"
        assert heads or set(numbers_in(taken)) == {0, 1, 3, 4, 6, 8, 10, 11}
        assert training.bad_images == 8 * (heads or 1), "in each of two epochs"
        resumed = ImageBatches(images, batch_size=8, heads=heads)
        resumed.load_state_dict([training.state_dict()])
        take(resumed, 3)
        assert resumed.bad_images == 16 * (heads or 1)
    scaled = open_images(folder, ImageConfig(on_bad_image="skip", image_size=5))
    assert len(numbers_in(ImageBatches(scaled, batch_size=12, training=False))) == 9, "another size is scaled"


def test_images_after_a_bad_one_keep_their_own_augmentation(tmp_path):
    slopes = [np.arange(75, dtype=np.uint8).reshape(5, 5, 3) + 5 * number for number in range(20)]
    contents = [encoded(pixels) for pixels in slopes]
    good = open_images(write_folders(tmp_path / "good", a=contents), ImageConfig(flip=True))
    contents[7] = b""
    bad = open_images(write_folders(tmp_path / "bad", a=contents), ImageConfig(flip=True, on_bad_image="skip"))
    (expected,), (got,) = (take(ImageBatches(images, batch_size=20), 1) for images in (good, bad))
    same = [any(torch.equal(row, other) for other in got["pixel_values"]) for row in expected["pixel_values"]]
    assert sum(same) == 19, "all but the bad one"


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_bad_images(tmp_path, training):
    images = write_folders(tmp_path / "x", a=[b"none"] * 3)
    with pytest.raises(DataError, match="holds no image that can be read"):
        open_images(images, ImageConfig(on_bad_image="skip"))
    batches = ImageBatches(
        open_images(images, ImageConfig(on_bad_image="skip", image_size=4)), batch_size=2, training=training
    )
    with pytest.raises(DataError, match=r"none can be read|none of its images can be read"):
        list(batches)


def test_errors_of_sources_are_one_line(tmp_path):
    content = encoded(numbered(1)[0])
    (tmp_path / "empty").mkdir()
    write_folders(tmp_path / "splits", train=[content], test=[content])
    write_folders(tmp_path / "hollow", a=[content], b=[])
    (tmp_path / "text.parquet").write_text("text")
    good = write_table(tmp_path / "good.parquet", [content], [0])
    write_table(tmp_path / "negative.parquet", [content] * 2, [0, -1])
    write_table(tmp_path / "words.parquet", [content], ["cat"])
    write_table(tmp_path / "nulls.parquet", [content] * 2, [0, None])
    write_table(tmp_path / "none.parquet", [content], [0], ["a", "b"])
    datasets.Dataset.from_dict({"image": [3], "label": [0]}).to_parquet(tmp_path / "numbers.parquet")
    for source, problem, options in [
        ("digits:test", "accepted is digits:train or digits:validation", {}),
        ("nowhere", "nowhere: accepted is digits:train, digits:validation, an existing folder", {}),
        ("nowhere.parquet", "no such file", {}),
        ("empty", "holds no folders", {}),
        ("splits", "holds the splits of a data set; accepted is one of them, such as", {}),
        ("hollow", f"{os.path.join('hollow', 'b')}: holds no images", {}),
        ("text.parquet", "text.parquet: cannot be read (", {}),
        ("good.parquet", "has no column 'img', its columns are image, label", {"image_field": "img"}),
        ("good.parquet", "has no column 'y'", {"label_field": "y"}),
        ("negative.parquet", "image 2: label=-1: accepted is 0 to 0", {}),
        ("words.parquet", "column 'label' is of type string with 0 nulls; accepted are whole numbers", {}),
        ("nulls.parquet", "with 1 nulls", {}),
        ("numbers.parquet", "numbers.parquet, image 1: is 3; accepted are the bytes of an image", {}),
        ("good.parquet", "crop_padding=5: accepted is less than a side of (5, 5)", {"crop_padding": 5}),
    ]:
        source = source if source.startswith("digits") else str(tmp_path / source)
        with pytest.raises(DataError) as error:
            open_images(source, ImageConfig(**options))
        assert problem in str(error.value) and "\n" not in str(error.value), error.value
    with pytest.raises(DataError, match="or a list of the last two"):
        open_images([good, str(tmp_path / "splits" / "train")], ImageConfig())
    with pytest.raises(ValueError, match="source=3: accepted is"):
        open_images(3, ImageConfig())


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("normalize", "cifar", "did you mean cifar100?|did you mean cifar10?"),
        ("normalize", [[0.5] * 3, [0.0] * 3], "std above 0"),
        ("normalize", [[0.5] * 3], "std above 0"),
        ("random_resized_crop", [1.0, 0.5], "two numbers in"),
        ("random_resized_crop", [0.0, 0.5], "two numbers in"),
        ("center_crop", 0.5, "1 where image_size is null"),
        ("image_size", 0, "a whole number from 1, or null"),
        ("validation_share", 1.0, "a share of the training images in"),
        ("mixup", -1, "a number from 0"),
        ("label_smoothing", 1, "a number in"),
        ("on_bad_image", "ignore", "error, skip"),
        ("train", [], "a source of data or a list"),
    ],
)
def test_settings_have_accepted_values(key, value, accepted):
    with pytest.raises(ValueError, match=accepted) as error:
        ImageConfig(**{key: value})
    assert str(error.value).startswith(f"{key}={value!r}: accepted is ")


def test_arguments_have_accepted_values():
    for options, name in [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank=2: accepted is 0 to 1"),
        ({"batch_size": 1, "heads": 0}, "heads=0"),
    ]:
        with pytest.raises(ValueError, match=name):
            ImageBatches(digits(), **options)


def test_waiting_is_counted_and_an_abandoned_iteration_ends_its_threads(table):
    import threading

    batches = ImageBatches(open_images(table, ImageConfig(num_workers=2)), batch_size=4)
    before = threading.active_count()
    iterator = iter(batches)
    next(iterator)
    assert batches.wait_seconds > 0 and threading.active_count() > before
    iterator.close()
    assert threading.active_count() == before
