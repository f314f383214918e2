"""Suites: the same training recipe for several methods, seeds and learning rates, and what their results say.

A suite is a YAML file, see ``experiments/suites``; `experiments/run.py` runs it. Everything here is pure but for
reading files: which runs a suite asks for, with which configuration, what each of them costs, and which results exist.
"""

import copy
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from nt_hf.checks import Rule, check, check_fields, choice, integer, list_of, number, optional, setting
from nt_hf.config import SECTIONS, RunConfig, load_run_config, read_sections
from nt_hf.data.image_config import ImageConfig
from nt_hf.plan.flops import count_flops
from nt_hf.plan.images import count_images
from nt_hf.plan.parameters import count_parameters
from nt_hf.text import strict_json
from nt_hf.yaml_values import known_name, read_yaml, typed_value

Tree = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One way of training that a suite compares.

    Attributes:
        name: of its directory.
        label: its name in tables and plots.
        config: sections of the recipe's configuration, laid over the suite's.
        seeds: so many of the suite's seeds, the first ones; ``None``: all; 0: only its tuning runs are of interest.
        learning_rate_of: the arm above whose learning rate it takes; ``None``: it is tuned itself.
        change_of: the arm above that it differs from by one change, whose effect a table shows; ``None``: the one whose
            learning rate it takes.
        longer: train ``1 / density`` times as many steps (of the masked weights' density).
        times: train so many times as many steps.
    """

    name: str
    label: str
    config: Tree = field(default_factory=dict)
    seeds: int | None = None
    learning_rate_of: str | None = None
    change_of: str | None = None
    longer: bool = False
    times: float = 1.0

    @property
    def changed(self) -> str | None:
        return self.change_of or self.learning_rate_of

    @property
    def has_own_length(self) -> bool:
        """Whether it does not train as many steps as other arms."""
        return self.longer or self.times != 1


def _filled(rule: Rule, items: str) -> Rule:
    """A list of such values that has one at least."""
    values = list_of(rule, f"a list of {items}")
    return Rule(lambda value: values.valid(value) and len(value) > 0, values.accepted)


@dataclass(frozen=True)
class Tuning:
    """How each arm's learning rate is chosen: by the loss on the recipe's validation data at a share of the steps."""

    learning_rates: list[float] = setting(MISSING, _filled(number("(0, inf)"), "numbers above 0"))
    share: float = setting(0.25, number("(0, 1]"))
    seed: int = 1000

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Evaluation:
    """What every finished run is scored on.

    Attributes:
        texts: text sources by name; the first is the in-domain one, on which diversity and calibration are measured.
        max_tokens: of each text, as by ``nt-hf evaluate perplexity``; ``None``: all.
        batch_size: windows a batch.
        zero_shot: a directory of json lines for ``nt-hf evaluate zero-shot``; ``None``: no zero-shot tasks.
        zero_shot_limit: items of each task; ``None``: all.
        zero_shot_seeds: so many seeds of each arm are scored on the tasks.
    """

    texts: dict[str, str]
    max_tokens: int | None = None
    batch_size: int = 8
    zero_shot: str | None = None
    zero_shot_limit: int | None = None
    zero_shot_seeds: int = 1


@dataclass(frozen=True)
class ImageEvaluation:
    """What every finished run of image classifiers is scored on, by ``nt-hf evaluate images``.

    Attributes:
        images: source of the test images, by which nothing is chosen. Temperatures are fitted on the images that
            ``data.validation_share`` holds out of the training images.
        classes: their number, for the count of parameters and FLOPs, which reads no images.
        corruptions: by name.
        severities: of each corruption, 1 to 5.
        corrupted_images: the first so many of the test images are corrupted; ``None``: all.
        ood: source of images of another task; ``None``: nothing is told apart.
    """

    images: str
    classes: int
    corruptions: list[str] = field(default_factory=list)
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    corrupted_images: int | None = None
    ood: str | None = None


@dataclass(frozen=True)
class Preparation:
    """What is made once before the runs, in the suite's directory, which ``{runs}`` stands for.

    Attributes:
        text: sources of the training text; ``{runs}/tokens`` will hold its tokens. Empty: nothing is prepared.
        tokenizer: an existing tokenizer, or ``None`` to train one of ``vocab_size`` pieces on the text, as
            ``{runs}/tokenizer``.
    """

    text: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Suite:
    """A whole comparison.

    Attributes:
        name: the file's.
        config: the recipe's configuration that all arms share. In the file ``base`` may name a configuration file,
            relative to the suite, which it is laid over.
        preparation, tuning, evaluation: see there. Suites over images need no preparation.
        seeds: of initialisation, masks and the order of the data; arms are compared seed by seed.
        arms: by name. In the file also the name of another suite's file, relative to this one, whose arms these are, or
            a mapping that is laid over those of ``base``, such a name.
        baseline, rival: the arms that tables compare the others with.
    """

    name: str
    config: Tree
    preparation: Preparation
    tuning: Tuning
    seeds: list[int]
    evaluation: Evaluation | ImageEvaluation
    arms: dict[str, Arm]
    baseline: str
    rival: str

    @property
    def of_images(self) -> bool:
        return isinstance(self.evaluation, ImageEvaluation)

    @property
    def unit(self) -> str:
        """What the models learn from, in the plural."""
        return "images" if self.of_images else "tokens"


@dataclass(frozen=True)
class Paths:
    """Where the suite, the data, the runs with their checkpoints, and the results are."""

    suite: Path
    data_root: str
    runs: Path
    results: Path

    def fill(self, value: Any) -> Any:
        return fill(value, data_root=self.data_root, runs=str(self.runs))


@dataclass(frozen=True)
class Run:
    """One run of a suite: a learning rate that is tried, or (``learning_rate`` from the tuning) an arm and a seed."""

    arm: Arm
    seed: int
    learning_rate: float
    tuning: bool

    @property
    def name(self) -> str:
        last = f"lr-{self.learning_rate:g}" if self.tuning else f"seed-{self.seed}"
        return f"{'tuning' if self.tuning else 'runs'}/{self.arm.name}/{last}"


def load_suite(path: str | Path) -> Suite:
    """Reads a suite, its name is the file's, and checks the configuration of every arm.

    Raises:
        ValueError: a key is unknown or lacks, a value is not accepted; the message names it.
        OSError: the file cannot be read.
    """
    path = Path(path)
    content, _ = read_yaml(path)
    names = {field.name for field in fields(Suite)} - {"name"}
    content.setdefault("preparation", {})
    if content.keys() - {"base"} != names:
        raise ValueError(f"{path}: has {sorted(content)}; accepted are the keys {', '.join(sorted(names))}, and base")
    base = content.pop("base", None)
    content["config"] = read_sections([*([path.parent / base] if base else []), content["config"] or {}])
    content["arms"] = _arms(path, content["arms"])
    check(f"{path}: seeds", content["seeds"], _filled(integer(), "whole numbers"))
    evaluation = ImageEvaluation if _is_of_images(path, content["config"]) else Evaluation
    sections = {
        name: _build(kind, content[name], f"{path}: {name}")
        for name, kind in (("preparation", Preparation), ("tuning", Tuning), ("evaluation", evaluation))
    }
    arms = {
        name: _build(Arm, {"name": name, **(arm or {})}, f"{path}: arms.{name}")
        for name, arm in content["arms"].items()
    }
    suite = Suite(**content | sections | {"name": path.stem, "arms": arms})
    for key in ("baseline", "rival"):
        check(f"{path}: {key}", getattr(suite, key), choice(arms))
    for index, arm in enumerate(arms.values()):
        where, above = f"{path}: arms.{arm.name}", list(arms)[:index]
        rule = Rule(lambda name, above=above: name in above, f"an arm above it ({', '.join(above) or 'there is none'})")
        check(f"{where}.learning_rate_of", arm.learning_rate_of, optional(rule))
        check(f"{where}.change_of", arm.change_of, optional(rule))
        check(f"{where}.seeds", arm.seeds, optional(integer(0, len(suite.seeds))))
        check(f"{where}.times", arm.times, number("(0, inf)"))
        try:
            run_config(suite, Run(arm, 0, 1e-3, tuning=False))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return suite


def _arms(path: Path, arms: Any) -> dict[str, Any]:
    """A suite's arms, laid over those of another suite's file, which ``arms`` or ``arms.base`` names."""
    if isinstance(arms, str):
        arms = {"base": arms}
    if not isinstance(arms, dict) or not arms or not isinstance(arms.get("base", ""), str):
        raise ValueError(f"{path}: arms={arms!r}: accepted is a mapping of names to arms, or a suite's file")
    if "base" not in arms:
        return arms
    base = path.parent / arms["base"]
    return _arms(base, read_yaml(base)[0].get("arms")) | {name: arms[name] for name in arms if name != "base"}


def _is_of_images(path: Path, sections: Tree) -> bool:
    """Whether a suite's models classify images, whose number and size must then be known."""
    try:
        config = load_run_config([sections])
    except ValueError as error:
        raise ValueError(f"{path}: config: {error}") from error
    if not isinstance(config.data, ImageConfig):
        return False
    for key, accepted in (("image_size", "the side of the images"), ("validation_share", "a share above 0")):
        if not getattr(config.data, key):
            raise ValueError(f"{path}: config.data.{key}={getattr(config.data, key)}: accepted is {accepted}")
    return True


def _build(kind: type, values: Any, where: str) -> Any:
    """A dataclass of the values of a section."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}={values!r}: accepted is a mapping of keys to values")
    hints = get_type_hints(kind)
    for key in values:
        known_name(key, hints, f"{where}.")
    if lacking := [f.name for f in fields(kind) if f.default is f.default_factory is MISSING and f.name not in values]:
        raise ValueError(f"{where}: lacks {', '.join(lacking)}")
    try:
        return kind(**{key: typed_value(value, hints[key], key) for key, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def run_tree(suite: Suite, run: Run) -> Tree:
    """The recipe's configuration of a run, as sections of a YAML file; paths are still ``{data_root}`` and ``{runs}``.

    All arms see the same data in the same order, which follow from the seed and the batch size, unless an arm asks
    for an order of each head's own.

    Raises:
        ValueError: an arm sets a section that the recipe does not know, or a key that the suite sets by itself.
    """
    tree = {section: dict(suite.config.get(section, {})) for section in SECTIONS}
    fixed = {"train": {"seed", "learning_rate"}, "data": SAME_DATA}
    for section, values in run.arm.config.items():
        if section not in SECTIONS:
            raise ValueError(f"section {section}: accepted are {', '.join(SECTIONS)}")
        if taken := fixed.get(section, set()) & values.keys():
            raise ValueError(f"{section}.{min(taken)}: it is the same for all arms, or tuned")
        tree[section] |= copy.deepcopy(values)
    train = tree["train"]
    steps = train["max_steps"] * run.arm.times
    if run.arm.longer:
        steps *= 1 / tree["sparsity"].get("density", 1.0)
    steps = round(steps * suite.tuning.share) if run.tuning else math.ceil(steps)
    train |= {"seed": run.seed, "learning_rate": run.learning_rate, "max_steps": steps}
    if run.tuning:
        train |= {"eval_steps": steps, "save_steps": steps}
    return tree


# What an arm must not change: it would see other data.
SAME_DATA = {
    "train", "validation", "tokenizer", "sequence_length", "packing", "shuffle_block", "text_field",
    "validation_share", "split_seed", "image_field", "label_field", "image_size", "center_crop", "normalize", "flip",
    "crop_padding", "random_resized_crop", "mixup", "label_smoothing",
}  # fmt: skip


def fill(value: Any, **paths: str) -> Any:
    """``value`` with ``{data_root}`` and the like replaced in every text in it."""
    if isinstance(value, str):
        for name, path in paths.items():
            value = value.replace("{" + name + "}", path)
        return value
    if isinstance(value, Mapping):
        return {key: fill(item, **paths) for key, item in value.items()}
    return [fill(item, **paths) for item in value] if isinstance(value, list | tuple) else value


def run_config(suite: Suite, run: Run) -> RunConfig:
    """The same, checked.

    Raises:
        ValueError: a key is unknown or a value not accepted.
    """
    return load_run_config([run_tree(suite, run)])


# --------------------------------------------------------------------------------------------------------- runs


def tuning_runs(suite: Suite) -> list[Run]:
    """Every learning rate of the grid for every arm that is tuned by itself."""
    arms = [arm for arm in suite.arms.values() if not arm.learning_rate_of]
    return [Run(arm, suite.tuning.seed, rate, True) for arm in arms for rate in suite.tuning.learning_rates]


def main_runs(suite: Suite, learning_rates: Mapping[str, float]) -> list[Run]:
    """The runs of the arms whose rate is known, the first seed of all arms before the second of any."""
    rates = dict(learning_rates)
    for arm in suite.arms.values():
        if arm.learning_rate_of in rates:
            rates[arm.name] = rates[arm.learning_rate_of]
    return [
        Run(arm, seed, rates[arm.name], False)
        for number, seed in enumerate(suite.seeds)
        for arm in suite.arms.values()
        if (arm.seeds is None or number < arm.seeds) and arm.name in rates
    ]


def matching(runs: Iterable[Run], globs: Sequence[str]) -> list[Run]:
    """Those whose name (``runs/single/seed-0``) any of the globs fits; all without globs."""
    return [run for run in runs if not globs or any(fnmatch.fnmatchcase(run.name, glob) for glob in globs)]


@dataclass(frozen=True)
class Budget:
    """What a run costs.

    Attributes:
        steps: of training.
        units: tokens or images of training, see ``Suite.unit``.
        flops: of training as executed, zeros multiplied like any weight.
        sparse_flops: the same with active weights alone, as hardware that skips zeros would need, see ``plan.Flops``.
        stored, active: parameters with and without the masked-out ones.
    """

    steps: int
    units: int
    flops: float
    sparse_flops: float
    stored: int
    active: int


def budget(suite: Suite, run: Run) -> Budget:
    """What a run costs, from its configuration alone."""
    config = run_config(suite, run)
    units = config.train.max_steps * config.train.batch_size
    if suite.of_images:
        labels = dict(enumerate(map(str, range(suite.evaluation.classes))))
        model = config.model_config(image_size=config.data.image_size, id2label=labels)
        costs = count_images(model, config.sparsity, config.data.order_per_head)
        weights = costs.weights
    else:
        model = config.model_config()
        parameters = count_parameters(model, config.sparsity)
        units *= config.data.sequence_length
        costs, weights = count_flops(config, model, parameters), parameters.all
    return Budget(
        steps=config.train.max_steps,
        units=units,
        flops=costs.training * units,
        sparse_flops=costs.sparse_training * units,
        stored=weights.total,
        active=weights.active,
    )


# ------------------------------------------------------------------------------------------------------ results

RESULT_FILE, METRICS_FILE = "result.json", "metrics.jsonl"


def read_result(results: Path, suite: Suite, run: Run) -> dict[str, Any] | None:
    """A finished run's result, ``None`` if it has none.

    Raises:
        ValueError: the file is damaged, or of another configuration.
    """
    path = results / run.name / RESULT_FILE
    if not path.is_file():
        return None
    try:
        result = strict_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    asked = run_tree(suite, run)
    if asked["train"].get("precision", "auto") == "auto":  # any that it became on the machine of the run
        asked["train"]["precision"] = result["config"]["train"].get("precision")
    if result["config"] != asked:
        raise ValueError(
            f"{path}: is of another configuration than the suite asks for; delete {path.parent} or take other --results"
        )
    return result


def tuned(results: Path, suite: Suite) -> dict[str, float]:
    """The best learning rate of each arm whose whole grid was tried."""
    losses: dict[str, dict[float, float]] = {}
    for run in tuning_runs(suite):
        if result := read_result(results, suite, run):
            losses.setdefault(run.arm.name, {})[run.learning_rate] = result["validation"]["loss"]
    grid_size = len(suite.tuning.learning_rates)
    return {arm: min(rates, key=rates.get) for arm, rates in losses.items() if len(rates) == grid_size}


def result_record(suite: Suite, run: Run, precision: str, **scores: Any) -> dict[str, Any]:
    """What is kept of a finished run; its configuration has the ``precision`` that "auto" became."""
    config = run_tree(suite, run)
    config["train"]["precision"] = precision
    return {
        "suite": suite.name,
        "arm": run.arm.name,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "budget": {suite.unit if key == "units" else key: value for key, value in asdict(budget(suite, run)).items()},
        "config": config,
        **scores,
    }
