"""How well an image classifier predicts: accuracy, calibration, corrupted and out-of-distribution images.

    nt-hf evaluate images --model runs/digits/checkpoint-800 --output images.json --corruptions all --severities 1,3,5

Prints tables and writes the JSON file --output and plots beside it. Temperatures are fitted on --calibration, which
must not be the images that are scored, one for each head and each ensemble. --against compares with an earlier result
on the same images.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..checks import Rule, check, choice, integer, number, optional
from ..evaluation.classification import (
    by_scorer,
    disagreement,
    figures,
    fit_temperature,
    gains,
    load_image_model,
    losses_of,
    out_of_distribution,
    predict,
    reliability,
)
from ..evaluation.comparison import paired_bootstrap
from ..evaluation.corruptions import (
    CONSTANTS,
    SEVERITIES,
    Normalisation,
    corrupt,
    generator_of,
    published_names,
    read_published,
)
from ..evaluation.image_report import CORRUPTED, corruption_means, tables, write_plots
from ..files import write_json
from ..models.masks import overall_density
from ..sparsity.measures import head_overlap, masks_by_head
from ..text import strict_json
from .program import check_output, provenance

Batch = Mapping[str, torch.Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    check_output(args.output)
    corruptions = parse_corruptions(args.corruptions)
    check("--held_out", args.held_out, number("[0, 1)", "a share of --calibration"))
    check("--held_out", args.held_out, Rule(lambda share: share == 0 or args.calibration, "0 without --calibration"))
    check("--corrupted_images", args.corrupted_images, optional(integer(1)))
    severities = parse_severities(args.severities)
    published = published_names(args.cifar_c) if args.cifar_c else []
    other = read_result(args.against) if args.against else None
    model = load_image_model(args.model)
    scale = read_normalisation(args.model)
    sources = {
        name: open_images(
            source, scale, args, args.held_out if name == "calibration" else 0.0,
            None if name == "ood" else class_names(model.config),
        )
        for name in ("data", "calibration", "ood")
        if (source := getattr(args, name)) is not None
    }  # fmt: skip
    data = sources["data"]
    logits, labels, fingerprint = predict_known(model, data, scale)
    if other and other["fingerprint"] != fingerprint:
        raise ValueError(f"--against {args.against}: is of other images; accepted is a result on those of --data")
    mode = getattr(model.config, "ensemble_mode", "logits")
    main_scorer = "head 0" if len(logits) == 1 else f"ensemble, {mode}"
    temperatures = {}
    if args.calibration:
        held_out, truth, other_images = predict_known(model, sources["calibration"], scale)
        if other_images == fingerprint:
            raise ValueError(f"--calibration {args.calibration}: accepted are images other than those of --data")
        temperatures = {name: fit_temperature(x, truth) for name, x in by_scorer(held_out)}

    def scores(head_logits: torch.Tensor, truth: torch.Tensor) -> dict[str, dict[str, float]]:
        return {name: figures(x, truth, temperatures.get(name)) for name, x in by_scorer(head_logits)}

    def corrupted_scores(names: Sequence[str], batches: Callable[[str, int], Iterator[Batch]]) -> dict[str, Any]:
        return {n: {str(s): scores(*predict(model, batches(n, s))) for s in severities} for n in names}

    clean = scores(logits, labels)
    result: dict[str, Any] = {
        "images": len(labels),
        "classes": logits.shape[-1],
        "heads": len(logits),
        "ensemble_mode": mode,
        "main_scorer": main_scorer,
        "scores": clean,
        "gains": gains(clean),
        "disagreement": asdict(disagreement(logits)),
        "mask_overlap": head_overlap(masks_by_head(model)),
        "density": overall_density(model),
        "ood": args.ood and unknown_images(model, sources, args, logits, main_scorer),
        "corruptions": corrupted_scores(
            corruptions, lambda n, s: corrupted(first(data, args.corrupted_images), scale, n, s, args.seed)
        ),
        "cifar_c": corrupted_scores(published, lambda n, s: published_batches(args, data, scale, n, s)),
        "against": None,
        "model": str(args.model),
        "data": args.data,
        "calibration": args.calibration,
        "held_out": args.held_out,
        "corrupted_images": args.corrupted_images,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "fingerprint": fingerprint,
        "reliability": {name: asdict(reliability(x, labels)) for name, x in by_scorer(logits)},
        "per_image": {name: per_image(x, labels) for name, x in by_scorer(logits)},
        **provenance("pillow"),
    }
    for key in CORRUPTED:
        if result[key]:
            result[f"{key}_means"] = {name: corruption_means(result[key], name) for name in clean}
    if other:
        result["against"] = {"file": str(args.against), "differences": differences(result, other)}
    print(tables(result))
    write_json(args.output, result)
    plots = write_plots(result, args.output)
    print(f"written to {', '.join(str(path) for path in [args.output, *plots])}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nt-hf evaluate images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="checkpoint directory, of a multi-head or a stock classifier"
    )
    parser.add_argument("--data", default="digits:validation", help="images to score; default: digits:validation")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--calibration", help="images to fit temperatures on, such as a validation split")
    parser.add_argument(
        "--held_out", type=float, default=0.0, metavar="SHARE",
        help="fit on what data.validation_share=SHARE of training held out of --calibration, not on all of it",
    )  # fmt: skip
    parser.add_argument("--split_seed", type=int, default=0, help="data.split_seed of training, with --held_out")
    parser.add_argument("--ood", help="images of another task, to be told from those of --data")
    parser.add_argument("--corruptions", help=f"'all', or of {','.join(CONSTANTS)}; default: none")
    parser.add_argument("--corrupted_images", type=int, help="corrupt the first so many images; default: all")
    parser.add_argument("--severities", default="1,2,3,4,5", help="default: 1,2,3,4,5")
    parser.add_argument("--cifar_c", type=Path, help="directory of the published arrays CIFAR-10-C or CIFAR-100-C")
    parser.add_argument("--against", type=Path, help="an earlier result, for a paired bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the corruptions")
    parser.add_argument("--batch_size", type=int, default=250, help="images a batch; corruptions draw batch by batch")
    parser.add_argument("--image_field", default="image", help="column of parquet files")
    parser.add_argument("--label_field", default="label", help="column of parquet files")
    parser.add_argument("--image_size", type=int, help="side that images are scaled to; default: as they are")
    parser.add_argument("--center_crop", type=float, default=1.0, help="share of the shorter side that is taken")
    parser.add_argument("--on_bad_image", default="error", help="'skip' leaves out images that cannot be read")
    return parser.parse_args(argv)


def class_names(config: PreTrainedConfig) -> list[str] | None:
    """The names of a checkpoint's classes; ``None`` where it has none but those that Transformers makes up."""
    names = [config.id2label[label] for label in sorted(config.id2label)]
    return None if names == [f"LABEL_{label}" for label in range(len(names))] else names


