"""Configuration of NeuroTrails Llamas: a stock Llama configuration plus the shape of the heads."""

import copy
from typing import ClassVar

from transformers import LlamaConfig
from transformers.activations import ACT2FN

from .masks import parse_structure
from .transformers_versions import CACHE

ENSEMBLE_MODES = ("logits", "probs")


class NeuroTrailsLlamaConfig(LlamaConfig):
    """Configuration of a multi-head Llama with sparse masks (NeuroTrails, arXiv 2505.17909).

    The first ``num_hidden_layers - blocks_in_head`` blocks are the shared backbone. The last ``blocks_in_head``
    blocks, the final norm and the LM head exist once for each of ``num_ensemble_heads`` heads. The path through
    the backbone and one head, a *trail*, is an ordinary Llama of ``num_hidden_layers`` blocks.

    Args:
        num_ensemble_heads: number of heads, at least 1.
        blocks_in_head: blocks of each head, 0 (only norm and LM head) to ``num_hidden_layers``. Default: two
            thirds of the depth, as in the paper's models; all of it with ``share_embedding=False``.
        ensemble_mode: how the heads' predictions combine: ``"logits"``, their mean, or ``"probs"``, the
            logarithm of the mean probability.
        share_embedding: one token embedding for all heads. ``False`` gives each its own, which makes the heads
            a full ensemble of independent networks; only with ``blocks_in_head == num_hidden_layers``.
        masked_modules: globs of the parameter names that carry a sparsity mask, for example
            ``["model.layers.*", "model.heads.*"]``; ``"!glob"`` excludes, the last match decides. Empty: dense.
        mask_structure: of all masks: ``"unstructured"``, ``"constant_fan_in"`` or ``"N:M"`` such as ``"2:4"``; masks
            are checked for it when they are loaded.
        kwargs: everything that ``LlamaConfig`` takes. ``num_hidden_layers`` is the depth of one trail.

    Raises:
        ValueError: a value lies outside its range; the message names field, value and range.
    """

    model_type = "neurotrails_llama"
    # What Trainer's evaluation would otherwise gather beside the logits, as if it had a row an example.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE, "head_losses"]
    # Llama's plans name the layers of one stack and would leave the heads out.
    base_model_tp_plan = None
    base_model_pp_plan = None

    num_ensemble_heads: int = 3
    blocks_in_head: int | None = None
    ensemble_mode: str = "logits"
    share_embedding: bool = True
    masked_modules: list[str] | None = None
    mask_structure: str = "unstructured"

    def __post_init__(self, **kwargs):
        self._check_sizes()
        if self.blocks_in_head is None:
            depth = self.num_hidden_layers
            self.blocks_in_head = max(1, depth * 2 // 3) if self.share_embedding else depth
        self.masked_modules = [] if self.masked_modules is None else self.masked_modules
        super().__post_init__(**kwargs)
        self.check_heads()

    def _check_sizes(self) -> None:
        # Before LlamaConfig divides by them.
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*names, "num_key_value_heads"):
            value = getattr(self, name)
            if value is None and name == "num_key_value_heads":
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: accepted is a whole number from 1")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"num_attention_heads={heads}: accepted is a divisor of hidden_size={self.hidden_size}")
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads}: accepted is a divisor of num_attention_heads={heads}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r}: accepted are {', '.join(ACT2FN)}")

    def check_heads(self) -> None:
        """Checks the fields of this class, which may have changed since the configuration was made.

        Raises:
            ValueError: a value lies outside its range; the message names field, value and range.
        """
        depth = self.num_hidden_layers
        for name in ("num_ensemble_heads", "blocks_in_head"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted is a whole number")
        if self.num_ensemble_heads < 1:
            raise ValueError(f"num_ensemble_heads={self.num_ensemble_heads}: a model has at least 1 head")
        if not 0 <= self.blocks_in_head <= depth:
            raise ValueError(
                f"blocks_in_head={self.blocks_in_head}: accepted is 0 to num_hidden_layers={depth}, a trail's depth"
            )
        if self.ensemble_mode not in ENSEMBLE_MODES:
            raise ValueError(f"ensemble_mode={self.ensemble_mode!r}: accepted are {', '.join(ENSEMBLE_MODES)}")
        if type(self.share_embedding) is not bool:
            raise ValueError(f"share_embedding={self.share_embedding!r}: accepted are True and False")
        if not isinstance(self.masked_modules, (list, tuple)) or not all(type(p) is str for p in self.masked_modules):
            raise ValueError(f"masked_modules={self.masked_modules!r}: accepted is a list of globs")
        parse_structure(self.mask_structure)
        if not self.share_embedding and self.blocks_in_head != depth:
            raise ValueError(
                f"share_embedding=False with blocks_in_head={self.blocks_in_head}: separate embeddings need heads of "
                f"full depth, blocks_in_head={depth}"
            )

    @property
    def num_backbone_layers(self) -> int:
        """Number of shared blocks."""
        return self.num_hidden_layers - self.blocks_in_head

    @property
    def num_cache_layers(self) -> int:
        """Number of key-value cache slots: the backbone's blocks and those of every head."""
        return self.num_backbone_layers + self.num_ensemble_heads * self.blocks_in_head

    def first_cache_layer(self, head: int) -> int:
        """The key-value cache slot of a head's first block."""
        return self.num_backbone_layers + head * self.blocks_in_head

    def get_text_config(self, decoder=None, encoder=None):
        """As in ``PreTrainedConfig``, but the decoder's view is of one stack, with a layer a cache slot.

        Caches ask for ``get_text_config(decoder=True)``, also of the view itself, and build as many slots as it has
        layers.
        """
        if not decoder:
            return self
        view = copy.copy(self)
        view.__dict__.update(num_hidden_layers=self.num_cache_layers, num_ensemble_heads=1, blocks_in_head=0)
        return view

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} has model_type={model_type!r}: this is no NeuroTrails checkpoint "
                f"(accepted is {cls.model_type!r}); a stock Llama becomes one by "
                "NeuroTrailsLlamaForCausalLM.from_llama(llama)"
            )
        return config_dict, kwargs

    def to_llama_config(self) -> LlamaConfig:
        """The stock configuration of one trail."""
        ours = {
            "num_ensemble_heads",
            "blocks_in_head",
            "ensemble_mode",
            "share_embedding",
            "masked_modules",
            "mask_structure",
        }
        drop = ours | {"model_type", "architectures", "auto_map", "transformers_version"}
        return LlamaConfig(**{key: value for key, value in self.to_dict().items() if key not in drop})


__all__ = ["NeuroTrailsLlamaConfig"]
