"""The configuration of a training run: YAML files plus dotted overrides, every key and value checked."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .configuration_neurotrails_llama import NeuroTrailsLlamaConfig
from .data import DataConfig
from .sparsifier import SparsityConfig

OPTIMIZERS = ("adam", "adamw")
PRECISIONS = ("auto", "fp32", "bf16")
MATMUL_PRECISIONS = ("highest", "high", "medium")
SAVE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class TrainConfig:
    """Optimisation, evaluation and checkpoints.

    Attributes:
        max_steps: optimizer steps of the whole run.
        batch_size: sequences of one optimizer step, over all processes and accumulated passes.
        micro_batch_size: sequences of one forward pass of one process. ``None``: ``batch_size / processes``.
        learning_rate: peak rate; warmed up linearly over the share ``warmup_ratio`` of the run, then a cosine down
            to ``min_lr_ratio`` of the peak at ``max_steps``.
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
        _require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm,
                 "a number above 0, or null for no clipping")  # fmt: skip
        _require(len(self.betas) == 2 and all(isinstance(b, int | float) and 0 <= b < 1 for b in self.betas), "betas",
                 self.betas, "two numbers in [0, 1)")  # fmt: skip
        _require(self.eps > 0, "eps", self.eps, "a number above 0")
        choices = {"optimizer": OPTIMIZERS, "precision": PRECISIONS, "matmul_precision": MATMUL_PRECISIONS,
                   "save_dtype": SAVE_DTYPES}  # fmt: skip
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
    for source in sources:
        given = isinstance(source, Mapping)
        where = "" if given else f"{source}: "
        for section, values in (source if given else read_yaml(source)).items():
            _known(section, SECTIONS, f"{where}section ")
            if not isinstance(values, dict):
                raise ValueError(f"{where}section {section}={values!r}: accepted is a mapping of keys to values")
            for key, value in values.items():
                tree[section][_known(key, _fields(section), f"{where}{section}.")] = value
    for dotted, text in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            raise ValueError(f"--{dotted}: accepted are keys of the form --section.key, sections {', '.join(SECTIONS)}")
        _known(section, SECTIONS, "--")
        tree[section][_known(key, _fields(section), f"--{section}.")] = _parse(text)
    # One seed for the whole run, unless the masks are to have another.
    tree["sparsity"].setdefault("seed", tree["train"].get("seed", TrainConfig.seed))
    built = {}
    for section, cls in SECTIONS.items():
        hints = _fields(section)
        values = {key: _typed(value, hints[key], f"{section}.{key}") for key, value in tree[section].items()}
        try:
            built[section] = values if section == "model" else cls(**values)
        except ValueError as error:
            raise ValueError(f"{section}.{error}") from error
    return RunConfig(**built)


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """The dotted overrides ``--section.key value`` (or ``=value``) of a command line, for `load_run_config`.

    Raises:
        ValueError: an argument is no dotted key, or a key has no value.
    """
    overrides, rest = {}, []
    for argument in arguments:
        rest += argument.split("=", 1) if argument.startswith("--") else [argument]
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or "." not in name:
            raise ValueError(f"unknown argument {name}: configuration keys are --section.key value")
        if not rest:
            raise ValueError(f"{name} needs a value")
        overrides[name.removeprefix("--")] = rest.pop(0)
    return overrides


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2:4 as 124, a number to the base 60: nobody means that, and here it is a sparsity structure."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not pattern.match("2:4")]
    + [(tag, re.compile(r"[-+]?\d[\d_]*$")) for tag, pattern in resolvers if tag.endswith(":int")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str) -> Any:
    """A value of the command line: YAML where it is, else plain text (``*.jsonl`` would be an alias)."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ValueError: it is not YAML, or no mapping.
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.load(file, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path}: accepted is a mapping")
    return content or {}


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


def _typed(value: Any, hint: Any, name: str) -> Any:
    """``value`` checked against a field's type; YAML reads ``1e-3`` as text, so text that is a number counts."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind in (Any, object) or (kind is type(None) and value is None):
            return value
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    names = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{name}={value!r}: accepted is {names}")


def _require(condition: bool, name: str, value: Any, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: accepted is {accepted}")
