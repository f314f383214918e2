"""Multi-head models without the name of a family, as the Auto classes of Transformers load stock ones."""

import os
from collections.abc import Sequence
from typing import ClassVar

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_neurotrails import MODEL_TYPE_PREFIX, PREFIX, MultiHeadConfig
from .modeling_neurotrails import MultiHeadForCausalLM, base_class, causal_lm_class
from .modeling_neurotrails_images import WIDE_RESNETS, MultiHeadForImageClassification, image_class
from .modeling_neurotrails_images import base_class as image_base_class

#: Families whose multi-head models the Auto classes know as soon as this package is imported; others follow when
#: somebody asks for them. (Every family takes about 15 ms.)
DECODERS = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "smollm3", "phi3", "gpt2", "gpt_neox",
    "cohere",
)  # fmt: skip
IMAGE_CLASSIFIERS = ("resnet", "vit", "convnext", "wide_resnet")
FAMILIES = DECODERS + IMAGE_CLASSIFIERS
# Of ``from_pretrained``, and also needed to read the configuration.
_HUB_OPTIONS = (
    "cache_dir", "force_download", "gguf_file", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip


def register(config: PreTrainedConfig | type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Makes the Auto classes know a family's multi-head models; returns the class with LM heads or classifiers.

    Raises:
        ValueError: ``config``, stock or multi-head, is neither a decoder's nor an image classifier's.
    """
    kind = config if isinstance(config, type) else type(config)
    stock = getattr(kind, "stock_class", kind)
    if stock in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and stock not in MODEL_FOR_CAUSAL_LM_MAPPING:
        model, auto = image_class(config), AutoModelForImageClassification
        base = image_base_class(model)
    else:
        model, auto = causal_lm_class(config), AutoModelForCausalLM
        base = base_class(model.stock_class)
    multi_head = model.config_class
    AutoConfig.register(multi_head.model_type, multi_head, exist_ok=True)
    AutoModel.register(multi_head, base, exist_ok=True)
    auto.register(multi_head, model, exist_ok=True)
    return model


def class_of_family(family: str) -> type[PreTrainedModel]:
    """The multi-head class for a stock ``model_type`` such as ``"qwen3"``, or for its own, ``"neurotrails_qwen3"``.

    Raises:
        ValueError: Transformers has no decoder and no image classifier of this type.
    """
    stock = str(family).removeprefix(MODEL_TYPE_PREFIX)
    if stock not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type={family!r}: accepted are the decoders and image classifiers of Transformers, such as "
            f"{', '.join(FAMILIES)}"
        )
    return register(CONFIG_MAPPING[stock])


def family_of(path: str | os.PathLike) -> str:
    """The ``model_type`` of a checkpoint, stock or multi-head, a directory or hub id.

    Raises:
        ValueError: there is no such checkpoint.
    """
    try:
        return str(PreTrainedConfig.get_config_dict(path)[0].get("model_type"))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: accepted is a checkpoint directory or a hub id ({reason})") from error


def config_of_checkpoint(path: str | os.PathLike, **fields) -> MultiHeadConfig:
    """The multi-head configuration of a checkpoint, stock or multi-head.

    Args:
        path: a directory or hub id.
        fields: those of ``MultiHeadConfig`` for a stock checkpoint; shares that dropout drops; any others must be as
            the checkpoint has them.

    Raises:
        ValueError: a field is not as the checkpoint has it, a share is no number from 0 to below 1, or the family
            cannot have heads.
    """
    kind = class_of_family(family_of(path)).config_class
    config = AutoConfig.from_pretrained(path)
    is_stock = not isinstance(config, MultiHeadConfig)
    of_heads = {name: fields[name] for name in fields if is_stock and name in MultiHeadConfig.__annotations__}
    for name in fields.keys() - of_heads.keys():
        value = getattr(config, name, None)
        if is_dropout(config, name):
            if not (isinstance(fields[name], int | float) and 0 <= fields[name] < 1):
                raise ValueError(f"{name}={fields[name]!r}: accepted is a number from 0 to below 1")
            setattr(config, name, fields[name])
        elif fields[name] != value:
            raise ValueError(f"{name}={fields[name]!r}: accepted is {value!r}, as in {path}")
    return kind.from_stock_config(config, **of_heads) if is_stock else config


def is_dropout(config: PreTrainedConfig, name: str) -> bool:
    """Whether a field is a share that dropout drops in training, as ``attention_dropout`` or ``resid_pdrop``."""
    return "drop" in name and isinstance(getattr(config, name, None), int | float)


def class_named(name: str) -> type | None:
    """The multi-head class of a name, such as ``"NeuroTrailsQwen3Config"``; ``None`` if there is no such family."""
    stock_name = name.removeprefix(PREFIX)
    stock = WIDE_RESNETS.get(stock_name) or getattr(transformers, stock_name, None)
    if not (name.startswith(PREFIX) and isinstance(stock, type)):
        return None
    config = stock if issubclass(stock, PreTrainedConfig) else getattr(stock, "config_class", None)
    if config is None:
        return None
    model = register(config)
    made = [model.config_class, model, AutoModel._model_mapping[model.config_class]]
    return next((cls for cls in made if cls.__name__ == name), None)


class _AnyFamily:
    """What ``NeuroTrailsForCausalLM`` and ``NeuroTrailsForImageClassification`` share."""

    kind: ClassVar[type]
    accepted: ClassVar[str]

    def __init__(self, *args, **kwargs):
        raise TypeError(
            f"{type(self).__name__}(): accepted are from_stock, from_stocks, from_pretrained and from_config, which "
            "return a model of the family's own class"
        )

    @classmethod
    def from_stock(cls, stock: PreTrainedModel | str | os.PathLike, **kwargs) -> PreTrainedModel:
        """A multi-head model whose every trail is a copy of ``stock``, a model or the path or hub id of one.

        Args:
            stock: a model of Transformers.
            kwargs: the number of heads and the like, and with a path those of ``from_pretrained`` (see
                ``TrailsMixin.from_stock``).

        Raises:
            ValueError: it is of another kind, or has heads already.
            NotImplementedError: its family cannot have heads; the message says what stands in the way.
        """
        config = getattr(stock, "config", None)
        if isinstance(stock, (str, os.PathLike)):
            hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
            config = AutoConfig.from_pretrained(stock, **hub)
        if config is None:
            raise TypeError(f"from_stock({stock!r}): accepted is a model, or a directory or hub id of one")
        if isinstance(config, MultiHeadConfig):
            raise ValueError(f"from_stock: {type(config).__name__} has heads already; accepted is a stock model")
        return cls._class(config).from_stock(stock, **kwargs)

    @classmethod
    def from_stocks(cls, stocks: Sequence[PreTrainedModel], ensemble_mode: str = "logits") -> PreTrainedModel:
        """A full ensemble of stock models of one family that were trained apart (see ``TrailsMixin.from_stocks``)."""
        if not stocks:
            raise ValueError("stocks=[]: accepted are one or more")
        return cls._class(stocks[0].config).from_stocks(stocks, ensemble_mode)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of random weights, of a multi-head configuration."""
        return cls._class(config)(config)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args, **kwargs) -> PreTrainedModel:
        """The multi-head model of a checkpoint, of whatever family it is (see ``CheckpointFilesMixin``).

        Raises:
            ValueError: the checkpoint is no multi-head model's of this kind.
        """
        hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
        model_type = PreTrainedConfig.get_config_dict(path, **hub)[0].get("model_type")
        if not str(model_type).startswith(MODEL_TYPE_PREFIX):
            raise ValueError(
                f"{path} has model_type={model_type!r}: accepted is a multi-head model, {MODEL_TYPE_PREFIX}...; a "
                f"stock model becomes one by {cls.__name__}.from_stock"
            )
        return cls._class(class_of_family(model_type).config_class).from_pretrained(path, *args, **kwargs)

    @classmethod
    def _class(cls, config: PreTrainedConfig | type[PreTrainedConfig]) -> type[PreTrainedModel]:
        model = register(config)
        if not issubclass(model, cls.kind):
            raise ValueError(
                f"{cls.__name__}: {model.stock_class.__name__} is of another kind; accepted is {cls.accepted}"
            )
        return model


class NeuroTrailsForCausalLM(_AnyFamily):
    """Multi-head decoders of any family, by what a checkpoint or a configuration says; like an Auto class."""

    kind = MultiHeadForCausalLM
    accepted = "a decoder; NeuroTrailsForImageClassification takes image classifiers"


class NeuroTrailsForImageClassification(_AnyFamily):
    """Multi-head image classifiers of any family, by what a checkpoint or a configuration says; like an Auto class."""

    kind = MultiHeadForImageClassification
    accepted = "an image classifier; NeuroTrailsForCausalLM takes decoders"
