"""The configuration of a training run: YAML files plus dotted overrides, every key and value checked."""

import copy
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .data.streams import DataConfig
from .models.configuration_neurotrails_llama import NeuroTrailsLlamaConfig
from .sparsity.config import SparsityConfig

OPTIMIZERS = ("adam", "adamw")
PRECISIONS = ("auto", "fp32", "bf16")
MATMUL_PRECISIONS = ("highest", "high", "medium")
LR_SCHEDULES = ("cosine", "warmup_stable_decay")
SAVE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class TrainConfig:
    """Optimisation, evaluation and checkpoints.

    Attributes:
        max_steps: optimizer steps of the whole run.
        batch_size: sequences of one optimizer step, over all processes and accumulated passes.
        micro_batch_size: sequences of one forward pass of one process. ``None``: ``batch_size / processes``.
        learning_rate: peak rate; warmed up linearly over the share ``warmup_ratio`` of the run.
        lr_schedule: what follows: ``"cosine"``, down to ``min_lr_ratio`` of the peak at ``max_steps``, or
            ``"warmup_stable_decay"``, the peak until the last share ``decay_ratio`` of the run and the cosine there. A
            run of the latter keeps its rate when it is extended before the decay.
        learning_rate_factors: of the rate, by glob of parameter names, such as ``{"*.layers.*": 0.3}`` for all blocks
            or ``{"model.layers.*": 0.5}`` for the backbone's; the last fitting glob decides.
        optimizer: ``"adam"`` (the paper's) or ``"adamw"``, with ``betas``, ``eps``; ``weight_decay`` is decoupled,
            spares norms, and needs ``"adamw"``.
        max_grad_norm: clip the gradient of the active weights to this norm; ``None`` does not clip.
        precision: ``"bf16"`` is autocast over fp32 weights; ``"auto"`` takes it on a GPU that has it, else fp32.
        matmul_precision: of products of fp32 matrices, for ``torch.set_float32_matmul_precision``: "highest", or "high"
            or "medium", which may round their inputs and are faster on some GPUs and CPUs.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: compile the decoder blocks by ``torch.compile``; needs a C++ compiler on a CPU, where it gains nothing.
        peak_tflops: the hardware's dense matrix peak for one process, to report MFU; ``None``: looked up by the
            device's name, no MFU when unknown.
        log_steps, eval_steps, save_steps: steps between log lines, evaluations, checkpoints.
        check_interval: topology updates between two checks that all processes of DDP hold the same weights, masks and
            optimizer state.
        keep: checkpoints to keep, the newest; older ones are deleted once a newer one is verified.
        save_dtype: type of the weights in ``model.safetensors``. Training always resumes from fp32.
        seed: of initialisation, masks and data order.
    """

    max_steps: int = 10_000
    batch_size: int = 512
    micro_batch_size: int | None = None
    learning_rate: float = 1e-3
    lr_schedule: str = "cosine"
    decay_ratio: float = 0.1
    min_lr_ratio: float = 0.1
    warmup_ratio: float = 0.1
    learning_rate_factors: dict[str, float] = dataclasses.field(default_factory=dict)
    optimizer: str = "adam"
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    precision: str = "auto"
    matmul_precision: str = "highest"
    gradient_checkpointing: bool = False
    compile: bool = False
    peak_tflops: float | None = None
    log_steps: int = 10
    eval_steps: int = 1_000
    save_steps: int = 1_000
    check_interval: int = 10
    keep: int = 2
    save_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "log_steps", "eval_steps", "save_steps", "check_interval", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.micro_batch_size is None or self.micro_batch_size >= 1, "micro_batch_size",
                 self.micro_batch_size, "1 or more, or null")  # fmt: skip
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        _require(all(isinstance(x, int | float) and x >= 0 for x in self.learning_rate_factors.values()),
                 "learning_rate_factors", self.learning_rate_factors, "numbers from 0, by glob")  # fmt: skip
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "0 to 1")
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "a share of the run in [0, 1)")
        most = 1 - self.warmup_ratio if self.lr_schedule == "warmup_stable_decay" else 1
        _require(0 < self.decay_ratio <= most, "decay_ratio", self.decay_ratio,
                 f"a share of the run above 0, up to what the warm-up leaves ({most:g})")  # fmt: skip
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        _require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm,
                 "a number above 0, or null for no clipping")  # fmt: skip
        _require(len(self.betas) == 2 and all(isinstance(b, int | float) and 0 <= b < 1 for b in self.betas), "betas",
                 self.betas, "two numbers in [0, 1)")  # fmt: skip
        _require(self.eps > 0, "eps", self.eps, "a number above 0")
        choices = {
            "optimizer": OPTIMIZERS, "lr_schedule": LR_SCHEDULES, "precision": PRECISIONS,
            "matmul_precision": MATMUL_PRECISIONS, "save_dtype": SAVE_DTYPES,
        }  # fmt: skip
        for name, accepted in choices.items():
            _require(getattr(self, name) in accepted, name, getattr(self, name), ", ".join(accepted))
        _require(self.weight_decay == 0 or (self.optimizer == "adamw" and self.weight_decay > 0), "weight_decay",
                 self.weight_decay, "0, or a positive number with optimizer=adamw")  # fmt: skip


