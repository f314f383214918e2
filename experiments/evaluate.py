"""What a trained run of a suite is scored on: texts and zero-shot tasks, or test images."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from nt_hf.config import load_run_config
from nt_hf.data.image_sets import open_images, open_training_images
from nt_hf.data.sources import read_texts
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.evaluation.diversity import measure_diversity
from nt_hf.evaluation.perplexity import DocumentWindows, evaluate, load_for_evaluation

from experiments.suite import Paths, Run, Suite

logger = logging.getLogger("nt_hf.experiments")


def check_evaluation(suite: Suite, paths: Paths) -> None:
    """Looks for what the runs will be scored on before any is trained.

    Raises:
        ValueError: something is not there, or is not as the suite says.
    """
    (_check_images if suite.of_images else _check_texts)(suite, paths)


def evaluate_checkpoint(suite: Suite, paths: Paths, run: Run, checkpoint: Path) -> dict[str, Any]:
    """The scores of a trained run."""
    if suite.of_images:
        return score_images(suite, paths, checkpoint)
    scores = score_texts(suite, paths, checkpoint)
    if suite.evaluation.zero_shot and run.seed in suite.seeds[: suite.evaluation.zero_shot_seeds]:
        if importlib.util.find_spec("lm_eval") is None:
            logger.warning("no zero-shot scores: lm_eval is not installed")
        else:
            scores["zero_shot"] = zero_shot(suite, paths, checkpoint)
    return scores


# --------------------------------------------------------------------------------------------------------- texts


def _check_texts(suite: Suite, paths: Paths) -> None:
    for name, source in paths.fill(suite.evaluation.texts).items():
        try:
            read_texts([source])
        except ValueError as error:
            raise ValueError(f"evaluation.texts.{name}: {error}") from error
    if suite.evaluation.zero_shot and not Path(folder := paths.fill(suite.evaluation.zero_shot)).is_dir():
        raise ValueError(f"evaluation.zero_shot={folder}: accepted is a directory of json lines")


def score_texts(suite: Suite, paths: Paths, checkpoint: Path) -> dict[str, Any]:
    """Perplexity on every text, diversity and calibration on the first."""
    evaluation = suite.evaluation
    windows_options = {"batch_size": evaluation.batch_size, "max_tokens": evaluation.max_tokens}
    model = load_for_evaluation(checkpoint)
    tokenizer = load_tokenizer(str(checkpoint))
    length = model.config.max_position_embeddings
    result: dict[str, Any] = {"texts": {}}
    for name, source in paths.fill(evaluation.texts).items():
        windows = DocumentWindows(read_texts([source]), tokenizer, length=length, **windows_options)
        try:
            scores = evaluate(model, windows)
            scores.bytes = windows.bytes
            result["texts"][name] = scores.to_dict() | {"documents": windows.documents}
            if "diversity" not in result:
                result["diversity"] = measure_diversity(model, windows).to_dict()
        except FloatingPointError as error:
            raise FloatingPointError(f"{checkpoint}, text {name}: {error}") from error
    return result


def zero_shot(suite: Suite, paths: Paths, checkpoint: Path) -> dict[str, Any]:
    """The scores of ``nt-hf evaluate zero-shot``, without those of single items."""
    from nt_hf.cli.zero_shot import main

    output, limit = checkpoint.parent / "zero_shot.json", suite.evaluation.zero_shot_limit
    data = ["--data_root", paths.fill(suite.evaluation.zero_shot), *(["--limit", str(limit)] if limit else [])]
    main(["--model", str(checkpoint), "--output", str(output), *data])
    report = json.loads(output.read_text())
    return {"limit": limit, "results": report["results"], "average": report["average"]}


# -------------------------------------------------------------------------------------------------------- images


def _check_images(suite: Suite, paths: Paths) -> None:
    evaluation, data = suite.evaluation, load_run_config([paths.fill(suite.config)]).data
    train, _ = open_training_images(data)
    if len(train.classes) != evaluation.classes:
        number = len(train.classes)
        raise ValueError(f"evaluation.classes={evaluation.classes}: accepted is {number}, those of data.train")
    for key in ("images", "ood"):
        if source := paths.fill(getattr(evaluation, key)):
            try:
                open_images(source, data)
            except ValueError as error:
                raise ValueError(f"evaluation.{key}: {error}") from error


def score_images(suite: Suite, paths: Paths, checkpoint: Path) -> dict[str, Any]:
    """The figures of ``nt-hf evaluate images``, without those of single images and single bins."""
    from nt_hf.cli.images import main

    evaluation, data = suite.evaluation, load_run_config([paths.fill(suite.config)]).data
    output = checkpoint.parent / "images.json"
    options = {
        "model": checkpoint,
        "output": output,
        "data": paths.fill(evaluation.images),
        "calibration": data.train,
        "held_out": data.validation_share,
        "split_seed": data.split_seed,
        "corruptions": ",".join(evaluation.corruptions) or None,
        "severities": ",".join(map(str, evaluation.severities)),
        "corrupted_images": evaluation.corrupted_images,
        "ood": paths.fill(evaluation.ood),
        "image_field": data.image_field,
        "label_field": data.label_field,
        "image_size": data.image_size,
        "center_crop": data.center_crop,
    }
    main([text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))])
    report = json.loads(output.read_text())
    kept = (
        "images", "main_scorer", "ensemble_mode", "scores", "gains", "disagreement", "mask_overlap", "density", "ood",
        "corruptions", "corruptions_means",
    )  # fmt: skip
    return {key: report[key] for key in kept if key in report}
