"""Configurations of multi-head models: any stock configuration, plus the shape of the heads.

Classes are made when somebody asks for them: ``NeuroTrailsQwen3Config`` is ``Qwen3Config`` with the fields of
``MultiHeadConfig``.
"""

import copy
import functools

import transformers
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .masks import parse_structure
from .transformers_versions import CACHE

ENSEMBLE_MODES = ("logits", "probs")
PREFIX = "NeuroTrails"
MODEL_TYPE_PREFIX = "neurotrails_"
# Checked before the stock configuration divides by them; some families have lists of them, one value a layer.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "patch_size",
)
# How another model's file was stored: trails and multi-head models are made with plain weights.
_OF_A_QUANTISER = {"quantization_config"}


class MultiHeadConfig:
    """Configuration of a multi-head model with sparse masks (NeuroTrails, arXiv 2505.17909).

    The first ``num_hidden_layers - blocks_in_head`` blocks are the shared backbone. The last ``blocks_in_head``
    blocks, the final norm and the LM head exist once for each of ``num_ensemble_heads`` heads. The path through
    the backbone and one head, a *trail*, is an ordinary model of the stock family, of ``num_hidden_layers`` blocks.

    Args:
        num_ensemble_heads: number of heads, at least 1.
        blocks_in_head: blocks of each head, 0 (only norm and LM head) to ``num_hidden_layers``. Default: two
            thirds of the depth, as in the paper's models; all of it with ``share_embedding=False``.
        ensemble_mode: how the heads' predictions combine: ``"logits"``, their mean, or ``"probs"``, the
            logarithm of the mean probability.
        share_embedding: one token embedding for all heads. ``False`` gives each its own, which makes the heads
            a full ensemble of independent networks; only with ``blocks_in_head == num_hidden_layers``.
        embedding_initializer_range: standard deviation of the first weights of the token embedding, each head's where
            heads have their own: the draw without it, scaled. ``None``: as the stock family draws them. Not with
            ``tie_word_embeddings``, where LM heads have the same weights.
        masked_modules: globs of the parameter names that carry a sparsity mask, for example
            ``["model.layers.*", "model.heads.*"]``; ``"!glob"`` excludes, the last match decides. Empty: dense.
        mask_structure: of all masks: ``"unstructured"``, ``"constant_fan_in"`` or ``"N:M"`` such as ``"2:4"``; masks
            are checked for it when they are loaded.
        kwargs: everything that the stock configuration takes. ``num_hidden_layers`` is the depth of one trail.

    Raises:
        ValueError: a value lies outside its range; the message names field, value and range.
    """

    # Stock plans of parallelism name the layers of one stack and would leave the heads out.
    base_model_tp_plan = None
    base_model_pp_plan = None

    num_ensemble_heads: int = 3
    blocks_in_head: int | None = None
    ensemble_mode: str = "logits"
    share_embedding: bool = True
    embedding_initializer_range: float | None = None
    masked_modules: list[str] | None = None
    mask_structure: str = "unstructured"

    def __post_init__(self, **kwargs):
        self._check_sizes()
        if self.blocks_in_head is None:
            depth = self.trail_depth
            self.blocks_in_head = max(1, depth * 2 // 3) if self.share_embedding else depth
        self.masked_modules = [] if self.masked_modules is None else self.masked_modules
        super().__post_init__(**kwargs)
        self.check_heads()

    def _check_sizes(self) -> None:
        sizes = {name: getattr(self, name, None) for name in SIZES}
        for name, value in sizes.items():
            if value is not None and not isinstance(value, (list, tuple)) and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: accepted is a whole number from 1")
        hidden, heads, kv_heads = (sizes[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        if not (type(heads) is int and type(hidden) is int):
            return
        if getattr(self, "head_dim", None) is None and hidden % heads:
            raise ValueError(f"num_attention_heads={heads}: accepted is a divisor of hidden_size={hidden}")
        if type(kv_heads) is int and heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads}: accepted is a divisor of num_attention_heads={heads}")
        for name in ("hidden_act", "hidden_activation", "activation_function"):
            value = getattr(self, name, None)
            if isinstance(value, str) and value not in ACT2FN:
                raise ValueError(f"{name}={value!r}: accepted are {', '.join(ACT2FN)}")

    def check_heads(self) -> None:
        """Checks the fields of this class, which may have changed since the configuration was made.

        Raises:
            ValueError: a value lies outside its range; the message names field, value and range.
        """
        depth = self.trail_depth
        for name in ("num_ensemble_heads", "blocks_in_head"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted is a whole number")
        if self.num_ensemble_heads < 1:
            raise ValueError(f"num_ensemble_heads={self.num_ensemble_heads}: a model has at least 1 head")
        if not 0 <= self.blocks_in_head <= depth:
            raise ValueError(
                f"blocks_in_head={self.blocks_in_head}: accepted is 0 to {self.depth_name}={depth}, a trail's depth"
            )
        if self.ensemble_mode not in ENSEMBLE_MODES:
            raise ValueError(f"ensemble_mode={self.ensemble_mode!r}: accepted are {', '.join(ENSEMBLE_MODES)}")
        if type(self.share_embedding) is not bool:
            raise ValueError(f"share_embedding={self.share_embedding!r}: accepted are True and False")
        self._check_embedding_initializer_range()
        if not isinstance(self.masked_modules, (list, tuple)) or not all(type(p) is str for p in self.masked_modules):
            raise ValueError(f"masked_modules={self.masked_modules!r}: accepted is a list of globs")
        parse_structure(self.mask_structure)
        for name in ("layer_types", "mlp_layer_types"):
            kinds = vars(self).get(name)
            if isinstance(kinds, (list, tuple)) and len(kinds) != depth:
                raise ValueError(f"{name}={list(kinds)}: accepted is a list of num_hidden_layers={depth} kinds")
        if not self.share_embedding and self.blocks_in_head != depth:
            raise ValueError(
                f"share_embedding=False with blocks_in_head={self.blocks_in_head}: separate embeddings need heads of "
                f"full depth, blocks_in_head={depth}"
            )

    def _check_embedding_initializer_range(self) -> None:
        value = self.embedding_initializer_range
        if value is None:
            return
        accepted = "a number above 0, or None"
        if not hasattr(self, "vocab_size"):
            accepted = "None, for there is no token embedding"
        elif getattr(self, "tie_word_embeddings", False):
            accepted = "None with tie_word_embeddings=True"
        elif type(value) in (int, float) and 0 < value < float("inf"):
            return
        raise ValueError(f"embedding_initializer_range={value!r}: accepted is {accepted}")

    @property
    def trail_depth(self) -> int:
        """Number of blocks of one trail; of a network of stages, such as a ResNet, those of all stages."""
        depths = getattr(self, "depths", None)
        if depths is None and not hasattr(self, "num_hidden_layers"):
            raise NotImplementedError(
                f"{self.stock_class.__name__} (model_type={self.stock_class.model_type!r}) says not how deep it is: "
                "accepted are configurations with num_hidden_layers or depths"
            )
        return self.num_hidden_layers if depths is None else sum(depths)

    @property
    def depth_name(self) -> str:
        """What says how deep a trail is, in the stock configuration."""
        return "num_hidden_layers" if getattr(self, "depths", None) is None else "sum(depths)"

    @property
    def topology(self) -> str:
        """The shape in words, such as "3 heads of 1 block on a backbone of 2"."""
        heads, blocks = self.num_ensemble_heads, self.blocks_in_head
        parts = f"{heads} head{'s' * (heads != 1)} of {blocks} block{'s' * (blocks != 1)}"
        return f"{parts} on a backbone of {self.num_backbone_layers}"

    @property
    def num_backbone_layers(self) -> int:
        """Number of shared blocks."""
        return self.trail_depth - self.blocks_in_head

    @property
    def num_cache_layers(self) -> int:
        """Number of key-value cache slots: the backbone's blocks and those of every head."""
        return self.num_backbone_layers + self.num_ensemble_heads * self.blocks_in_head

    def first_cache_layer(self, head: int) -> int:
        """The key-value cache slot of a head's first block."""
        return self.num_backbone_layers + head * self.blocks_in_head

    def trail_slots(self, head: int) -> list[int]:
        """The cache slots of one trail's blocks, by depth."""
        first = self.first_cache_layer(head)
        return [*range(self.num_backbone_layers), *range(first, first + self.blocks_in_head)]

    def get_text_config(self, decoder=None, encoder=None):
        """As in ``PreTrainedConfig``, but the decoder's view is of one stack, with a layer a cache slot.

        Caches ask for ``get_text_config(decoder=True)``, also of the view itself, and build as many slots as it has
        layers, each of the kind that it names for the layer.
        """
        if not decoder:
            return self
        view = copy.copy(self)
        backbone, depth = self.num_backbone_layers, self.trail_depth
        depths = [*range(backbone), *list(range(backbone, depth)) * self.num_ensemble_heads]
        kinds = vars(self).get("layer_types")  # of the class, a ResNet lists kinds of blocks
        if isinstance(kinds, (list, tuple)):
            view.__dict__["layer_types"] = [kinds[index] for index in depths]
        name = self.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        view.__dict__.update({name: len(depths), "num_ensemble_heads": 1, "blocks_in_head": 0})
        return view

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} has model_type={model_type!r}: accepted is {cls.model_type!r}; a "
                "stock model becomes one by NeuroTrailsForCausalLM.from_stock(model)"
            )
        return config_dict, kwargs

    @classmethod
    def from_stock_config(cls, stock: PreTrainedConfig, **fields) -> PreTrainedConfig:
        """The configuration of a multi-head model whose trails have the configuration ``stock``.

        Args:
            stock: of the class that this one adds to.
            fields: those of this class.
        """
        drop = {"model_type", *_OF_A_QUANTISER}
        config = cls(**{key: value for key, value in stock.to_dict().items() if key not in drop}, **fields)
        config.architectures = None
        config._attn_implementation = stock._attn_implementation
        return config

    def to_stock_config(self) -> PreTrainedConfig:
        """The stock configuration of one trail."""
        drop = {
            *MultiHeadConfig.__annotations__,
            *_OF_A_QUANTISER,
            "model_type",
            "architectures",
            "auto_map",
            "transformers_version",
        }
        config = self.stock_class(**{key: value for key, value in self.to_dict().items() if key not in drop})
        config._attn_implementation = self._attn_implementation
        return config


def check_family(stock: type) -> None:
    """Refuses what is no configuration class of a stock decoder.

    Raises:
        ValueError: it is none; the message names it.
    """
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedConfig)):
        raise ValueError(f"{stock!r}: accepted is the configuration of a decoder, such as Qwen3Config")
    if stock not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{stock.__name__} (model_type={stock.model_type!r}): accepted are the families that "
            "AutoModelForCausalLM knows, such as llama, qwen3, mistral, gemma2, gpt2"
        )
    if "text_config" in stock.sub_configs or not hasattr(stock(), "num_hidden_layers"):
        raise ValueError(
            f"{stock.__name__} (model_type={stock.model_type!r}): accepted are text decoders; of a model of several "
            "kinds of data its text_config is one"
        )