@dataclasses.dataclass
class RunConfig:
    """One training run. ``model`` holds arguments of ``NeuroTrailsLlamaConfig``."""

    model: dict[str, Any]
    data: DataConfig
    sparsity: SparsityConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, as a YAML file would hold them."""
        return dataclasses.asdict(self)


SECTIONS = {"model": NeuroTrailsLlamaConfig, "data": DataConfig, "sparsity": SparsityConfig, "train": TrainConfig}
# Set by the recipe from other keys, so that they cannot contradict them.
DERIVED_MODEL_KEYS = {"masked_modules", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}


def load_run_config(
    sources: Sequence[str | Path | Mapping[str, Any]], overrides: Mapping[str, str] | None = None
) -> RunConfig:
    """Reads YAML files, each overriding the ones before, then dotted ``overrides`` (``{"max_steps": "40"}``).

    What a file would hold may also be given itself, as a mapping of sections.

    Raises:
        ValueError: an unknown section or key (the nearest valid name is given), a value of the wrong type or
            outside its range.
        OSError: a file cannot be read.
    """
    tree: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    texts: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}  # of the same scalars, as they were written
    for source in sources:
        given = isinstance(source, Mapping)
        where = "" if given else f"{source}: "
        content, written = (source, {}) if given else _read(source)
        for section, values in content.items():
            _known(section, SECTIONS, f"{where}section ")
            if not isinstance(values, dict):
                raise ValueError(f"{where}section {section}={values!r}: accepted is a mapping of keys to values")
            for key, value in values.items():
                tree[section][_known(key, _fields(section), f"{where}{section}.")] = value
                texts[section][key] = written.get(section, {}).get(key)
    for dotted, text in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            raise ValueError(f"--{dotted}: accepted are keys of the form --section.key, sections {', '.join(SECTIONS)}")
        _known(section, SECTIONS, "--")
        _known(key, _fields(section), f"--{section}.")
        try:
            tree[section][key], texts[section][key] = _parse(text)
        except _DuplicateKeyError as error:
            raise ValueError(f"--{dotted}: {error}") from error
    typed = {
        section: {
            key: _typed(value, _fields(section)[key], f"{section}.{key}", texts[section].get(key))
            for key, value in tree[section].items()
        }
        for section in SECTIONS
    }
    # One seed for the whole run, unless the masks are to have another.
    typed["sparsity"].setdefault("seed", typed["train"].get("seed", TrainConfig.seed))
    built = {}
    for section, cls in SECTIONS.items():
        try:
            built[section] = typed[section] if section == "model" else cls(**typed[section])
        except ValueError as error:
            raise ValueError(f"{section}.{error}") from error
    if built["model"].get("rope_parameters"):
        _check_rope(built["model"])
    return RunConfig(**built)


def _check_rope(model: Mapping[str, Any]) -> None:
    """Checks what Transformers looks up without a check, when the model is built."""
    rope = model["rope_parameters"]
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", 1.0)
    kinds = ["default", *(each for each in ROPE_INIT_FUNCTIONS if each != "default")]
    _require(kind in kinds, "model.rope_parameters.rope_type", kind, ", ".join(kinds))
    _require(base > 0, "model.rope_parameters.rope_theta", base, "a number above 0")
    if kind != "default":
        try:
            # Of a copy, which the configuration completes.
            ROPE_INIT_FUNCTIONS[kind](NeuroTrailsLlamaConfig(**copy.deepcopy(model)), None)
        except KeyError as error:
            raise ValueError(f"model.rope_parameters={rope}: lacks {error.args[0]}, expected with {kind}") from error


# What a run cannot change on its way, and what it may change freely because the trained weights do not depend on it.
FIXED = {
    "data": {"sequence_length", "text_field", "order_per_head"},
    "sparsity": {
        "density", "density_start", "distribution", "densities", "exclude", "structure", "initial_masks", "seed",
    },
    "train": {"optimizer", "seed"},
}  # fmt: skip
FREE = {
    # The tokenizer is compared by its content, once it is loaded.
    "data": {"validation", "validation_tokens", "tokenizer"},
    "train": {
        "micro_batch_size", "gradient_checkpointing", "compile", "peak_tflops", "log_steps", "eval_steps", "save_steps",
        "keep", "save_dtype", "check_interval",
    },
}  # fmt: skip


def changed_keys(wanted: RunConfig, found: RunConfig, path: Path) -> str:
    """What differs between a run's configuration and that of ``path``, which it is to continue; empty if nothing does.

    Raises:
        ValueError: keys differ that a run must keep.
    """
    ours, theirs = wanted.to_dict(), found.to_dict()
    changed = [
        (section, key, ours[section].get(key), theirs[section].get(key))
        for section in ours
        for key in sorted(ours[section].keys() | theirs[section].keys())
        if ours[section].get(key) != theirs[section].get(key) and key not in FREE.get(section, ())
    ]
    fixed = [change for change in changed if change[0] == "model" or change[1] in FIXED[change[0]]]
    listed = ", ".join(f"{section}.{key}={new!r} (was {old!r})" for section, key, new, old in fixed or changed)
    if fixed:
        raise ValueError(f"{listed}: {path} cannot continue so; set it as it was, or take another --output_dir")
    return listed


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """The dotted overrides ``--section.key value`` (or ``=value``) of a command line, for `load_run_config`.

    Raises:
        ValueError: an argument is no dotted key, or a key has no value.
    """
    overrides, rest = {}, list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or "." not in name:
            raise ValueError(f"unknown argument {name}: configuration keys are --section.key value")
        if not equals:
            # A value may begin with one dash, as negative numbers do; with two it is the next key.
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{name} needs a value, {name} true for example where it is a switch")
            value = rest.pop(0)
        overrides[name.removeprefix("--")] = value
    return overrides


class _DuplicateKeyError(ValueError):
    """A key that a YAML mapping has twice."""


class _OnceLoader(yaml.composer.Composer):
    """Refuses keys that are given twice: YAML would drop the first of them without a word."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise _DuplicateKeyError(
                        f"line {line}: the key {key.value} is given twice, first in line {lines[key.value]}"
                    )
                lines[key.value] = line
        return node


