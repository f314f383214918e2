"""The configuration of a training run: YAML files plus dotted overrides, every key and value checked."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .checks import (
    SWITCH,
    TEXT,
    Rule,
    check,
    check_fields,
    choice,
    integer,
    list_of,
    mapping_to,
    number,
    optional,
    setting,
)
from .data.config import DataConfig
from .data.image_config import ImageConfig
from .models.auto import class_of_family, config_of_checkpoint, family_of
from .models.configuration_neurotrails import MODEL_TYPE_PREFIX, MultiHeadConfig
from .models.modeling_neurotrails_images import MultiHeadForImageClassification
from .sparsity.config import SparsityConfig
from .yaml_values import DuplicateKeyError, known_name, parse_yaml, read_yaml, typed_value


@dataclasses.dataclass
class TrainConfig:
    """Optimisation, evaluation and checkpoints.

    Attributes:
        max_steps: optimizer steps of the whole run.
        batch_size: sequences or images of one optimizer step, over all processes and accumulated passes.
        micro_batch_size: those of one forward pass of one process. ``None``: ``batch_size / processes``.
        learning_rate: peak rate; warmed up linearly over the share ``warmup_ratio`` of the run.
        lr_schedule: what follows: ``"cosine"``, down to ``min_lr_ratio`` of the peak at ``max_steps``, or
            ``"warmup_stable_decay"``, the peak until the last share ``decay_ratio`` of the run and the cosine there, or
            ``"step"``, a tenth of the rate from each of ``lr_milestones`` on. A run of the second keeps its rate when
            it is extended before the decay.
        lr_milestones: shares of the run, with ``lr_schedule="step"``.
        learning_rate_factors: factors for the rate of some parameters, by glob of their names, such as
            ``{"*.layers.*": 0.3}`` for all blocks or ``{"model.layers.*": 0.5}`` for the backbone's; the last fitting
            glob decides.
        optimizer: ``"adam"`` (the paper's for text) or ``"adamw"``, with ``betas``, ``eps``; or ``"sgd"``, with
            ``momentum``, ``nesterov``. ``weight_decay`` of ``"adamw"`` is decoupled and spares norms and biases, that
            of ``"sgd"`` is added to all gradients, as usual for image classifiers; ``"adam"`` has none.
        head_loss: a step's loss is the ``"mean"`` or the ``"sum"`` of the heads' losses. Under SGD the sum gives a
            head's own weights the steps of a single network with the same rate and decay; the mean gives them
            ``1 / heads`` of its gradient. Adam undoes such a factor, but for ``eps`` and the norm that is clipped.
        max_grad_norm: clip the gradient of the active weights to this norm; ``None`` does not clip.
        precision: ``"bf16"`` is autocast over fp32 weights; ``"auto"`` takes it on a GPU or CPU with bf16 instructions
            (AVX512-BF16 or AMX), else fp32, and keeps what the run began with.
        matmul_precision: precision of products of fp32 matrices (``torch.set_float32_matmul_precision``): "high" and
            "medium" may round the inputs and are faster on some GPUs and CPUs.
        gradient_checkpointing: recompute activations in the backward pass.
        head_noise: with ``model.init_from`` a stock model, whose heads begin as copies: standard deviation of noise
            that is added to the matrices of every head but the first, as a share of each matrix's own.
        compile: compile the decoder blocks by ``torch.compile``; needs a C++ compiler on a CPU, where it gains nothing.
        peak_tflops: the hardware's dense matrix peak for one process, to report MFU; ``None``: looked up by the
            device's name, no MFU when unknown.
        log_steps, eval_steps, save_steps: steps between log lines, evaluations, checkpoints.
        check_interval: topology updates between two checks that all processes of DDP hold the same weights, masks and
            optimizer state.
        keep: checkpoints to keep, the newest; older ones are deleted once a newer one is verified.
        save_dtype: type of the weights in ``model.safetensors``. Training always resumes from fp32.
        seed: seed of initialisation, masks and data order.
    """

    max_steps: int = setting(10_000, integer(1))
    batch_size: int = setting(512, integer(1))
    micro_batch_size: int | None = setting(None, optional(integer(1)))
    learning_rate: float = setting(1e-3, number("(0, inf)"))
    lr_schedule: str = setting("cosine", choice(["cosine", "warmup_stable_decay", "step"]))
    lr_milestones: list[float] = setting(
        [0.25, 0.5, 0.75], list_of(number("(0, 1)"), "a list of shares of the run in (0, 1)")
    )
    decay_ratio: float = setting(0.1, number("(0, 1]"))
    min_lr_ratio: float = setting(0.1, number("[0, 1]"))
    warmup_ratio: float = setting(0.1, number("[0, 1)", "a share of the run"))
    learning_rate_factors: dict[str, float] = setting(
        {}, mapping_to(number("[0, inf)"), "a mapping from globs to numbers from 0")
    )
    optimizer: str = setting("adam", choice(["adam", "adamw", "sgd"]))
    betas: list[float] = setting([0.9, 0.999], list_of(number("[0, 1)"), "two numbers in [0, 1)", length=2))
    eps: float = setting(1e-8, number("(0, inf)"))
    momentum: float = setting(0.9, number("[0, 1)"))
    nesterov: bool = setting(False, SWITCH)
    weight_decay: float = setting(0.0, number("[0, inf)"))
    head_loss: str = setting("mean", choice(["mean", "sum"]))
    max_grad_norm: float | None = setting(None, optional(number("(0, inf)")))
    precision: str = setting("auto", choice(["auto", "fp32", "bf16"]))
    matmul_precision: str = setting("highest", choice(["highest", "high", "medium"]))
    gradient_checkpointing: bool = setting(False, SWITCH)
    head_noise: float = setting(0.0, number("[0, inf)"))
    compile: bool = setting(False, SWITCH)
    peak_tflops: float | None = setting(None, optional(number("(0, inf)")))
    log_steps: int = setting(10, integer(1))
    eval_steps: int = setting(1_000, integer(1))
    save_steps: int = setting(1_000, integer(1))
    check_interval: int = setting(10, integer(1))
    keep: int = setting(2, integer(1))
    save_dtype: str = setting("float32", choice(["float32", "bfloat16"]))
    seed: int = setting(0, integer(0, 2**32 - 1))

    def __post_init__(self):
        check_fields(self)
        most = 1 - self.warmup_ratio if self.lr_schedule == "warmup_stable_decay" else 1
        left = f"a share of the run above 0, up to what the warm-up leaves ({most:g})"
        check("decay_ratio", self.decay_ratio, Rule(lambda share: 0 < share <= most, left))
        decays = self.optimizer in ("adamw", "sgd")
        rule = Rule(lambda decay: decay == 0 or decays, "0, or a number above 0 with optimizer=adamw or sgd")
        check("weight_decay", self.weight_decay, rule)
        moves = Rule(lambda nesterov: not nesterov or self.momentum > 0, "false where momentum is 0")
        check("nesterov", self.nesterov, moves)

    def accumulation_steps(self, processes: int) -> tuple[int, int]:
        """Splits ``batch_size``, for each process, into (rows or images of a forward pass, forward passes of a step).

        Raises:
            ValueError: the batch does not divide evenly.
        """
        micro = self.micro_batch_size or max(1, self.batch_size // processes)
        passes, remainder = divmod(self.batch_size, micro * processes)
        if remainder or not passes:
            raise ValueError(
                f"train.batch_size={self.batch_size}: accepted is a multiple of micro_batch_size * processes = "
                f"{micro} * {processes}"
            )
        return micro, passes


@dataclasses.dataclass
class RunConfig:
    """One training run.

    Attributes:
        model: ``base``, the family of stock models (``"llama"`` where it is left out), and arguments of the family's
            multi-head configuration. Or ``init_from``, a stock or multi-head checkpoint whose weights the run starts
            from, a directory or hub id; of a stock one, with arguments of the heads.
        data: of text or, where the family is of image classifiers, of images.
    """

    model: dict[str, Any]
    data: DataConfig | ImageConfig
    sparsity: SparsityConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, as a YAML file would hold them."""
        return dataclasses.asdict(self)

    def model_config(self, **derived: Any) -> MultiHeadConfig:
        """The model's configuration.

        Sizes that are left out follow from those that are given, where a family would take them from its best-known
        model: there are as many key and value heads as attention heads, and these share ``hidden_size``.

        Args:
            derived: fields that follow from the data; by default the length of a row of text alone.

        Raises:
            ValueError: a field lies outside its range.
        """
        fields = copy.deepcopy(self.model)  # the configuration completes rope_parameters in place
        if "init_from" in fields:
            return self._initial_config(fields, derived)
        family = class_of_family(fields.pop("base", DEFAULT_BASE)).config_class
        hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
        if hidden and heads and hidden % heads == 0:
            known = {field.name for field in dataclasses.fields(family)}
            sizes = {"num_key_value_heads": heads, "head_dim": hidden // heads}
            fields = {name: value for name, value in sizes.items() if name in known} | fields
        if isinstance(self.data, DataConfig):
            derived = {"max_position_embeddings": self.data.sequence_length, **derived}
        return family(**fields, **derived)

    def _initial_config(self, fields: dict[str, Any], derived: Mapping[str, Any]) -> MultiHeadConfig:
        """The configuration of the checkpoint that the run starts from."""
        fields.pop("base", None)
        path = fields.pop("init_from")
        try:
            config = config_of_checkpoint(path, **fields)
        except ValueError as error:
            raise ValueError(f"model.{error}") from error
        for name, value in derived.items():
            setattr(config, name, value)
        if isinstance(self.data, DataConfig) and (most := getattr(config, "max_position_embeddings", None)):
            check("data.sequence_length", self.data.sequence_length, integer(1, most))
        return config


SECTIONS = {"model": MultiHeadConfig, "data": DataConfig, "sparsity": SparsityConfig, "train": TrainConfig}
DEFAULT_BASE = "llama"
CONFIGS = Path(__file__).parent / "configs"
# Set by training from other keys, so that they cannot contradict them.
DERIVED_MODEL_KEYS = {
    "masked_modules", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "image_size",
    "num_channels",
}  # fmt: skip


def load_run_config(
    sources: Sequence[str | Path | Mapping[str, Any]], overrides: Mapping[str, str] | None = None
) -> RunConfig:
    """Reads configurations, each overriding the ones before, then dotted ``overrides`` (``{"train.max_steps": "40"}``).

    Args:
        sources: YAML files, names of those that come with the package, or mappings of sections as a file would hold
            them. A file may name a ``base``, another file that it overrides.
        overrides: values by dotted key, as YAML text.

    Raises:
        ValueError: an unknown file, section or key (the nearest valid name is given), a value of the wrong type or
            outside its range.
        OSError: a file cannot be read.
    """
    tree: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    texts: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}  # of the same scalars, as they were written
    layers = [layer for source in sources for layer in _layers(source)]
    base = _base(layers, overrides or {})
    sections = {**SECTIONS, "data": ImageConfig if _is_of_images(base) else DataConfig}
    fields = {section: _fields(cls, base) for section, cls in sections.items()}
    for where, content, written in layers:
        for section, values in content.items():
            known_name(section, SECTIONS, f"{where}section ")
            for key, value in values.items():
                family = f"{base} " if section == "model" and base != DEFAULT_BASE else ""
                tree[section][known_name(key, fields[section], f"{where}{family}{section}.")] = value
                texts[section][key] = written.get(section, {}).get(key)
    for dotted, text in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            raise ValueError(f"--{dotted}: accepted is --section.key, sections {', '.join(SECTIONS)}")
        known_name(section, SECTIONS, "--")
        known_name(key, fields[section], f"--{section}.")
        try:
            tree[section][key], texts[section][key] = parse_yaml(text)
        except DuplicateKeyError as error:
            raise ValueError(f"--{dotted}: {error}") from error
    typed = {
        section: {
            key: typed_value(value, fields[section][key], f"{section}.{key}", texts[section].get(key))
            for key, value in tree[section].items()
        }
        for section in SECTIONS
    }
    # One seed for the whole run, unless the masks are to have another.
    typed["sparsity"].setdefault("seed", typed["train"].get("seed", TrainConfig.seed))
    built = {}
    for section, cls in sections.items():
        try:
            built[section] = typed[section] if section == "model" else cls(**typed[section])
        except ValueError as error:
            raise ValueError(f"{section}.{error}") from error
    if built["model"].get("base") == DEFAULT_BASE:
        del built["model"]["base"]  # so that naming it changes nothing
    config = RunConfig(**built)
    _check_first_weights(config)
    if built["model"].get("rope_parameters"):
        _check_rope(config)
    return config


def _base(layers: Sequence[tuple[str, Mapping, Mapping]], overrides: Mapping[str, str]) -> str:
    """The family of stock models that a configuration names last, or that of the checkpoint it starts from."""

    def last(key: str) -> Any:
        named = [content["model"][key] for _, content, _ in layers if key in content.get("model", {})]
        return overrides.get(f"model.{key}", named[-1] if named else None)

    base, source = last("base"), last("init_from")
    if source is not None:
        check("model.init_from", source, TEXT)
        try:
            family = family_of(source).removeprefix(MODEL_TYPE_PREFIX)
        except ValueError as error:
            raise ValueError(f"model.init_from={error}") from error
        check("model.base", base, Rule(lambda base: base in (None, family), f"{family}, the family of {source}"))
        base = family
    base = DEFAULT_BASE if base is None else base
    check("model.base", base, TEXT)
    try:
        class_of_family(base)
    except ValueError as error:
        raise ValueError(f"model.base={base!r}: {str(error).partition(': ')[2]}") from error
    return base


def _is_of_images(base: str) -> bool:
    return issubclass(class_of_family(base), MultiHeadForImageClassification)


def find_config(name: str | Path, folder: Path | None = None) -> Path:
    """The file of a configuration.

    Args:
        name: its path, or the name of one that comes with the package, such as ``"60m"``.
        folder: that a relative path starts from; ``None``: the working directory.

    Raises:
        ValueError: it is neither; the message lists the known names.
    """
    path = (folder or Path()) / name
    if path.is_file():
        return path
    known = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    named = known.get(str(name).removesuffix(".yaml"))
    if named is None:
        raise ValueError(f"configuration {name}: accepted is a YAML file, or one of the names {', '.join(known)}")
    return named


def read_sections(sources: Sequence[str | Path | Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sections of configurations, each laid over the ones before; unchecked but for being mappings.

    Raises:
        ValueError: one is no YAML, or no mapping of sections, or its base cannot be found.
        OSError: a file cannot be read.
    """
    tree: dict[str, dict[str, Any]] = {}
    for _, content, _ in (layer for source in sources for layer in _layers(source)):
        for section, values in content.items():
            tree[section] = tree.get(section, {}) | values
    return tree


def _layers(
    source: str | Path | Mapping[str, Any], folder: Path | None = None, above: tuple[Path, ...] = ()
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The layers of a configuration, its base first: where each is from, what it holds, and its scalars as written."""
    if isinstance(source, Mapping):
        where, content, written = "", source, {}
    else:
        path = find_config(source, folder)
        where, (content, written) = f"{path}: ", read_yaml(path)
        if "base" in content:
            base = content.pop("base")
            check(f"{where}base", base, TEXT)
            if path.resolve() in above:
                raise ValueError(f"{where}base={base!r}: accepted is a file that does not lie over this one")
            yield from _layers(base, path.parent, (*above, path.resolve()))
    for section, values in content.items():
        if not isinstance(values, dict):
            raise ValueError(f"{where}section {section}={values!r}: accepted is a mapping of keys to values")
    yield where, content, written


def _check_first_weights(config: RunConfig) -> None:
    """Checks that nothing asks for new weights in another way where the weights are a checkpoint's."""
    if "init_from" in config.model:
        scale = config.model.get("embedding_initializer_range")
        untouched = Rule(lambda value: value is None, "null with model.init_from, whose weights are trained")
        check("model.embedding_initializer_range", scale, untouched)
        dense = choice(["dense"], when="with model.init_from, whose weights are trained")
        check("sparsity.first_weights", config.sparsity.first_weights, dense)


def _check_rope(config: RunConfig) -> None:
    """Checks what Transformers looks up without a check, when the model is built."""
    rope = config.model["rope_parameters"]
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", 1.0)
    check("model.rope_parameters.rope_type", kind, choice(dict.fromkeys(["default", *ROPE_INIT_FUNCTIONS])))
    check("model.rope_parameters.rope_theta", base, number("(0, inf)"))
    if kind != "default":
        try:
            ROPE_INIT_FUNCTIONS[kind](config.model_config(), None)
        except KeyError as error:
            raise ValueError(
                f"model.rope_parameters={rope}: accepted with {kind} is one with {error.args[0]}"
            ) from error


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """The dotted overrides ``--section.key value`` (or ``=value``) of a command line, for `load_run_config`.

    Raises:
        ValueError: an argument is no dotted key, or a key has no value.
    """
    overrides, remaining = {}, list(arguments)
    while remaining:
        name, equals, value = remaining.pop(0).partition("=")
        if not name.startswith("--") or "." not in name:
            raise ValueError(f"{name}: unknown argument; accepted are configuration keys, --section.key value")
        if not equals:
            # A value may begin with one dash, as negative numbers do; with two it is the next key.
            if not remaining or remaining[0].startswith("--"):
                raise ValueError(f"{name}: has no value; accepted is {name} true, for example, where it is a switch")
            value = remaining.pop(0)
        overrides[name.removeprefix("--")] = value
    return overrides


def _fields(section: type, base: str) -> dict[str, Any]:
    """The types of a section's keys; those of the model's are the fields of a family's configuration."""
    if section is not MultiHeadConfig:
        return {field.name: field.type for field in dataclasses.fields(section)}
    family = class_of_family(base).config_class
    types = {field.name: field.type for field in dataclasses.fields(family)}
    # The general fields of Transformers (for generation, labels, …) do not matter here.
    stock = family.stock_class.__mro__
    defining = [family, *stock[: stock.index(PreTrainedConfig)]]
    own = {name for parent in defining for name in vars(parent).get("__annotations__", {})} & types.keys()
    keys = {"base": str, "init_from": str} | {name: types[name] for name in sorted(own)}
    keys |= {alias: types[name] for alias, name in family.attribute_map.items() if name in types}
    return {name: kind for name, kind in keys.items() if name not in DERIVED_MODEL_KEYS}