@functools.cache
def config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of multi-head configurations over a stock decoder's, made when it is asked for the first time.

    Raises:
        ValueError: the stock class is no decoder's.
    """
    check_family(stock)
    return make_config_class(stock, __name__, globals())


def make_config_class(stock: type[PreTrainedConfig], module: str, names: dict) -> type[PreTrainedConfig]:
    """A class of multi-head configurations, put among the ``names`` of a ``module``.

    Pickles and the code of checkpoints look for it there.
    """
    namespace = {
        "__module__": module,
        "__doc__": MultiHeadConfig.__doc__,
        "__annotations__": dict(MultiHeadConfig.__annotations__),
        "model_type": MODEL_TYPE_PREFIX + stock.model_type,
        "stock_class": stock,
        # What Trainer's evaluation would otherwise gather beside the logits, as if it had a row an example.
        "keys_to_ignore_at_inference": [CACHE, "head_losses"],
    }
    made = type(PREFIX + stock.__name__, (MultiHeadConfig, stock), namespace)
    made.register_for_auto_class()
    names[made.__name__] = made
    return made


def __getattr__(name: str):
    # Imports, pickles and ``auto_map`` entries find a class that nobody has asked for yet.
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (name.endswith("Config") and isinstance(stock, type) and issubclass(stock, PreTrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(stock)
