"""NeuroTrails models: one backbone, several heads, built from the blocks of any stock decoder.

A class is made for each family when somebody asks for it: ``NeuroTrailsQwen3ForCausalLM`` over ``Qwen3ForCausalLM``.
The stock base model is built as it is and taken apart; to run it, its own forward pass says what each block is called
with (see the stock_forward module).

Masks do not appear in the forward pass: a weight outside its mask is exactly 0 (see the masks module), so the
stock dense modules compute the right thing.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import transformers
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_neurotrails import PREFIX, config_class
from .ensemble import (
    NeuroTrailsCausalLMOutput,
    NeuroTrailsModelOutput,
    combine_logits,
    uncertainty,
)
from .forward_arguments import checked_forward, packed_masks, tokens_seen
from .lm_heads import LMHead, LMHeads, by_head, check_adapters, head_loss, side_by_side, stacked_losses
from .losses import IGNORE_INDEX, HeadByHead, next_tokens
from .masks import attach_masks, maskable_modules
from .multi_head import HeadStatesMixin, TokenTablesMixin, select_heads, trainable
from .multi_head_generation import MultiHeadGenerationMixin
from .multi_head_pretrained import MultiHeadPreTrained, built_anew, make_model_class
from .stock_forward import BlockCalls, StockLogits, TrailCache, find_parts
from .trails import TrailsMixin
from .transformers_versions import CACHE, either_cache


class NeuroTrailsHead(nn.Module):
    """The last blocks and the final norm of one trail (the LM head lies beside the base model)."""

    def __init__(self, embeddings: Mapping[str, nn.Module], layers: Iterable[nn.Module], norm: nn.Module):
        super().__init__()
        for name, module in embeddings.items():
            self.add_module(name, module)
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class MultiHeadModel(TokenTablesMixin, MultiHeadPreTrained):
    """Backbone and heads, without the LM heads; goes before a stock base model."""

    def build(self, config: PreTrainedConfig) -> None:
        # Past the module's own attributes, which exist only when the stock ``__init__`` has begun.
        self.__dict__["_parts"] = find_parts(self.stock_class, config.to_stock_config())
        self.stock_class.__init__(self, config)
        attach_masks(self, config.masked_modules, prefix="model.", strict=False)

    def post_init(self) -> None:
        # The stock ``__init__`` ends here: a trail of its own has been built, and nothing is initialised yet.
        self._take_apart()
        super().post_init()

    def _take_apart(self) -> None:
        """Makes backbone and heads of the stock model's blocks and norm, which are built anew for further heads."""
        config, parts = self.config, self._parts
        modules, backbone = dict(self._modules), config.num_backbone_layers
        blocks, norm = list(modules[parts.stack]), modules[parts.norm]
        embeddings = {}
        if not config.share_embedding:
            others = {name: child for name, child in modules.items() if name not in (parts.stack, parts.norm)}
            embeddings = {name: child for name, child in others.items() if any(True for _ in child.parameters())}
        heads = [NeuroTrailsHead(embeddings, blocks[backbone:], norm)]
        heads += [built_anew(heads[0], config) for _ in range(1, config.num_ensemble_heads)]
        self._modules.clear()
        for name, child in modules.items():  # in the stock model's order, in which weights are initialised
            if name == parts.stack:
                self._modules["layers"] = nn.ModuleList(blocks[:backbone])
            elif name == parts.norm:
                self._modules["heads"] = nn.ModuleList(heads)
            elif name not in embeddings:
                self._modules[name] = child

    def trail_blocks(self, head: int) -> list[nn.Module]:
        """The blocks of one trail, by depth."""
        return [*self.layers, *self.heads[head].layers]

    def trail_modules(self, head: int, stock: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of corresponding modules: one trail's and a stock base model's, which lack the masks alone."""
        body = self.heads[head]
        pairs = list(zip(self.trail_blocks(head), getattr(stock, self._parts.stack)))
        for name, child in stock.named_children():
            if name == self._parts.norm:
                pairs.append((body.norm, child))
            elif name != self._parts.stack:
                pairs.append((getattr(body, name) if hasattr(body, name) else getattr(self, name), child))
        return pairs

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
        stock_logits: Callable | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> NeuroTrailsModelOutput:
        """Runs the backbone once and each active head on its output.

        Args:
            input_ids: ``[batch, seq]``, or ``[active heads, batch, seq]``, a batch for each head, and the backbone runs
                once for each; ``inputs_embeds`` ``[batch, seq, hidden_size]`` replaces it.
            attention_mask, position_ids, cache, use_cache: as in the stock model. The cache has one slot a block: the
                backbone's, then head after head.
            active_heads: the heads to run, all by default. A cache may lose heads on the way, never regain them.
            backbone_states: ``[batch, seq, hidden_size]`` of an earlier call over the same positions: the heads start
                from them, the backbone does not run. Replaces ``input_ids``; needs ``share_embedding``.
            lm_heads, labels: the active heads' LM heads, and their next tokens ``[active heads, batch * seq]``: one
                head after another runs forward, into its loss, and backward (see ``HeadByHead``).
            stock_logits: what makes logits of an LM head's output (see ``head_loss``).
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
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        calls = self._record(heads, input_ids, inputs_embeds, backbone_states, cache, kwargs)
        caches = [None if cache is None else TrailCache(cache, config.trail_slots(h)) for h in heads]

        trunk = [backbone_states]
        if backbone_states is None:
            trunk = [call.run(self.layers, 0, call.first_input, caches[0]) for call in calls]
        if len(calls) == 1:
            calls, trunk = calls * len(heads), trunk * len(heads)

        def run_head(index: int, states: torch.Tensor) -> torch.Tensor:
            head = self.heads[heads[index]]
            return head.norm(calls[index].run(head.layers, config.num_backbone_layers, states, caches[index]))

        if lm_heads is None:
            return NeuroTrailsModelOutput(
                last_hidden_state=side_by_side(run_head(index, states) for index, states in enumerate(trunk)),
                backbone_states=trunk[0] if config.share_embedding and not own_batches else None,
                **{CACHE: cache},
            )
        losses = []
        for index, (lm_head, states, targets) in enumerate(zip(lm_heads, trunk, labels)):

            def loss(states: torch.Tensor, index=index, lm_head=lm_head, targets=targets) -> torch.Tensor:
                hidden = run_head(index, states).flatten(0, 1)
                return head_loss(lm_head, hidden, targets.to(states.device), stock_logits)

            head = self.heads[heads[index]]
            losses.append(HeadByHead.apply(loss, states, *trainable(head.layers, head.norm, lm_head)))
        return NeuroTrailsModelOutput(head_losses=torch.stack(losses), **{CACHE: cache})

    def _record(
        self,
        heads: Sequence[int],
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        backbone_states: torch.FloatTensor | None,
        cache: Cache | None,
        inputs: dict,
    ) -> list[BlockCalls]:
        """What the blocks are to be called with: once for all heads, or for each head where its input is its own."""
        config = self.config
        # The slots of blocks that do not run now may hold another number of tokens, so the tokens before this call are
        # counted in the slot of a block that does run.
        runs_backbone = backbone_states is None and config.num_backbone_layers > 0
        seen = tokens_seen(config, cache, 0 if runs_backbone else config.first_cache_layer(heads[0]), heads)
        embeds = backbone_states if inputs_embeds is None else inputs_embeds
        first = embeds[..., 0] if input_ids is None else input_ids.flatten(0, -2)
        if inputs["position_ids"] is None:
            positions = torch.arange(first.shape[1], device=first.device) + seen
            inputs["position_ids"] = positions.unsqueeze(0)
        elif cache is None or (type(cache) is DynamicCache and seen == 0):
            example = first.new_empty(*first.shape, 0, dtype=self.dtype)
            inputs["attention_mask"] = packed_masks(
                config, example, inputs["attention_mask"], inputs["position_ids"], cache
            )
        trail = None
        if cache is not None:
            trail = TrailCache(cache, config.trail_slots(heads[0]))
            trail = trail if runs_backbone else trail.sized_by_heads(config.num_backbone_layers)

        texts = [input_ids] if input_ids is None or input_ids.dim() == 2 else list(input_ids)
        if not config.share_embedding and len(texts) < len(heads):
            texts = texts * len(heads)
        recorded = []
        for index, text in enumerate(texts):
            own = {} if config.share_embedding else dict(self.heads[heads[index]].named_children())
            recorded.append(
                self._parts.record(
                    self, self.trail_blocks(heads[0]), own, cache=trail, input_ids=text, inputs_embeds=embeds, **inputs
                )
            )
        return recorded


def maskable_names(config: PreTrainedConfig) -> list[str]:
    with torch.device("meta"):
        return list(maskable_modules(causal_lm_class(config)(config)))


class MultiHeadForCausalLM(
    HeadStatesMixin, TrailsMixin, MultiHeadGenerationMixin, TokenTablesMixin, MultiHeadPreTrained
):
    """Several heads over one backbone, whose next-token predictions are combined; goes before a stock causal LM."""

    def build(self, config: PreTrainedConfig) -> None:
        stock_logits = StockLogits(type(self), config.to_stock_config())
        # Not the stock class's own ``__init__``, which would build a trail more.
        next(base for base in self.stock_class.__mro__[1:] if issubclass(base, PreTrainedModel)).__init__(self, config)
        for name, value in stock_logits.attributes.items():  # scales and the like, which its methods may look up
            setattr(self, name, value)
        self._stock_logits = None if stock_logits.are_plain else stock_logits
        heads = range(config.num_ensemble_heads)
        self.model = base_class(self.stock_class)(config)
        tables = [name_of(self.model, table) for table in self.model.get_embeddings()]
        self._tied_weights_keys = {f"lm_heads.{h}.weight": f"model.{tables[h % len(tables)]}.weight" for h in heads}
        size, vocabulary, bias = config.hidden_size, config.vocab_size, stock_logits.has_bias
        lm_heads = [LMHead(size, vocabulary, bias=bias) for _ in heads]
        self.lm_heads = LMHeads(lm_heads, config.ensemble_mode, is_linear=stock_logits.are_plain)
        self.vocab_size = config.vocab_size
        self.post_init()
        # After post_init, which ties: a tied weight has one mask, on the embedding.
        attach_masks(self, config.masked_modules)

    def head_logits(self, head: int, states: torch.Tensor) -> torch.Tensor:
        """The logits ``[..., vocab]`` of one head from its states ``[..., hidden_size]``."""
        lm_head = self.lm_heads[head]
        states = states.contiguous()  # as in a stock model: then a bias is added within the product
        return lm_head(states) if self._stock_logits is None else self._stock_logits(lm_head, states)

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
            input_ids ... logits_to_keep: as in the stock model. ``labels`` ``[batch, seq]`` are shifted here,
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
                kwargs |= {"lm_heads": lm_heads, "labels": targets, "stock_logits": self._stock_logits}
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
                head_losses = stacked_losses(lm_heads, states, targets, self._stock_logits)
            count = (targets != IGNORE_INDEX).sum(-1) if num_items_in_batch is None else num_items_in_batch
            head_losses = head_losses / (count.to(head_losses.device) if torch.is_tensor(count) else count)
        logits = head_logits = measures = None
        if wants_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits_of_heads = (self.head_logits(h, x[:, keep]) for h, x in zip(heads, states))
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


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The name of a module within a model."""
    return next(name for name, child in model.named_modules() if child is module)


def base_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The multi-head base model's class, of a stock causal LM."""
    return model_class(transformers.MODEL_MAPPING[stock.config_class])


def causal_lm_class(config: PreTrainedConfig | type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The multi-head class for a configuration, stock or multi-head.

    Raises:
        ValueError: it is no decoder's.
    """
    kind = config if isinstance(config, type) else type(config)
    kind = getattr(kind, "stock_class", kind)
    config_class(kind)  # which looks at it
    return model_class(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[kind])


@functools.cache
def model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The multi-head class over a stock base model or causal LM, made when it is asked for the first time."""
    is_lm = issubclass(stock, GenerationMixin)
    mixin, kind = (MultiHeadForCausalLM, "AutoModelForCausalLM") if is_lm else (MultiHeadModel, "AutoModel")
    made = make_model_class(stock, mixin, config_class(stock.config_class), __name__, globals(), maskable_names)
    made.register_for_auto_class(kind)
    return made


def __getattr__(name: str):
    # Imports, pickles and ``auto_map`` entries find a class that nobody has asked for yet.
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class(stock)
