"""NeuroTrails Llamas: one backbone, several heads, built from the stock Llama blocks.

Masks do not appear in the forward pass: a weight outside its mask is exactly 0 (see the masks module), so the
stock dense modules compute the right thing.
"""

import copy
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, LlamaForCausalLM
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_neurotrails_llama import ENSEMBLE_MODES, NeuroTrailsLlamaConfig
from .masks import attach_masks, check_masks, full_mask, resize_mask

IGNORE_INDEX = -100
# Positions whose logits exist at one time when a loss is computed. On two CPU cores (2,048 positions, hidden size 256,
# vocabularies of 4,096 and 32,000) 64 takes twice as long as 1024, and more than 1024 gains nothing. The GPU's value is
# a choice of memory, 0.5 GB of fp32 logits at a vocabulary of 32,000, and not measured.
LOSS_CHUNK = {"cpu": 1024, "cuda": 4096}


@dataclass
class NeuroTrailsCausalLMOutput(CausalLMOutputWithPast):
    """Output of ``NeuroTrailsLlamaForCausalLM``.

    Attributes:
        loss: mean of ``head_losses``, a scalar.
        logits: the ensemble's prediction, ``[batch, seq, vocab]``. ``None`` in training mode with labels: the
            loss needs none, and holding them is what limits the batch.
        head_losses: mean next-token cross-entropy of each active head, ``[M]``, in nats.
        head_logits: ``[M, batch, seq, vocab]``, with ``output_head_logits=True``.
        hidden_states: the embedding's output, then each block's: the backbone's, then head after head.
        attentions: of each block, in the same order.
    """

    head_losses: torch.FloatTensor | None = None
    head_logits: torch.FloatTensor | None = None


def combine_logits(logits: Sequence[torch.Tensor], mode: str) -> torch.Tensor:
    """Combines the heads' logits ``[..., vocab]`` into the ensemble's.

    ``"logits"``: their mean. ``"probs"``: log of the mean probability (soft voting); these are normalised.

    Raises:
        ValueError: ``mode`` is neither.
    """
    if mode not in ENSEMBLE_MODES:
        raise ValueError(f"ensemble_mode={mode!r}: accepted are {', '.join(ENSEMBLE_MODES)}")
    if mode == "logits":
        return sum(logits[1:], start=logits[0]) / len(logits)
    total = torch.log_softmax(logits[0].float(), -1)
    for head in logits[1:]:
        total = torch.logaddexp(total, torch.log_softmax(head.float(), -1))
    return total - math.log(len(logits))


