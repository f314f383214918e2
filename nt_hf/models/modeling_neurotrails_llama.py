"""NeuroTrails Llamas: one backbone, several heads, built from the stock Llama blocks.

Masks do not appear in the forward pass: a weight outside its mask is exactly 0 (see the masks module), so the
stock dense modules compute the right thing.
"""

import copy
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, LlamaForCausalLM
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_neurotrails_llama import NeuroTrailsLlamaConfig
from .ensemble import (
    NeuroTrailsCausalLMOutput,
    NeuroTrailsModelOutput,
    Uncertainty,
    UncertaintyRecorder,
    combine_logits,
    uncertainty,
)
from .lm_heads import LMHead, LMHeads, by_head, check_adapters, head_loss, side_by_side
from .losses import IGNORE_INDEX, HeadByHead
from .masks import (
    attach_masks,
    check_masks,
    check_state_dict,
    full_mask,
    maskable_modules,
    matches,
    resize_mask,
)
from .sparse_checkpoint import SparseWeight, compress_state_dict, read_tensors
from .speculative import generate_speculatively
from .transformers_versions import CACHE, either_cache

logger = logging.get_logger(__name__)

# What Transformers hands through a forward pass, and token types, which some tokenizers return for every model.
_HANDED_THROUGH = {*TransformersKwargs.__annotations__, "token_type_ids"}
# The ways of generating that trails can draft for.
SPECULATIVE_MODES = ("greedy_search", "sample")
# The ways of generating whose steps are the forward passes that the tokens were drawn from.
RECORDED_MODES = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")


def _checked_forward(forward: Callable) -> Callable:
    """A model's ``forward`` that refuses arguments which it would otherwise drop, and returns a tuple where asked to.

    ``output_hidden_states`` may be indices of the hidden states to return, the others are ``None``; releases of
    Transformers differ in how they count them, all by the depth of a trail, so the choice is made here.
    """
    parameters = inspect.signature(forward).parameters
    known = parameters.keys() | _HANDED_THROUGH | {"return_dict"}

    @functools.wraps(forward)
    def checked(self, *args, **kwargs):
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(
                f"{type(self).__name__}.forward got an unknown argument {', '.join(unknown)}; accepted are "
                f"{', '.join([name for name in parameters if name not in ('self', 'kwargs')])}, and of Transformers "
                f"{', '.join(sorted(_HANDED_THROUGH))}"
            )
        return_dict = kwargs.pop("return_dict", None)
        chosen = kwargs.get("output_hidden_states")
        if chosen and not isinstance(chosen, bool):
            kwargs["output_hidden_states"] = True
        outputs = forward(self, *args, **kwargs, return_dict=True)
        if chosen and not isinstance(chosen, bool):
            count = len(outputs.hidden_states)
            wanted = {i % count for i in ([chosen] if isinstance(chosen, int) else chosen) if -count <= i < count}
            outputs.hidden_states = tuple(x if i in wanted else None for i, x in enumerate(outputs.hidden_states))
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    return checked