class _Loader(_OnceLoader, yaml.SafeLoader):
    """YAML 1.1 reads 2:4 as 124, a number to the base 60: nobody means that, and here it is a sparsity structure."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not pattern.match("2:4")]
    + [(tag, re.compile(r"[-+]?\d[\d_]*$")) for tag, pattern in resolvers if tag.endswith(":int")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _load(text: str) -> tuple[Any, Any]:
    """What a YAML text holds, and the same with all scalars as they were written."""
    return yaml.load(text, _Loader), yaml.load(text, yaml.BaseLoader)


def _parse(text: str) -> tuple[Any, Any]:
    """A value of the command line: YAML where it is, else plain text (``*.jsonl`` would be an alias)."""
    try:
        return _load(text)
    except yaml.YAMLError:
        return text, text


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        content, written = _load(Path(path).read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.object[error.start]:#x} at {error.start})") from error
    except _DuplicateKeyError as error:
        raise ValueError(f"{path}, {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path}: accepted is a mapping")
    return content or {}, written or {}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ValueError: it is not YAML in UTF-8, or no mapping, or has a key twice.
        OSError: it cannot be read.
    """
    return _read(path)[0]


def _fields(section: str) -> dict[str, Any]:
    cls = SECTIONS[section]
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if section == "model":
        # Of Transformers' many general fields, a pretraining run has a use for Llama's own.
        llama = {name for parent in cls.__mro__[:2] for name in vars(parent).get("__annotations__", {})}
        return {name: fields[name] for name in sorted(llama & fields.keys() - DERIVED_MODEL_KEYS)}
    return fields