def chunked_cross_entropy(
    lm_head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross-entropies of ``lm_head(hidden)``, the logits of only a chunk alive at any time.

    Args:
        lm_head: any callable from ``[n, hidden_size]`` to logits ``[n, vocab]``; its own forward runs, so
            adapters and quantised layers count.
        hidden: ``[n, hidden_size]``.
        labels: ``[n]``, ``-100`` is ignored.
    """

    def piece(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = lm_head(hidden).float()
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    size = LOSS_CHUNK.get(hidden.device.type, 4096)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], size):
        part = hidden[start : start + size], labels[start : start + size]
        # The backward pass computes the chunk's logits again instead of keeping them.
        total = total + (checkpoint(piece, *part, use_reentrant=False) if torch.is_grad_enabled() else piece(*part))
    return total


class LMHead(nn.Linear):
    """An LM head that computes its loss within its own forward.

    Reading ``weight`` from outside would miss what a wrapper (FSDP2, LoRA, quantisation) does around the forward.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of ``hidden`` ``[..., hidden_size]``; with ``labels``, the sum of the cross-entropies."""
        if labels is None:
            return super().forward(hidden)
        fused = getattr(nn.functional, "linear_cross_entropy", None)
        # PyTorch's fused loss rounds its result to the weights' type: too coarse for bf16. And its second derivatives
        # are wrong without a word: who wants some switches fused attention off, which has none either.
        precise = self.weight.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
        if fused is None or not precise or not torch.backends.cuda.flash_sdp_enabled():
            return chunked_cross_entropy(super().forward, hidden, labels)
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK.get(hidden.device.type, 4096))
        return fused(hidden, self.weight, labels, reduction="sum", ignore_index=IGNORE_INDEX, options=options)


class NeuroTrailsHead(nn.Module):
    """The last blocks and the final norm of one trail (the LM head lies beside the base model)."""

    def __init__(self, config: NeuroTrailsLlamaConfig, index: int):
        super().__init__()
        first_slot = config.num_backbone_layers + index * config.blocks_in_head
        if not config.share_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, first_slot + j) for j in range(config.blocks_in_head))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class NeuroTrailsLlamaPreTrainedModel(LlamaPreTrainedModel):
    config_class = NeuroTrailsLlamaConfig
    config: NeuroTrailsLlamaConfig

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Reached for a mask that a checkpoint lacks: without this it would stay uninitialised memory.
        if getattr(module, "weight_mask", None) is not None:
            init.copy_(module.weight_mask, full_mask(module.weight.shape, module.weight_mask.device))

    def get_embeddings(self) -> list[nn.Embedding]:
        """The token embeddings: the shared one, or one a head."""
        model = self.base_model
        return [model.embed_tokens] if self.config.share_embedding else [head.embed_tokens for head in model.heads]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.get_embeddings()[0]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        if not self.config.share_embedding:
            raise NotImplementedError("set_input_embeddings: with share_embedding=False each head has its own")
        self.base_model.embed_tokens = value

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As in ``PreTrainedModel``; a checkpoint that lacks weights or violates its masks is an error.

        Masks that a checkpoint lacks are all ones (dense).

        Raises:
            ValueError: a file is truncated, weights are missing or of another shape, or a weight outside its mask is
                not 0; the message names them.
        """
        path = pretrained_model_name_or_path
        try:
            # Stock, a wrong shape is named in the log only, and masks may be missing.
            model, info = super().from_pretrained(
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # by name: this file imports torch and transformers only
                raise
            raise ValueError(f"{path}: a truncated or damaged weight file: {error}") from error
        if missing := sorted(key for key in info["missing_keys"] if not key.endswith("weight_mask")):
            raise ValueError(
                f"{path} lacks {len(missing)} weights of {cls.__name__}, for example {', '.join(missing[:3])}"
            )
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            name, theirs, ours = sorted(info["mismatched_keys"])[0]
            raise ValueError(
                f"{path} has {len(info['mismatched_keys'])} tensors of another shape than its config asks for, for "
                f"example {name}: {list(theirs)} instead of {list(ours)}"
            )
        if violations := check_masks(model):
            raise ValueError(
                f"{path} has non-zero weights outside their masks in {', '.join(violations)}; a sparse checkpoint "
                "stores exact zeros there (call nt_hf.apply_masks before saving; from_pretrained(..., "
                "masked_modules=[]) gives the masks up)"
            )
        return (model, info) if output_loading_info else model


class NeuroTrailsLlamaModel(NeuroTrailsLlamaPreTrainedModel):
    """Backbone and heads, without the LM heads."""

    def __init__(self, config: NeuroTrailsLlamaConfig):
        config.check_heads()
        super().__init__(config)
        if config.share_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_backbone_layers))
        self.heads = nn.ModuleList(NeuroTrailsHead(config, h) for h in range(config.num_ensemble_heads))
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        attach_masks(self, config.masked_modules, prefix="model.", strict=False)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        active_heads: Sequence[int] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the backbone once and each active head on its output.

        Args:
            input_ids: ``[batch, seq]``; ``inputs_embeds`` ``[batch, seq, hidden_size]`` replaces it.
            attention_mask, position_ids, past_key_values, use_cache: as in ``LlamaModel``. The cache has one slot
                a block: the backbone's, then head after head.
            active_heads: the heads to run, all by default. A cache may lose heads on the way, never regain them.

        Returns:
            ``last_hidden_state`` ``[active heads, batch, seq, hidden_size]`` after each head's final norm, and the
            cache.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        heads = select_heads(config, active_heads)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None and config.num_backbone_layers == 0 and 0 not in heads:
            raise ValueError(
                f"active_heads={heads}: without a backbone a cache counts its tokens in head 0, which must be active; "
                "use_cache=False or extract_trail(h) work for any head"
            )

        if inputs_embeds is not None:
            embeds = [inputs_embeds]
        elif config.share_embedding:
            embeds = [self.embed_tokens(input_ids)]
        else:
            embeds = [self.heads[h].embed_tokens(input_ids) for h in heads]

        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(embeds[0].shape[1], device=embeds[0].device) + seen).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=config,
            inputs_embeds=embeds[0],
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(embeds[0], position_ids=position_ids)

        def run(layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
            for layer in layers:
                hidden = layer(
                    hidden,
                    attention_mask=causal_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    position_embeddings=position_embeddings,
                    **kwargs,
                )
            return hidden

        trunk = [run(self.layers, embed) for embed in embeds]
        inputs = trunk if len(trunk) == len(heads) else trunk * len(heads)
        outputs = [self.heads[h].norm(run(self.heads[h].layers, x)) for h, x in zip(heads, inputs)]
        return BaseModelOutputWithPast(last_hidden_state=torch.stack(outputs), past_key_values=past_key_values)


def select_heads(config: NeuroTrailsLlamaConfig, active_heads: Sequence[int] | None) -> list[int]:
    """The heads to run, in order; raises ``ValueError`` for an empty or impossible choice."""
    if active_heads is None:
        return list(range(config.num_ensemble_heads))
    try:
        heads = [operator.index(head) for head in active_heads]
    except TypeError:
        heads = []
    if not heads or len(set(heads)) < len(heads) or not all(0 <= h < config.num_ensemble_heads for h in heads):
        raise ValueError(
            f"active_heads={active_heads!r}: accepted are one or more different heads of 0 to "
            f"{config.num_ensemble_heads - 1}"
        )
    return heads


class NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaPreTrainedModel, GenerationMixin):
    """A Llama with several heads over one backbone, whose predictions are combined into one."""

    def __init__(self, config: NeuroTrailsLlamaConfig):
        super().__init__(config)
        heads = range(config.num_ensemble_heads)
        embedding = "model.embed_tokens" if config.share_embedding else "model.heads.{}.embed_tokens"
        self._tied_weights_keys = {f"lm_heads.{h}.weight": f"{embedding.format(h)}.weight" for h in heads}
        self.model = NeuroTrailsLlamaModel(config)
        self.lm_heads = nn.ModuleList(LMHead(config.hidden_size, config.vocab_size, bias=False) for _ in heads)
        self.vocab_size = config.vocab_size
        self.post_init()
        # After post_init, which ties: a tied weight has one mask, on the embedding.
        attach_masks(self, config.masked_modules)

    def get_output_embeddings(self) -> nn.Module:
        """The first head's LM head; ``lm_heads`` holds them all."""
        return self.lm_heads[0]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if len(self.lm_heads) > 1:
            raise NotImplementedError("set_output_embeddings: a model with several heads has several; set lm_heads")
        self.lm_heads[0] = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        active_heads: Sequence[int] | None = None,
        output_head_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> NeuroTrailsCausalLMOutput:
        """Predicts the next token by every active head and their ensemble.

        Args:
            input_ids ... logits_to_keep: as in ``LlamaForCausalLM``. ``labels`` ``[batch, seq]`` are shifted here,
                ``-100`` is ignored.
            active_heads: the heads to use, all by default; loss and ensemble are over these.
            output_head_logits: also return the heads' logits ``[M, batch, seq, vocab]``.
            num_items_in_batch: divide the summed losses by this count instead of the number of labels, which
                makes gradient accumulation exact.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            active_heads=active_heads,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        lm_heads = [self.lm_heads[h] for h in select_heads(self.config, active_heads)]

        loss = head_losses = logits = head_logits = None
        if labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten().to(hidden.device)
            count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
            if torch.is_tensor(count):
                count = count.to(hidden.device)
            head_losses = torch.stack([head_loss(m, x.flatten(0, 1), targets) for m, x in zip(lm_heads, hidden)])
            head_losses = head_losses / count
            loss = head_losses.mean()
        if labels is None or not self.training or output_head_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            each = [lm_head(x[:, keep]) for lm_head, x in zip(lm_heads, hidden)]
            logits = combine_logits(each, self.config.ensemble_mode)
            head_logits = torch.stack(each) if output_head_logits else None

        return NeuroTrailsCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            head_losses=head_losses,
            head_logits=head_logits,
        )

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        # The stock method resizes one embedding and one LM head; here every head has its own.
        for embedding in self.get_embeddings():
            self._get_resized_embeddings(embedding, new_num_tokens, pad_to_multiple_of, mean_resizing)  # in place
            resize_mask(embedding)
        rows = self.get_input_embeddings().weight.shape[0]
        for lm_head in self.lm_heads:
            # A new module, or the old one where a tied weight has been resized already.
            resized = self._get_resized_lm_head(lm_head, rows, mean_resizing=mean_resizing)
            lm_head.weight = resized.weight.requires_grad_(lm_head.weight.requires_grad)
            lm_head.out_features = rows
            resize_mask(lm_head)
        return self.get_input_embeddings()

    @classmethod
    def from_llama(
        cls,
        llama: LlamaForCausalLM,
        *,
        num_ensemble_heads: int = 3,
        blocks_in_head: int | None = None,
        ensemble_mode: str = "logits",
        share_embedding: bool = True,
        masked_modules: Sequence[str] = (),
    ) -> "NeuroTrailsLlamaForCausalLM":
        """A NeuroTrails Llama whose every trail is a copy of ``llama``; the masks, if any, are all ones.

        Identical heads stay identical in training until their masks differ: draw masks before training on.
        """
        stock = {key: value for key, value in llama.config.to_dict().items() if key != "model_type"}
        config = NeuroTrailsLlamaConfig(
            **stock,
            num_ensemble_heads=num_ensemble_heads,
            blocks_in_head=blocks_in_head,
            ensemble_mode=ensemble_mode,
            share_embedding=share_embedding,
            masked_modules=list(masked_modules),
        )
        config.architectures = None
        config._attn_implementation = llama.config._attn_implementation
        model = cls(config).to(llama.device)
        for head in range(num_ensemble_heads):
            for ours, theirs in model._trail(head, llama):
                _copy_tensors(theirs, ours, names=_tensors(theirs))
        model.generation_config = copy.deepcopy(llama.generation_config)
        return model.train(llama.training)

    def extract_trail(self, head: int) -> LlamaForCausalLM:
        """The stock ``LlamaForCausalLM`` of one trail, its weights copied."""
        (head,) = select_heads(self.config, [head])
        config = self.config.to_llama_config()
        config._attn_implementation = self.config._attn_implementation
        llama = LlamaForCausalLM(config).to(self.device)
        for ours, theirs in self._trail(head, llama):
            _copy_tensors(ours, theirs, names=_tensors(theirs))
        llama.generation_config = copy.deepcopy(self.generation_config)
        return llama.train(self.training)

    def _trail(self, head: int, llama: LlamaForCausalLM) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of corresponding modules: one trail's and the stock Llama's, which lacks the masks alone."""
        body = self.model.heads[head]
        embedding = self.model.embed_tokens if self.config.share_embedding else body.embed_tokens
        return [
            (embedding, llama.model.embed_tokens),
            (self.model.rotary_emb, llama.model.rotary_emb),
            *zip([*self.model.layers, *body.layers], llama.model.layers),
            (body.norm, llama.model.norm),
            (self.lm_heads[head], llama.lm_head),
        ]


def head_loss(lm_head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of one head; ``hidden`` ``[n, hidden_size]``, ``labels`` ``[n]``."""
    if isinstance(lm_head, LMHead):
        return lm_head(hidden, labels)
    # Replaced by an adapter or a quantised layer, which only computes logits.
    return chunked_cross_entropy(lm_head, hidden, labels)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _copy_tensors(source: nn.Module, target: nn.Module, names: Iterable[str]) -> None:
    """Copies parameters and buffers, each in its own dtype.

    ``Module.to(dtype)`` would also round the frequencies of the rotary embedding, which stay in fp32 when a model is
    loaded in bf16, and the state dict lacks them.
    """
    source, target = _tensors(source), _tensors(target)
    for name in names:
        target[name].data = source[name].detach().clone()


__all__ = ["NeuroTrailsCausalLMOutput", "NeuroTrailsLlamaForCausalLM", "NeuroTrailsLlamaModel"]
