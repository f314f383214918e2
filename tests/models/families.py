"""Tiny models of stock families, and what a multi-head model of each is held against: its trails' own stock models."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nt_hf.models.modeling_neurotrails import causal_lm_class

#: Weights of the largest model that counts as tiny.
MOST_WEIGHTS = 3_000_000
DEPTH, HEADS, BLOCKS_IN_HEAD, VOCABULARY = 5, 3, 2, 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "ffn_hidden_size": 48, "n_inner": 48, "rotary_dim": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "q_lora_rank": 16,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "attention_dropout": 0.0, "residual_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "hidden_dropout": 0.0, "classifier_dropout": 0.0, "embedding_dropout": 0.0,
    "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
}  # fmt: skip
#: Windows shorter than the text, logits that are scaled or capped, layers of different kinds.
SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {
        "sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0]},
    "phi3": {"sliding_window": 6},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 6},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    "glm4_moe_lite": {"head_dim": 4, "num_key_value_heads": 4},
    "axk1": {"head_dim": 4, "num_key_value_heads": 4},
    "minicpm3": {"head_dim": 4, "num_key_value_heads": 4},
    "sarvam_mla": {"head_dim": 4, "num_key_value_heads": 4},
    "youtu": {"head_dim": 4, "num_key_value_heads": 4},
    "ctrl": {"n_embd": 32, "dff": 48, "n_positions": 128},
    "falcon": {"num_kv_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]], "window_size": 6},
}  # fmt: skip


def known_fields(family: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Of wanted values of a configuration's fields those that a stock family has; of two names for one, its own."""
    default = AutoConfig.for_model(family)
    aliases = {name for name, own in default.attribute_map.items() if own in wanted}
    known = {*default.to_dict(), *default.attribute_map, *vars(default), "num_labels"} - {"sub_configs"} - aliases
    return {name: value for name, value in wanted.items() if name in known}


def refuse_large(kind: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that the sizes meant to make a tiny one do not."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in kind(config).parameters())
    if weights > MOST_WEIGHTS:
        family = config.stock_class.model_type
        raise ValueError(f"{family}: {weights:,} weights, SIZES do not make it tiny")


def tiny_config(family: str, **fields) -> PreTrainedConfig:
    """A small configuration of a stock family; ``fields`` replace some of its."""
    return AutoConfig.for_model(family, **known_fields(family, {**SIZES, **SETTINGS.get(family, {}), **fields}))


def tiny_model(family: str, seed: int = 1, stock_fields: dict | None = None, **fields) -> PreTrainedModel:
    """A multi-head model of random weights, all of which count, and without dropout."""
    stock = tiny_config(family, **(stock_fields or {}))
    kind = causal_lm_class(stock)
    fields = {"num_ensemble_heads": HEADS, "blocks_in_head": BLOCKS_IN_HEAD, **fields}
    config = kind.config_class.from_stock_config(stock, **fields)
    refuse_large(kind, config)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.dim() > 1 else 0.5))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tokens(batch: int = 2, length: int = 17, seed: int = 0) -> torch.LongTensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(length: int = 17, padding: int = 5) -> dict[str, torch.Tensor]:
    """Two rows of tokens, the first with padding on the left; positions start after it."""
    ids = tokens(length=length)
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@dataclasses.dataclass
class Parity:
    """How far a multi-head model is from the stock models of its trails.

    Attributes:
        logits: largest difference of a logit, as a share of the largest logit.
        losses: largest difference of a head's loss.
        uncached, static, trail, padded: whether greedy tokens with a growing cache are those without one, those with a
            static cache, those of the trail's own stock model (of one head alone), and those of the row by itself.
    """

    logits: float
    losses: float
    uncached: bool
    static: bool
    trail: bool
    padded: bool

    @property
    def exact(self) -> bool:
        """Whether nothing differs but the last digits of losses, which are about 10 and summed in another order."""
        same = self.uncached and self.static and self.trail and self.padded
        return self.logits == 0 and self.losses < 3e-6 and same


@torch.no_grad()
def parity(model: PreTrainedModel) -> Parity:
    """Compares each trail with its stock model.

    Raises:
        ArithmeticError: a value is not finite, so nothing was compared.
    """
    batch = left_padded()
    attended = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~attended, -100)
    together = model(**batch, output_head_logits=True, use_cache=False).head_logits
    losses = model.train()(**batch, labels=labels).head_losses
    model.eval()
    worst = worst_loss = 0.0
    for head in range(model.config.num_ensemble_heads):
        logits = model.extract_trail(head)(**batch, use_cache=False).logits
        scale = logits[attended].abs().max().item()
        gap = (logits - together[head])[attended].abs().max().item()
        alone = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()).item()
        loss_gap = abs(alone - losses[head].item())
        # ``max`` would pass a value over that is not a number.
        if not (math.isfinite(gap) and math.isfinite(loss_gap) and scale > 0):
            raise ArithmeticError(f"logits up to {scale}, difference {gap}, of the loss {loss_gap}")
        worst, worst_loss = max(worst, gap / scale), max(worst_loss, loss_gap)
    return Parity(worst, worst_loss, *_generates_alike(model))


def _generates_alike(model: PreTrainedModel) -> tuple[bool, bool, bool, bool]:
    batch = left_padded()
    del batch["position_ids"]

    def greedy(model: PreTrainedModel, rows: slice = slice(None), **options) -> torch.Tensor:
        inputs = {name: values[rows] for name, values in batch.items()}
        return model.generate(
            **inputs, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **options
        )

    cached = greedy(model)
    # A full ensemble counts the tokens in a cache by its first head.
    head, alone = min(1, model.config.num_backbone_layers), slice(1, 2)
    trail = model.extract_trail(head)
    return (
        torch.equal(cached, greedy(model, use_cache=False)),
        torch.equal(cached, greedy(model, cache_implementation="static", disable_compile=True)),
        torch.equal(greedy(model, active_heads=[head]), greedy(trail)),
        torch.equal(greedy(model, alone), cached[alone]),
    )


def families_of(names: Iterable[str]) -> list[str]:
    """Those of some ``model_type`` that Transformers has configurations of, each class of models once."""
    return sorted({CONFIG_MAPPING[x]: x for x in sorted(names, reverse=True) if x in CONFIG_MAPPING}.values())


def all_families() -> list[str]:
    """The ``model_type`` of every decoder that Transformers knows."""
    return families_of(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def outcome(family: str) -> Parity | str:
    """What became of a family: how far its trails are from stock models, or the line that refuses it.

    Raises:
        Exception: neither: the family is wrong, or fails in a way of its own.
    """
    try:
        causal_lm_class(CONFIG_MAPPING[family])
    except ValueError as error:
        return str(error)
    tiny_config(family)
    try:
        model = tiny_model(family)
    except NotImplementedError as error:
        return str(error)
    return parity(model)