def open_images(
    source: str, scale: Normalisation, args: argparse.Namespace, held_out: float = 0.0,
    classes: Sequence[str] | None = None,
) -> Iterable[Batch]:  # fmt: skip
    """Batches of a source as the model takes them; every ``iter()`` begins anew.

    With a share ``held_out`` the source is of training images, and those that are held out of training are read.
    ``classes`` are the names of the model's: where the source has names, too, its labels are numbered by them.
    """
    from ..data.image_config import ImageConfig
    from ..data.image_sets import Classes, open_images, open_training_images
    from ..data.images import ImageBatches

    names = ("image_field", "label_field", "image_size", "center_crop", "on_bad_image")
    options = {name: getattr(args, name) for name in names}
    config = ImageConfig(
        train=source, validation_share=held_out, split_seed=args.split_seed,
        normalize=[list(scale.mean), list(scale.std)], **options,
    )  # fmt: skip
    known = classes and Classes(list(classes), f"--model {args.model}")
    images = open_training_images(config, known)[1] if held_out else open_images(source, config, classes=known)
    return ImageBatches(images, batch_size=args.batch_size, training=False)


def first(data: Iterable[Batch], images: int | None) -> Iterator[Batch]:
    """The first so many images; all without a number."""
    for batch in data:
        count = len(batch["labels"]) if images is None else min(images, len(batch["labels"]))
        if not count:
            return
        yield {key: value[:count] for key, value in batch.items()}
        images = images and images - count


def parse_corruptions(text: str | None) -> list[str]:
    names = list(CONSTANTS) if text == "all" else text.split(",") if text is not None else []
    for name in names:
        check("--corruptions", name, choice(CONSTANTS))
    return list(dict.fromkeys(names))