def _known(name: str, accepted: typing.Iterable[str], where: str) -> str:
    accepted = list(accepted)
    if name not in accepted:
        near = difflib.get_close_matches(str(name), accepted, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"accepted are {', '.join(accepted)}"
        raise ValueError(f"unknown key {where}{name}: {hint}")
    return name


_NO_SUCH = object()


def _typed(value: Any, hint: Any, name: str, text: Any = None) -> Any:
    """``value`` checked against a field's type, with all that it contains.

    YAML reads ``1e-3`` as text, so text that is a number counts as one; and ``no`` as false, so where text is wanted a
    scalar counts as it was written.

    Args:
        value: as YAML reads it.
        hint: the type.
        name: for the message.
        text: the same with every scalar as it was written, if that is known.

    Raises:
        ValueError: it is of another type.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if (typed := _as(value, option, name, text)) is not _NO_SUCH:
            return typed
    if str in options and value is not None and isinstance(text, str):
        return text
    said = {type(None): "null", float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}
    names = " or ".join(said.get(o) or getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{name}={value!r}: accepted is {names}")


def _as(value: Any, hint: Any, name: str, text: Any) -> Any:
    """``value`` as one type that is no union, or ``_NO_SUCH``."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (Any, object):
        return value
    if kind in (int, float):
        return _number(value, kind)
    if kind is list and isinstance(value, list):
        texts = text if isinstance(text, list) and len(text) == len(value) else [None] * len(value)
        return [_typed(item, *inner or (Any,), f"{name}[{i}]", texts[i]) for i, item in enumerate(value)]
    if (kind is dict or typing.is_typeddict(kind)) and isinstance(value, dict):
        of_value, texts = (inner or (Any, Any))[1], text if isinstance(text, dict) else {}
        hints = dict.fromkeys(value, of_value)
        if typing.is_typeddict(kind):
            hints = typing.get_type_hints(kind)
        for key in value:
            _known(key, hints, f"{name}.")
        return {key: _typed(item, hints[key], f"{name}.{key}", texts.get(key)) for key, item in value.items()}
    return value if isinstance(kind, type) and not typing.is_typeddict(kind) and isinstance(value, kind) else _NO_SUCH


def _number(value: Any, kind: type) -> Any:
    """A finite number, also where it is written as ``1e-3`` or, a whole one, as ``1e4``; or ``_NO_SUCH``."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _NO_SUCH
    if kind is int and isinstance(value, int):
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _NO_SUCH
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        return _NO_SUCH
    return kind(number)


def _require(condition: bool, name: str, value: Any, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: accepted is {accepted}")
