"""What a model's ``forward`` takes: unknown arguments are refused, packed sequences are found."""

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.generic import TransformersKwargs

from .transformers_versions import CACHE

# What Transformers hands through a forward pass, and token types, which some tokenizers return for every model.
_HANDED_THROUGH = {*TransformersKwargs.__annotations__, "token_type_ids"}
# What ``generate`` needs for ``stop_strings`` and leaves among the arguments of each step.
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")


def checked_forward(forward: Callable) -> Callable:
    """A model's ``forward`` that refuses arguments which it would otherwise drop, and returns a tuple where asked to.

    ``output_hidden_states`` may be indices of the hidden states to return, the others are ``None``; releases of
    Transformers differ in how they count them, all by the depth of a trail, so the choice is made here.
    """
    parameters = inspect.signature(forward).parameters
    known = parameters.keys() | _HANDED_THROUGH | {"return_dict"}

    @functools.wraps(forward)
    def checked(self, *args, **kwargs):
        for name in _OF_GENERATE:
            kwargs.pop(name, None)
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


def tokens_seen(
    config: PreTrainedConfig, cache: Cache | None, slot: int, heads: Sequence[int]
) -> int | torch.LongTensor:
    """How many tokens the cache holds before this call.

    Args:
        slot: the cache's slot in which they are counted.
        heads: the active heads, whose slots must hold as many.

    Raises:
        ValueError: the cache is not one of these heads.
    """
    seen = cache.get_seq_length(slot) if cache is not None else 0
    if config.blocks_in_head and type(cache) is DynamicCache:
        for head in heads:
            if (held := cache.get_seq_length(config.first_cache_layer(head))) != seen:
                raise ValueError(
                    f"the cache holds {held} tokens in head {head} and {seen} before it: accepted is a cache of the "
                    f"same heads, with {config.num_cache_layers} layers (PEFT's PrefixTuningConfig takes "
                    "num_layers=model.config.num_cache_layers)"
                )
    return seen


def packed_masks(
    config: PreTrainedConfig,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor,
    cache: Cache | None,
):
    """The attention mask to hand to a stock model whose cache holds nothing yet, packed sequences kept apart.

    Transformers keeps packed sequences apart where there is neither a cache nor a mask. A cache that holds nothing
    changes nothing, and a mask is made part of the positions: then the masks are made here, in the form that stock
    models take ready made.

    Args:
        config: of the model; its ``_attn_implementation`` decides the masks' form.
        embeds: ``[batch, seq, ...]``, of the model's type.
        attention_mask: ``[batch, seq]``, 0 for padding.
        position_ids: ``[batch or 1, seq]``.
    """
    if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.dim() != 2):
        return attention_mask
    if attention_mask is None and cache is None:
        return None  # the stock model looks itself
    jumps = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:
        attended = attention_mask.bool()
        if attended.shape[1] != position_ids.shape[-1]:
            return attention_mask
        jumps = jumps & attended[:, 1:] & attended[:, :-1]
    if not torch.compiler.is_compiling() and not jumps.any():
        return attention_mask
    if attention_mask is not None:
        # Where a row holds several sequences the positions jump wherever the mask changes, too, for this purpose alone.
        changes = torch.nn.functional.pad(attended[:, 1:] != attended[:, :-1], (1, 0)).cumsum(-1)
        position_ids = position_ids + changes * (position_ids.max() + 2)
    return create_masks_for_generate(
        config=config, inputs_embeds=embeds, attention_mask=None, position_ids=position_ids, **{CACHE: None}
    )