def parse_severities(text: str) -> list[int]:
    numbers = text.split(",")
    if not set(numbers) <= {str(severity) for severity in SEVERITIES} or len(set(numbers)) < len(numbers):
        raise ValueError(f"--severities {text}: accepted are different numbers of 1 to 5, joined by commas")
    return sorted(map(int, numbers))


def read_normalisation(model: Path) -> Normalisation:
    """The mean and standard deviation of ``preprocessor_config.json``, where Transformers keeps them."""
    path = model / "preprocessor_config.json"
    try:
        settings = strict_json(path.read_text(encoding="utf-8"))
        scale = Normalisation(settings["image_mean"], settings["image_std"])
        scale.pixel_values(torch.zeros(1, 3, 1, 1))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: {reason}; accepted is JSON with image_mean and image_std of 3 numbers") from error
    return scale


def predict_known(
    model: PreTrainedModel, data: Iterable[Batch], scale: Normalisation
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Logits and labels, see [`predict`], and a hash of the labels and of the images before they were normalised."""
    digest = hashlib.sha256()

    def hashing() -> Iterator[Batch]:
        for batch in data:
            digest.update(scale.images(batch["pixel_values"]).numpy().tobytes())
            yield batch

    logits, labels = predict(model, hashing())
    digest.update(labels.numpy().tobytes())  # not batch by batch: the hash must not depend on the size of batches
    return logits, labels, digest.hexdigest()[:16]


def corrupted(data: Iterable[Batch], scale: Normalisation, name: str, severity: int, seed: int) -> Iterator[Batch]:
    generator = generator_of(name, severity, seed)
    for batch in data:
        images = corrupt(scale.images(batch["pixel_values"]), name, severity, generator)
        yield {"pixel_values": scale.pixel_values(images), "labels": batch["labels"]}


def published_batches(
    args: argparse.Namespace, data: Iterable[Batch], scale: Normalisation, name: str, severity: int
) -> Iterator[Batch]:
    images, labels = read_published(args.cifar_c, name, severity)
    check_same_shape(f"{args.cifar_c / name}.npy", images, data)
    for part, truth in zip(images.split(args.batch_size), labels.split(args.batch_size)):
        yield {"pixel_values": scale.pixel_values(part), "labels": truth}


def unknown_images(
    model: PreTrainedModel, sources: Mapping[str, Iterable[Batch]], args: argparse.Namespace, logits: torch.Tensor,
    main_scorer: str,
) -> dict[str, Any]:  # fmt: skip
    """How well the images of --ood are told from those of --data, whose logits are given."""
    other = sources["ood"]
    check_same_shape(f"--ood {args.ood}", next(iter(other))["pixel_values"], sources["data"])
    # Their labels are no classes of the model.
    unlabelled = (dict(batch, labels=torch.zeros(len(batch["pixel_values"]), dtype=torch.long)) for batch in other)
    other_logits, _ = predict(model, unlabelled)
    areas = out_of_distribution(logits, other_logits, main_scorer)
    return {"data": args.ood, "images": other_logits.shape[1], "auroc": areas}


def check_same_shape(name: str, images: torch.Tensor, data: Iterable[Batch]) -> None:
    shape, expected = (list(values.shape[1:]) for values in (images, next(iter(data))["pixel_values"]))
    if shape != expected:
        raise ValueError(f"{name} has images {shape}; accepted is {expected}, as of --data; --image_size scales both")


def per_image(log_probs: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Of every image whether the best guess is right, as "0110…", and its NLL, in nats."""
    correct = (log_probs.argmax(-1) == labels).int().tolist()
    return {"correct": "".join(map(str, correct)), "nll": [round(x, 6) for x in losses_of(log_probs, labels).tolist()]}


def read_result(path: Path) -> Mapping[str, Any]:
    accepted = "accepted is a file of nt-hf evaluate images"
    try:
        result = strict_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--against {path}: {' '.join(str(error).split())}; {accepted}") from error
    if not isinstance(result, dict) or not {"fingerprint", "main_scorer", "per_image"} <= result.keys():
        raise ValueError(f"--against {path}: {accepted}")
    return result


def differences(result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy and NLL of this result's main scorer less the other's, with the bootstrap's intervals."""
    first, second = (x["per_image"][x["main_scorer"]] for x in (result, other))
    rows = {"accuracy": "correct", "NLL": "nll"}
    return {
        name: asdict(paired_bootstrap([([float(x) for x in first[key]], [float(x) for x in second[key]])]))
        for name, key in rows.items()
    }