class NeuroTrailsHead(nn.Module):
    """The last blocks and the final norm of one trail (the LM head lies beside the base model)."""

    def __init__(self, config: NeuroTrailsLlamaConfig, index: int):
        super().__init__()
        first_slot = config.first_cache_layer(index)
        if not config.share_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, first_slot + j) for j in range(config.blocks_in_head))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class NeuroTrailsLlamaPreTrainedModel(LlamaPreTrainedModel):
    config_class = NeuroTrailsLlamaConfig
    config: NeuroTrailsLlamaConfig
    # Of a checkpoint that is loaded dense, or into layers that a quantiser puts in place of the masked ones.
    _keys_to_ignore_on_load_unexpected = (r"weight_mask$",)

    def __init__(self, config: NeuroTrailsLlamaConfig, heads: Sequence[int] | None = None):
        config.check_heads()
        chosen = select_heads(config, heads, "heads")
        super().__init__(config if heads is None else keep_heads(config, chosen))
        if heads is not None:
            self._source_heads = chosen  # until the weights are loaded, from a checkpoint of all heads

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

    def enable_input_require_grads(self) -> None:
        """As in ``PreTrainedModel``, for the embeddings of all heads."""
        self._require_grads_hooks = [
            embedding.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
            for embedding in self.get_embeddings()
        ]
        self._require_grads_hook = self._require_grads_hooks[0]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        if not self.config.share_embedding:
            raise NotImplementedError("set_input_embeddings: with share_embedding=False each head has its own")
        self.base_model.embed_tokens = value

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        heads: Sequence[int] | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As in ``PreTrainedModel``; a checkpoint that lacks weights or violates its masks is an error.

        Masks that a checkpoint lacks are all ones (dense). Sparse checkpoints load like dense ones.

        Args:
            heads: the heads to load, all by default. Head ``heads[i]`` of the checkpoint becomes head ``i`` of a model
                of ``len(heads)`` heads; the weights of the others are not read.

        Raises:
            ValueError: ``heads`` is no choice of the checkpoint's heads, a file is truncated, weights are missing or of
                another shape, a sparse weight lacks values, or a weight outside its mask is not 0; the message names
                them.
        """
        path = pretrained_model_name_or_path
        if heads is not None:
            kwargs["heads"] = heads  # Transformers hands on to ``__init__`` what is no key of the config
        try:
            # Stock, a wrong shape is named in the log only, and masks may be missing.
            model, info = super().from_pretrained(
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # by name: this file imports torch and transformers only
                raise
            raise ValueError(f"{path}: a truncated or damaged weight file: {error}") from error
        if hasattr(model, "_source_heads"):
            raise ValueError(
                f"heads={heads!r}: {path} holds no safetensors files; single heads are read from these only"
            )
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
        expanded = vars(model).pop("_expanded", ())
        if violations := check_masks(model, known=() if info["mismatched_keys"] else expanded):
            raise ValueError(
                f"{path} has non-zero weights outside their masks ({_some(violations)}): it was trained, or adapters "
                "were merged, without the masks. from_pretrained(..., masked_modules=[]) loads the weights as they "
                "are, dense. To keep the masks, train with nt_hf.freeze_topology; nt_hf.apply_masks before saving "
                "sets the weights outside to 0, which undoes a part of the training"
            )
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs):
        # Called when the files are found, and downloaded. Transformers reads the tensors of a state dict one by one, so
        # the weights of a sparse checkpoint are expanded one by one, and those of other heads not read at all.
        tensors = state_dict or {}
        if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            tensors = read_tensors(checkpoint_files)
        heads = vars(model).pop("_source_heads", None) if tensors else None
        if heads is not None:
            numbers = {old: new for new, old in enumerate(heads)}
            renamed = ((renumber_head(name, numbers), tensor) for name, tensor in tensors.items())
            tensors = {name: tensor for name, tensor in renamed if name is not None}
        expanded = {name for name, tensor in tensors.items() if isinstance(tensor, SparseWeight)}
        if heads is None and not expanded:
            tensors = state_dict
        else:
            checkpoint_files = None  # weights that are offloaded to the disk would be looked up in them
            model._expanded = expanded  # these are 0 outside their masks
        return LlamaPreTrainedModel._load_pretrained_model(model, tensors, checkpoint_files, load_config, **kwargs)

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, state_dict=None, *args, sparse: bool = False, **kwargs
    ):
        """As in ``PreTrainedModel``; with ``sparse=True`` only the active values of masked weights are stored.

        ``from_pretrained`` needs no option to load them, bit for bit. See the sparse_checkpoint module for the format.

        Raises:
            ValueError: with ``sparse=True``, the model has no masks, a weight outside its mask is not 0, or weights are
                offloaded; nothing is written.
        """
        if state_dict is None and (own := self._untied_copies()):
            state_dict = self.state_dict() | own
        if sparse:
            tensors = dict(self.state_dict() if state_dict is None else state_dict)
            # First, as only an owner has a mask: later the owner's weight shares memory with nothing any more.
            state_dict = compress_state_dict(remove_tied_weights_from_state_dict(tensors, self))
        elif violations := check_masks(self) if state_dict is None else check_state_dict(state_dict):
            logger.warning(
                "%s: weights outside their masks are not 0 (%s), and from_pretrained refuses this checkpoint unless "
                "it is told masked_modules=[], which makes it dense. nt_hf.freeze_topology(model, optimizer) keeps the "
                "masks in training; adapters that are merged into masked weights make them dense",
                save_directory, _some(violations),
            )  # fmt: skip
        if self._auto_class is not None:
            # Transformers adds the class that is saved; the base model is in the same file.
            base = f"{type(self).__module__.split('.')[-1]}.{NeuroTrailsLlamaModel.__name__}"
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": base}
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def _untied_copies(self) -> dict[str, torch.Tensor]:
        """Makes the configuration say whether LM heads and embeddings share weights; copies of what only seems to.

        PEFT replaces weights by merged copies, and looks at one LM head to tell whether they are still tied. LM heads
        that share a weight among themselves, but not with the embedding, are written one by one.
        """
        heads, embeddings = getattr(self, "lm_heads", []), self.get_embeddings()
        pairs = [(head, embeddings[h if len(embeddings) > 1 else 0]) for h, head in enumerate(heads)]
        if not pairs or not all(hasattr(module, "weight") for pair in pairs for module in pair):
            return {}
        self.config.tie_word_embeddings = tied = all(head.weight is table.weight for head, table in pairs)
        if tied or len({id(head.weight) for head in heads}) == len(heads):
            return {}
        return {f"lm_heads.{h}.weight": head.weight.detach().clone() for h, head in enumerate(heads)}


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

    @_checked_forward
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

        if backbone_states is not None:
            embeds = [backbone_states]
        elif inputs_embeds is not None:
            embeds = [inputs_embeds]
        elif config.share_embedding:
            embeds = list(self.embed_tokens(input_ids)) if own_batches else [self.embed_tokens(input_ids)]
        else:
            each = input_ids if own_batches else [input_ids] * len(heads)
            embeds = [self.heads[h].embed_tokens(ids) for h, ids in zip(heads, each)]
        backbone = self.layers if backbone_states is None else []

        # Slots of blocks that do not run may hold fewer or more tokens: those before this call are counted in one
        # that does.
        slot = 0 if len(backbone) else config.first_cache_layer(heads[0])
        seen = cache.get_seq_length(slot) if cache is not None else 0
        fresh = cache is None or (type(cache) is DynamicCache and seen == 0)
        if config.blocks_in_head and type(cache) is DynamicCache:
            for h in heads:
                if (held := cache.get_seq_length(config.first_cache_layer(h))) != seen:
                    raise ValueError(
                        f"the cache holds {held} tokens in head {h} and {seen} before it: accepted is a cache of the "
                        f"same heads, with {config.num_cache_layers} layers (PEFT's PrefixTuningConfig takes "
                        "num_layers=model.config.num_cache_layers)"
                    )
        # Transformers keeps packed sequences apart where there is neither a cache nor a mask. A cache that holds
        # nothing changes nothing; a mask is made part of the positions.
        mask_positions = position_ids
        if position_ids is None:
            position_ids = (torch.arange(embeds[0].shape[1], device=embeds[0].device) + seen).unsqueeze(0)
        elif fresh and attention_mask is not None and attention_mask.dim() == 2:
            attention_mask, mask_positions = split_packed(attention_mask, position_ids)
        causal_mask = create_causal_mask(
            config=config,
            inputs_embeds=embeds[0],
            attention_mask=attention_mask,
            position_ids=mask_positions,
            layer_idx=slot,
            **{CACHE: None if fresh else cache},
        )
        position_embeddings = self.rotary_emb(embeds[0], position_ids=position_ids)

        def run(layers: Iterable[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
            for layer in layers:
                hidden = layer(
                    hidden,
                    attention_mask=causal_mask,
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

            losses.append(
                HeadByHead.apply(loss, states, *_trainable(self.heads[h].layers, self.heads[h].norm, lm_head))
            )
        return NeuroTrailsModelOutput(head_losses=torch.stack(losses), **{CACHE: cache})


def split_packed(
    attention_mask: torch.Tensor, position_ids: torch.LongTensor
) -> tuple[torch.Tensor | None, torch.LongTensor]:
    """Mask and positions by which Transformers keeps packed sequences apart although a mask is given.

    It finds them where positions do not go on by one, and only without a mask. Where a row holds several sequences the
    positions, for this purpose alone, jump wherever the mask changes, too, and the mask is not needed any more.

    Args:
        attention_mask: ``[batch, seq]``, 0 for padding.
        position_ids: ``[batch or 1, seq]``.
    """
    attended = attention_mask.bool()
    if attended.shape[1] != position_ids.shape[-1]:
        return attention_mask, position_ids
    both = attended[:, 1:] & attended[:, :-1]
    jumps = position_ids.diff(dim=-1) != 1
    if not torch.compiler.is_compiling() and not (jumps & both).any():
        return attention_mask, position_ids
    changes = torch.nn.functional.pad(attended[:, 1:] != attended[:, :-1], (1, 0)).cumsum(-1)
    return None, position_ids + changes * (position_ids.max() + 2)


def _trainable(*modules: nn.Module) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def select_heads(config: NeuroTrailsLlamaConfig, choice: Sequence[int] | None, name: str = "active_heads") -> list[int]:
    """The chosen heads, in order; raises ``ValueError``, by the argument's ``name``, for an impossible choice."""
    if choice is None:
        return list(range(config.num_ensemble_heads))
    try:
        heads = [operator.index(head) for head in choice]
    except TypeError:
        heads = []
    if not heads or len(set(heads)) < len(heads) or not all(0 <= h < config.num_ensemble_heads for h in heads):
        raise ValueError(
            f"{name}={choice!r}: accepted are one or more different heads of 0 to {config.num_ensemble_heads - 1}"
        )
    return heads


