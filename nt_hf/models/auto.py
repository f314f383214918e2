"""Multi-head models without the name of a family, as the Auto classes of Transformers load stock ones."""

import os
from collections.abc import Sequence

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_neurotrails import MODEL_TYPE_PREFIX, MultiHeadConfig
from .modeling_neurotrails import base_class, causal_lm_class

#: Families whose multi-head models the Auto classes know as soon as this package is imported; others follow when
#: somebody asks for them. (Every family takes about 15 ms.)
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "smollm3", "phi3", "gpt2", "gpt_neox",
    "cohere",
)  # fmt: skip
# Of ``from_pretrained``, and also needed to read the configuration.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def register(config: PreTrainedConfig | type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Makes the Auto classes know a family's multi-head models, and returns the class of those with LM heads.

    Raises:
        ValueError: ``config``, stock or multi-head, is no decoder's.
    """
    model = causal_lm_class(config)
    multi_head = model.config_class
    AutoConfig.register(multi_head.model_type, multi_head, exist_ok=True)
    AutoModel.register(multi_head, base_class(model.stock_class), exist_ok=True)
    AutoModelForCausalLM.register(multi_head, model, exist_ok=True)
    return model


def class_of_family(family: str) -> type[PreTrainedModel]:
    """The multi-head class for a stock ``model_type`` such as ``"qwen3"``, or for its own, ``"neurotrails_qwen3"``.

    Raises:
        ValueError: Transformers has no decoder of this type.
    """
    stock = str(family).removeprefix(MODEL_TYPE_PREFIX)
    if stock not in CONFIG_MAPPING:
        raise ValueError(f"model_type={family!r}: accepted are the decoders of Transformers, such as {_some()}")
    return register(CONFIG_MAPPING[stock])


def _some() -> str:
    return ", ".join(FAMILIES)


class NeuroTrailsForCausalLM:
    """Multi-head models of any family, by what a checkpoint or a configuration says; like an Auto class."""

    def __init__(self, *args, **kwargs):
        raise TypeError(
            "NeuroTrailsForCausalLM(): accepted are from_stock, from_stocks, from_pretrained and from_config, which "
            "return a model of the family's own class"
        )

    @classmethod
    def from_stock(cls, stock: PreTrainedModel | str | os.PathLike, **kwargs) -> PreTrainedModel:
        """A multi-head model whose every trail is a copy of ``stock``, a model or the path or hub id of one.

        Args:
            stock: a decoder of Transformers.
            kwargs: the number of heads and the like, and with a path those of ``from_pretrained`` (see
                ``TrailsMixin.from_stock``).

        Raises:
            ValueError: it is no decoder, or has heads already.
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
        return register(config).from_stock(stock, **kwargs)

    @classmethod
    def from_stocks(cls, stocks: Sequence[PreTrainedModel], ensemble_mode: str = "logits") -> PreTrainedModel:
        """A full ensemble of stock models of one family that were trained apart (see ``TrailsMixin.from_stocks``)."""
        if not stocks:
            raise ValueError("stocks=[]: accepted are one or more")
        return register(stocks[0].config).from_stocks(stocks, ensemble_mode)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of random weights, of a multi-head configuration."""
        return register(config)(config)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args, **kwargs) -> PreTrainedModel:
        """The multi-head model of a checkpoint, of whatever family it is (see ``CheckpointFilesMixin``).

        Raises:
            ValueError: the checkpoint is no multi-head model's.
        """
        return cls._class_of_checkpoint(path, **kwargs).from_pretrained(path, *args, **kwargs)

    @staticmethod
    def _class_of_checkpoint(path: str | os.PathLike, **kwargs) -> type[PreTrainedModel]:
        hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
        model_type = PreTrainedConfig.get_config_dict(path, **hub)[0].get("model_type")
        if not str(model_type).startswith(MODEL_TYPE_PREFIX):
            raise ValueError(
                f"{path} has model_type={model_type!r}: accepted is a multi-head model, {MODEL_TYPE_PREFIX}...; a "
                "stock model becomes one by NeuroTrailsForCausalLM.from_stock"
            )
        return class_of_family(model_type)
