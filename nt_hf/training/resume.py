"""Where a run continues from, and whether its configuration lets it."""

from pathlib import Path
from typing import NoReturn

from ..config import RunConfig, read_sections
from .manifest import MANIFEST, find_checkpoints

# Keys of a run that cannot change once it has begun. Those of the model cannot either.
FIXED = {
    "data": {
        "sequence_length", "text_field", "order_per_head", "image_field", "label_field", "image_size", "normalize",
        "validation_share", "split_seed",
    },
    "sparsity": {
        "density", "density_start", "distribution", "densities", "exclude", "structure", "initial_masks", "seed",
        "second_moments", "first_weights",
    },
    "train": {"optimizer", "seed"},
}  # fmt: skip
# Keys that may change freely, because the trained weights do not depend on them.
FREE = {
    # The tokenizer is compared by its content, once it is loaded.
    "data": {"validation", "validation_tokens", "tokenizer"},
    "train": {
        "micro_batch_size", "gradient_checkpointing", "compile", "peak_tflops", "log_steps", "eval_steps", "save_steps",
        "keep", "save_dtype", "check_interval",
    },
}  # fmt: skip


def find_resume(resume: str, run_dir: Path) -> list[Path]:
    """The checkpoints to continue from, the best first; none for a new run.

    Args:
        resume: ``"auto"`` for those of ``run_dir``, the newest first; ``"never"`` for none; or a path for that one.
        run_dir: the run's directory.

    Raises:
        ValueError: ``"never"`` for a directory that holds a run; a path that is no checkpoint of a run; or a path while
            ``run_dir`` has a newer checkpoint, from which the next ``"auto"`` would continue.
    """
    checkpoints = find_checkpoints(run_dir)[::-1]
    if resume == "auto":
        return checkpoints
    if resume == "never":
        if checkpoints:
            raise ValueError(
                f"--resume never: {run_dir} holds a run ({checkpoints[0].name}); take another --output_dir"
            )
        return []
    path = Path(resume)
    if not (path / MANIFEST).is_file() or not (path / "run.yaml").is_file():
        raise ValueError(f"--resume {resume}: accepted is auto, never, or a checkpoint-<step> directory of a run")
    if checkpoints and checkpoints[0].resolve() != path.resolve():
        raise ValueError(
            f"--resume {resume}: {run_dir} holds a later checkpoint, {checkpoints[0].name}; take another --output_dir "
            "or move the later ones away"
        )
    return [path]


def recorded_precision(resume: str, run_dir: Path) -> str | None:
    """``train.precision`` of the run that [`find_resume`] would continue, by its run.yaml; ``None`` for a new run."""
    if resume == "never":
        return None
    folders = [run_dir, *find_checkpoints(run_dir)[::-1]] if resume == "auto" else [Path(resume)]
    for folder in folders:
        try:
            return read_sections([folder / "run.yaml"]).get("train", {}).get("precision", "auto")
        except (ValueError, OSError):  # none there, or damaged: another may be intact
            continue
    return None


def changed_keys(config: RunConfig, previous: RunConfig, path: Path) -> str:
    """What differs between a run's configuration and the ``previous`` one, read from ``path``; empty if nothing does.

    Raises:
        ValueError: keys differ that a run must keep.
    """
    new, old = config.to_dict(), previous.to_dict()
    changes = [
        (section, key, new[section].get(key), old[section].get(key))
        for section in new
        for key in sorted(new[section].keys() | old[section].keys())
        if new[section].get(key) != old[section].get(key) and key not in FREE.get(section, ())
    ]
    forbidden = [change for change in changes if change[0] == "model" or change[1] in FIXED[change[0]]]
    listed = ", ".join(f"{section}.{key}={value!r} (was {old!r})" for section, key, value, old in forbidden or changes)
    if forbidden:
        raise ValueError(f"{listed}: {path} cannot continue so; set it as it was, or take another --output_dir")
    return listed


def refuse_changes(changes: str, path: Path, problem: str | None) -> NoReturn:
    """Refuses to continue a run whose configuration, read from ``path``, changed.

    Args:
        changes: of [`changed_keys`].
        path: of the configuration that the run had before.
        problem: why it cannot continue with the changes, if it cannot.

    Raises:
        ValueError: always; the message recommends what helps.
    """
    advice = "was written otherwise; --resume_override continues all the same"
    if problem:
        advice = f"cannot continue so ({problem}); set it as it was"
    raise ValueError(f"{changes}: {path} {advice}, or take another --output_dir")