def renumber_head(name: str, numbers: Mapping[int, int]) -> str | None:
    """A parameter's name with its head's number replaced; ``None`` where the head has no new one."""
    match = re.match(r"((?:model\.)?heads\.|lm_heads\.)(\d+)(\..*)", name)
    if match is None:
        return name
    start, number, rest = match.groups()
    return f"{start}{numbers[int(number)]}{rest}" if int(number) in numbers else None


def keep_heads(config: NeuroTrailsLlamaConfig, heads: Sequence[int]) -> NeuroTrailsLlamaConfig:
    """The configuration of a model of these heads alone, in this order; the same weights of theirs carry masks.

    ``masked_modules`` loses the globs that fit nothing any more, and gains the names of weights that the others would
    choose, or not choose, by their new numbers alone.
    """
    numbers = dict(enumerate(heads))
    kept = copy.deepcopy(config)
    kept.num_ensemble_heads, kept.masked_modules = len(numbers), []
    with torch.device("meta"):
        names = list(maskable_modules(NeuroTrailsLlamaForCausalLM(kept)))
    masked = {name: matches(renumber_head(name, numbers), config.masked_modules) for name in names}
    globs = [glob for glob in config.masked_modules if any(matches(name, [glob.removeprefix("!")]) for name in names)]
    corrections = [name if chosen else f"!{name}" for name, chosen in masked.items() if matches(name, globs) != chosen]
    kept.masked_modules = globs + corrections
    return kept


class NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaPreTrainedModel, GenerationMixin):
    """A Llama with several heads over one backbone, whose predictions are combined into one."""

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

    def get_output_embeddings(self) -> nn.Module:
        """The LM head, of several heads ``lm_heads``, which stand for one (see ``LMHeads``)."""
        return self.lm_heads if len(self.lm_heads) > 1 else self.lm_heads[0]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if len(self.lm_heads) == 1 and not isinstance(new_embeddings, LMHeads):
            self.lm_heads[0] = new_embeddings
        elif isinstance(new_embeddings, LMHeads) and len(new_embeddings) == len(self.lm_heads):
            self.lm_heads = new_embeddings
        else:
            raise NotImplementedError(
                f"set_output_embeddings({type(new_embeddings).__name__}): accepted are LMHeads of "
                f"{len(self.lm_heads)} LM heads; a single one is set by lm_heads[h] = ..."
            )

    @_checked_forward
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
        if "peft_config" in vars(self) and not torch.compiler.is_compiling():
            self._check_adapters_once()
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
        targets = None
        if labels is not None:
            targets = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX).flatten(-2)
            if targets.dim() == 1:
                targets = targets.expand(len(heads), -1)
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
        hidden = None
        if outputs.last_hidden_state is not None:
            hidden = by_head(outputs.last_hidden_state, self.config.hidden_size)

        loss = head_losses = logits = head_logits = measures = None
        if labels is not None:
            head_losses = outputs.head_losses
            if head_losses is None:
                targets = targets.to(hidden.device)
                each = [head_loss(m, x.flatten(0, 1), y) for m, x, y in zip(lm_heads, hidden, targets)]
                head_losses = torch.stack(each)
            count = (targets != IGNORE_INDEX).sum(-1) if num_items_in_batch is None else num_items_in_batch
            head_losses = head_losses / (count.to(head_losses.device) if torch.is_tensor(count) else count)
            loss = head_losses.mean()
        if wants_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            each = (lm_head(x[:, keep]) for lm_head, x in zip(lm_heads, hidden))
            if output_head_logits or output_uncertainty:
                each = list(each)
            logits = combine_logits(each, self.config.ensemble_mode)
            head_logits = torch.stack(each) if output_head_logits else None
            measures = uncertainty(each) if output_uncertainty else None

        return NeuroTrailsCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            head_losses=head_losses,
            head_logits=head_logits,
            uncertainty=measures,
        )

    def _check_adapters_once(self) -> None:
        adapters = sorted(self.peft_config)
        if vars(self).get("_checked_adapters") != adapters:
            check_adapters(self)
            self._checked_adapters = adapters

    def _can_run_head_by_head(self, heads: Sequence[int], options: Mapping) -> bool:
        """Whether the gradients of a head may be computed before the next head runs: nobody is to see the graph."""
        parameters = _trainable(*(self.model.heads[h] for h in heads), *(self.lm_heads[h] for h in heads))
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

    def generate(
        self,
        inputs=None,
        generation_config=None,
        *args,
        output_uncertainty: bool = False,
        trail_draft: int | None = None,
        **kwargs,
    ):
        """As in ``GenerationMixin``, and with two things of its own.

        Args:
            output_uncertainty: the output has an ``uncertainty``: an ``Uncertainty`` ``[sequences, new tokens]`` of the
                distributions that each new token was chosen by, before temperature and other processing of the
                logits. The padding after a sequence's end has NaN.
            trail_draft: the head whose trail drafts several tokens before the other heads verify them together. The
                output is the same, by greedy decoding token for token, by sampling in distribution, and comes sooner.
                With ``return_dict_in_generate=True`` the output has a ``speculation``, which counts accepted drafts.

        Raises:
            ValueError: ``output_uncertainty=True`` without ``return_dict_in_generate=True``, or for a way of generating
                other than greedy, sampling, beam search and assisted decoding; ``trail_draft`` that is no active head,
                for another way of generating than greedy and sampling, or without a ``DynamicCache``;
                ``assistant_early_exit``.
        """
        given = generation_config or self.generation_config
        early_exit = kwargs.get("assistant_early_exit", given.assistant_early_exit)
        if early_exit is not None:
            raise ValueError(
                f"assistant_early_exit={early_exit}: the first blocks of several heads are no model; accepted is "
                "trail_draft=<head>, which drafts with one trail"
            )
        if not output_uncertainty and trail_draft is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        config, _ = self._prepare_generation_config(generation_config, **kwargs)
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        other = kwargs.get("custom_generate") or config.token_healing or config.cache_implementation == "paged"
        if trail_draft is not None:
            heads = select_heads(self.config, kwargs.get("active_heads"))
            if type(trail_draft) is not int or trail_draft not in heads:
                raise ValueError(f"trail_draft={trail_draft!r}: accepted is one of the active heads {heads}")
            if other or mode not in SPECULATIVE_MODES:
                raise ValueError(
                    f"trail_draft={trail_draft} with generation mode {mode.value!r}: accepted are "
                    f"{', '.join(SPECULATIVE_MODES)}, without custom_generate, token_healing and a paged cache"
                )
            kwargs["trail_draft"] = trail_draft
        if not output_uncertainty:
            return super().generate(inputs, generation_config, *args, **kwargs)
        if not config.return_dict_in_generate:
            value = config.return_dict_in_generate
            raise ValueError(f"return_dict_in_generate={value!r} with output_uncertainty=True: accepted is True")
        if other or mode not in RECORDED_MODES:
            raise ValueError(
                f"output_uncertainty=True with generation mode {mode.value!r}: accepted are "
                f"{', '.join(RECORDED_MODES)}, without custom_generate, token_healing and a paged cache"
            )
        recorder = UncertaintyRecorder()
        # Of a prompt only the last position counts: a step's measures begin with the first new token's.
        kwargs |= {"output_uncertainty": recorder, "logits_to_keep": 1}
        outputs = super().generate(inputs, generation_config, *args, **kwargs)
        if "beam_indices" in outputs:
            rows = outputs.beam_indices.long()
        else:
            prompt = inputs if inputs is not None else kwargs.get("input_ids")
            # Without a prompt generation starts from one token, from embeddings the sequences hold new tokens only.
            width = prompt.shape[1] if prompt is not None else int(kwargs.get("inputs_embeds") is None)
            tokens = outputs.sequences[:, width:]
            rows = torch.arange(len(tokens), device=tokens.device)[:, None]
            rows = rows.where(~_is_padding(tokens, config.eos_token_id, config.pad_token_id), -1)
        outputs["uncertainty"] = recorder.select(rows)
        return outputs

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: a paged cache has one slot a block of a single stack (``generate_batch`` and servers call this).

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "continuous batching, generate_batch: accepted are generate with padded prompts, or a trail of its own, "
            "extract_trail(h)"
        )

    def _validate_model_kwargs(self, model_kwargs) -> None:
        # ``generate`` would refuse an argument that ``forward`` does not take.
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key != "trail_draft"})

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        trail_draft: int | None = None, **model_kwargs,
    ):  # fmt: skip
        if trail_draft is None:
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        if synced_gpus:
            raise ValueError(f"trail_draft={trail_draft} with synced_gpus=True: accepted is False")
        recorder = model_kwargs.pop("output_uncertainty", None)

        def observe(each: Sequence[torch.Tensor], positions: int) -> None:
            recorder.add(uncertainty(each), positions)

        return generate_speculatively(
            self,
            trail_draft,
            select_heads(self.config, model_kwargs.get("active_heads")),
            lambda each: combine_logits(each, self.config.ensemble_mode),
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            observe if recorder else None,
            **model_kwargs,
        )

    def _update_model_kwargs_for_generation(
        self, outputs, model_kwargs, is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ):
        # Called once a step, whatever the way of generating, with the number of tokens that the step adds.
        if isinstance(recorder := model_kwargs.get("output_uncertainty"), UncertaintyRecorder):
            recorder.add(outputs.uncertainty, num_new_tokens)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        # The stock method resizes one embedding and one LM head; here every head has its own.
        self._vocabulary_resized = True
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
            model._copy_trail(head, llama)
        model.generation_config = copy.deepcopy(llama.generation_config)
        return model.train(llama.training)

    @classmethod
    def from_llamas(
        cls, llamas: Sequence[LlamaForCausalLM], ensemble_mode: str = "logits"
    ) -> "NeuroTrailsLlamaForCausalLM":
        """A full ensemble of Llamas that were trained apart; head ``h`` is a copy of the ``h``-th and shares nothing.

        Raises:
            ValueError: there are none, or their configurations differ.
        """
        if not llamas:
            raise ValueError("llamas=[]: accepted are one or more")
        own = {"architectures", "dtype", "transformers_version", "_name_or_path"}
        configs = [{key: x for key, x in llama.config.to_dict().items() if key not in own} for llama in llamas]
        for index, config in enumerate(configs):
            if changed := sorted(key for key in config if config[key] != configs[0].get(key)):
                raise ValueError(f"llamas[{index}]: {', '.join(changed)} must be as in the first")
        model = cls.from_llama(
            llamas[0], num_ensemble_heads=len(llamas), share_embedding=False, ensemble_mode=ensemble_mode
        )
        for head, llama in enumerate(llamas[1:], 1):
            model._copy_trail(head, llama)
        return model

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

    def _copy_trail(self, head: int, llama: LlamaForCausalLM) -> None:
        for ours, theirs in self._trail(head, llama):
            _copy_tensors(theirs, ours, names=_tensors(theirs))

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


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _is_padding(tokens: torch.LongTensor, eos: int | list[int] | None, pad: int | None) -> torch.BoolTensor:
    """Which new tokens ``[sequences, n]`` ``generate`` filled in after the end of a sequence."""
    if eos is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    ends = torch.isin(tokens, torch.as_tensor(eos, device=tokens.device))
    padding = ends.cumsum(1) > ends.long()
    if pad is not None and not torch.isin(torch.as_tensor(pad), torch.as_tensor(eos)):
        # A sequence that a stopping criterion ended has no end-of-sequence token.
        padding |= (tokens != pad).flip(1).cumsum(1).flip(1) == 0
    return padding


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


__all__ = [
    "NeuroTrailsCausalLMOutput",
    "NeuroTrailsLlamaForCausalLM",
    "NeuroTrailsLlamaModel",
    "Uncertainty",
    "uncertainty",
]
