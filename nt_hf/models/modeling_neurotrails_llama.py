"""NeuroTrails Llamas: one backbone, several heads, built from the stock Llama blocks.

Masks do not appear in the forward pass: a weight outside its mask is exactly 0 (see the masks module), so the
stock dense modules compute the right thing.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, LlamaForCausalLM
from transformers import initialization as init
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_files import CheckpointFilesMixin
from .configuration_neurotrails_llama import NeuroTrailsLlamaConfig
from .ensemble import (
    NeuroTrailsCausalLMOutput,
    NeuroTrailsModelOutput,
    Uncertainty,
    combine_logits,
    uncertainty,
)
from .forward_arguments import checked_forward, positions_and_mask
from .lm_heads import LMHead, LMHeads, by_head, check_adapters, head_loss, side_by_side, stacked_losses
from .losses import IGNORE_INDEX, HeadByHead, next_tokens
from .masks import attach_masks, full_mask, maskable_modules
from .multi_head import MultiHeadMixin, TokenTablesMixin, keep_heads, select_heads, trainable
from .multi_head_generation import MultiHeadGenerationMixin
from .trails import TrailsMixin
from .transformers_versions import CACHE, either_cache


class NeuroTrailsHead(nn.Module):
    """The last blocks and the final norm of one trail (the LM head lies beside the base model)."""

    def __init__(self, config: NeuroTrailsLlamaConfig, index: int):
        super().__init__()
        first_slot = config.first_cache_layer(index)
        if not config.share_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, first_slot + j) for j in range(config.blocks_in_head))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class NeuroTrailsLlamaPreTrainedModel(CheckpointFilesMixin, TokenTablesMixin, LlamaPreTrainedModel):
    """What the base model and the model with LM heads share."""

    config_class = NeuroTrailsLlamaConfig
    config: NeuroTrailsLlamaConfig
    # Of a checkpoint that is loaded dense, or into layers that a quantiser puts in place of the masked ones.
    _keys_to_ignore_on_load_unexpected = (r"weight_mask$",)

    def __init__(self, config: NeuroTrailsLlamaConfig, heads: Sequence[int] | None = None):
        config.check_heads()
        chosen = select_heads(config, heads, "heads")
        super().__init__(config if heads is None else keep_heads(config, chosen, maskable_names))
        if heads is not None:
            self._source_heads = chosen  # until the weights are loaded, from a checkpoint of all heads

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Reached for a mask that a checkpoint lacks: without this it would stay uninitialised memory.
        if getattr(module, "weight_mask", None) is not None:
            init.copy_(module.weight_mask, full_mask(module.weight.shape, module.weight_mask.device))


class NeuroTrailsLlamaModel(NeuroTrailsLlamaPreTrainedModel):
    """Backbone and heads, without the LM heads."""

    def __init__(self, config: NeuroTrailsLlamaConfig, heads: Sequence[int] | None = None):
        super().__init__(config, heads)
        config = self.config
        if config.share_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_backbone_layers))
        self.heads = nn.ModuleList(NeuroTrailsHead(config, h) for h in range(config.num_ensemble_heads))
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        attach_masks(self, config.masked_modules, prefix="model.", strict=False)

    @checked_forward
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        active_heads: Sequence[int] | None = None,
        backbone_states: torch.FloatTensor | None = None,
        lm_heads: Sequence[nn.Module] | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> NeuroTrailsModelOutput:
        """Runs the backbone once and each active head on its output.

        Args:
            input_ids: ``[batch, seq]``, or ``[active heads, batch, seq]``, a batch for each head, and the backbone runs
                once for each; ``inputs_embeds`` ``[batch, seq, hidden_size]`` replaces it.
            attention_mask, position_ids, cache, use_cache: as in ``LlamaModel``. The cache has one slot a block: the
                backbone's, then head after head.
            active_heads: the heads to run, all by default. A cache may lose heads on the way, never regain them.
            backbone_states: ``[batch, seq, hidden_size]`` of an earlier call over the same positions: the heads start
                from them, the backbone does not run. Replaces ``input_ids``; needs ``share_embedding``.
            lm_heads, labels: the active heads' LM heads, and their next tokens ``[active heads, batch * seq]``: one
                head after another runs forward, into its loss, and backward (see ``HeadByHead``).
            past_key_values: the name of ``cache`` before Transformers 5.24.
        """
        config = self.config
        cache = either_cache(cache, past_key_values)
        if sum(given is not None for given in (input_ids, inputs_embeds, backbone_states)) != 1:
            raise ValueError("exactly one of input_ids, inputs_embeds and backbone_states must be given")
        heads = select_heads(config, active_heads)
        own_batches = input_ids is not None and input_ids.dim() == 3
        if own_batches and (len(input_ids) != len(heads) or attention_mask is not None or use_cache):
            raise ValueError(
                f"input_ids of shape {tuple(input_ids.shape)}, a batch for each head: accepted are [{len(heads)} "
                "active heads, batch, seq] without attention_mask (pad on the right, labels -100) and cache"
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=config)

        embeds = [backbone_states] if backbone_states is not None else self._embed(heads, input_ids, inputs_embeds)
        backbone = self.layers if backbone_states is None else []
        # The cache's slots of blocks that do not run now may hold another number of tokens, so the tokens before this
        # call are counted in the slot of a block that does run.
        slot = 0 if len(backbone) else config.first_cache_layer(heads[0])
        attention_mask, position_ids = positions_and_mask(
            config, embeds[0], attention_mask, position_ids, cache, slot, heads
        )
        position_embeddings = self.rotary_emb(embeds[0], position_ids=position_ids)

        def run(layers: Iterable[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
            for layer in layers:
                hidden = layer(
                    hidden,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    use_cache=use_cache,
                    position_embeddings=position_embeddings,
                    **{CACHE: cache},
                    **kwargs,
                )
            return hidden

        trunk = [run(backbone, embed) for embed in embeds]
        inputs = trunk if len(trunk) == len(heads) else trunk * len(heads)

        def run_head(h: int, states: torch.Tensor) -> torch.Tensor:
            return self.heads[h].norm(run(self.heads[h].layers, states))

        if lm_heads is None:
            return NeuroTrailsModelOutput(
                last_hidden_state=side_by_side(run_head(h, states) for h, states in zip(heads, inputs)),
                backbone_states=trunk[0] if config.share_embedding and not own_batches else None,
                **{CACHE: cache},
            )
        losses = []
        for h, lm_head, states, targets in zip(heads, lm_heads, inputs, labels):

            def loss(states: torch.Tensor, h=h, lm_head=lm_head, targets=targets) -> torch.Tensor:
                return head_loss(lm_head, run_head(h, states).flatten(0, 1), targets.to(states.device))

            losses.append(HeadByHead.apply(loss, states, *trainable(self.heads[h].layers, self.heads[h].norm, lm_head)))
        return NeuroTrailsModelOutput(head_losses=torch.stack(losses), **{CACHE: cache})

    def _embed(
        self, heads: Sequence[int], input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor | None
    ) -> list[torch.Tensor]:
        """The embedded tokens ``[batch, seq, hidden_size]``: one tensor for all heads, or one for each."""
        if inputs_embeds is not None:
            return [inputs_embeds]
        own_batches = input_ids.dim() == 3
        if self.config.share_embedding:
            return list(self.embed_tokens(input_ids)) if own_batches else [self.embed_tokens(input_ids)]
        batches = input_ids if own_batches else [input_ids] * len(heads)
        return [self.heads[h].embed_tokens(ids) for h, ids in zip(heads, batches)]


def maskable_names(config: NeuroTrailsLlamaConfig) -> list[str]:
    with torch.device("meta"):
        return list(maskable_modules(NeuroTrailsLlamaForCausalLM(config)))


class NeuroTrailsLlamaForCausalLM(
    MultiHeadMixin, TrailsMixin, MultiHeadGenerationMixin, NeuroTrailsLlamaPreTrainedModel, GenerationMixin
):
    """A Llama with several heads over one backbone, whose predictions are combined into one."""

    stock_class = LlamaForCausalLM

    def __init__(self, config: NeuroTrailsLlamaConfig, heads: Sequence[int] | None = None):
        super().__init__(config, heads)
        config, heads = self.config, range(self.config.num_ensemble_heads)
        embedding = "model.embed_tokens" if config.share_embedding else "model.heads.{}.embed_tokens"
        self._tied_weights_keys = {f"lm_heads.{h}.weight": f"{embedding.format(h)}.weight" for h in heads}
        self.model = NeuroTrailsLlamaModel(config)
        lm_heads = [LMHead(config.hidden_size, config.vocab_size, bias=False) for _ in heads]
        self.lm_heads = LMHeads(lm_heads, config.ensemble_mode)
        self.vocab_size = config.vocab_size
        self.post_init()
        # After post_init, which ties: a tied weight has one mask, on the embedding.
        attach_masks(self, config.masked_modules)

    @checked_forward
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        active_heads: Sequence[int] | None = None,
        output_head_logits: bool = False,
        output_uncertainty: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> NeuroTrailsCausalLMOutput:
        """Predicts the next token by every active head and their ensemble.

        Args:
            input_ids ... logits_to_keep: as in ``LlamaForCausalLM``. ``labels`` ``[batch, seq]`` are shifted here,
                ``-100`` is ignored. In training mode with labels there is no cache unless ``use_cache=True``.
                In training both may be ``[M, batch, seq]``, a batch for each of the ``M`` active heads.
            active_heads: the heads to use, all by default; loss and ensemble are over these. Without a backbone a
                cache counts its tokens in head 0, which must be among them.
            output_head_logits: also return the heads' logits ``[M, batch, seq, vocab]``.
            output_uncertainty: also return an ``Uncertainty`` over the active heads.
            num_items_in_batch: divide the summed losses by this count (or ``[M]``, one a head) instead of the number
                of labels, which makes gradient accumulation exact.
        """
        heads = select_heads(self.config, active_heads)
        cache = either_cache(cache, past_key_values)
        check_adapters(self)
        # ``generate`` asks a cache for its length by its first slot.
        if (cache is not None or use_cache) and self.config.num_backbone_layers == 0 and 0 not in heads:
            raise ValueError(
                f"active_heads={heads}: without a backbone a cache counts its tokens in head 0, which must be active; "
                "use_cache=False or extract_trail(h) work for any head"
            )
        lm_heads = [self.lm_heads[h] for h in heads]
        wants_logits = labels is None or not self.training or output_head_logits or output_uncertainty
        if input_ids is not None and input_ids.dim() == 3:
            if wants_logits or labels.shape != input_ids.shape:
                raise ValueError(
                    "input_ids with a batch for each head: accepted are labels of the same shape, in training mode, "
                    "without output_head_logits and output_uncertainty: the logits of different texts have no ensemble"
                )
            use_cache = bool(use_cache)  # none unless asked for, and then it is refused
        targets = None if labels is None else next_tokens(labels, len(heads))
        if not (wants_logits or use_cache):
            use_cache = False
            if self._can_run_head_by_head(heads, kwargs):
                kwargs |= {"lm_heads": lm_heads, "labels": targets}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            active_heads=active_heads,
            **kwargs,
        )
        states, head_losses = outputs.last_hidden_state, outputs.head_losses
        if states is not None:
            states = by_head(states, self.config.hidden_size)
        if labels is not None:
            if head_losses is None:
                head_losses = stacked_losses(lm_heads, states, targets)
            count = (targets != IGNORE_INDEX).sum(-1) if num_items_in_batch is None else num_items_in_batch
            head_losses = head_losses / (count.to(head_losses.device) if torch.is_tensor(count) else count)
        logits = head_logits = measures = None
        if wants_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits_of_heads = (lm_head(x[:, keep]) for lm_head, x in zip(lm_heads, states))
            if output_head_logits or output_uncertainty:
                logits_of_heads = list(logits_of_heads)
            logits = combine_logits(logits_of_heads, self.config.ensemble_mode)
            head_logits = torch.stack(logits_of_heads) if output_head_logits else None
            measures = uncertainty(logits_of_heads) if output_uncertainty else None

        return NeuroTrailsCausalLMOutput(
            loss=None if labels is None else head_losses.mean(),
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            head_losses=head_losses,
            head_logits=head_logits,
            uncertainty=measures,
        )

    def _can_run_head_by_head(self, heads: Sequence[int], options: Mapping) -> bool:
        """Whether the gradients of a head may be computed before the next head runs: nobody is to see the graph."""
        parameters = trainable(*(self.model.heads[h] for h in heads), *(self.lm_heads[h] for h in heads))
        asked = (
            options.get(name, getattr(self.config, name)) for name in ("output_hidden_states", "output_attentions")
        )
        return (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and bool(parameters)
            and not any(asked)
            and not self.model.gradient_checkpointing  # which may not be compatible, and saves as much
            and torch.backends.cuda.flash_sdp_enabled()  # see ``LMHead``
            # A hook would run twice, and FSDP2, whose models have this method, wants the passes in their usual order.
            and not hasattr(self, "unshard")
            and not any(p._backward_hooks or hasattr(p, "device_mesh") for p in parameters)
        )


__all__ = [
    "NeuroTrailsCausalLMOutput",
    "NeuroTrailsLlamaForCausalLM",
    "NeuroTrailsLlamaModel",
    "Uncertainty",
    "uncertainty",
]
