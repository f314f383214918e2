"""What any multi-head model is: its blocks in order, its heads, the names of their parts."""

import copy
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from .lm_heads import LMHeads, by_head
from .masks import matches, resize_mask


class MultiHeadMixin:
    """The parts of a model of several heads; nothing outside this folder spells where they lie.

    A model has ``model.layers`` (the backbone's blocks), ``model.heads[h].layers`` and ``model.heads[h].norm``, and
    ``lm_heads[h]``, or ``classifiers[h]`` of images; where each head has an embedding of its own, it lies in
    ``model.heads[h]``.
    """

    def blocks(self) -> list[nn.Module]:
        """All blocks: the backbone's, then head after head."""
        return [*self.model.layers, *(block for head in self.model.heads for block in head.layers)]

    def head_modules(self, head: int) -> dict[str, nn.Module]:
        """The modules of one head alone, by names that are the same in all heads: "layers.0.mlp.up_proj", "lm_head"."""
        name = "lm_head" if hasattr(self, "lm_heads") else "classifier"
        modules = dict(self.model.heads[head].named_modules())
        last = getattr(self, f"{name}s")[head]
        return modules | {f"{name}.{part}".removesuffix("."): module for part, module in last.named_modules()}

    def may_compute_gradients_early(self, modules: Iterable[nn.Module]) -> bool:
        """Whether nobody is to see the graph of some modules, so that it may go backward within the forward pass."""
        parameters = trainable(*modules)
        checkpointing = (getattr(x, "gradient_checkpointing", False) for x in (self.model, *self.blocks()))
        return (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and bool(parameters)
            and not any(checkpointing)  # which may not be compatible, and saves as much
            and torch.backends.cuda.flash_sdp_enabled()  # see ``LMHead``
            # A hook would run twice, and FSDP2, whose models have this method, wants the passes in their usual order.
            and not hasattr(self, "unshard")
            and not any(p._backward_hooks or hasattr(p, "device_mesh") for p in parameters)
        )


class HeadStatesMixin(MultiHeadMixin):
    """What evaluation asks of a model with LM heads: the states before them."""

    def head_states(self, heads: Sequence[int] | None = None, **inputs) -> torch.Tensor:
        """The states ``[heads, batch, seq, hidden_size]`` after each head's final norm, before its LM head."""
        states = self.model(**inputs, active_heads=heads, use_cache=False).last_hidden_state
        return by_head(states, self.config.hidden_size)

    def head_states_by_depth(self, heads: Sequence[int], **inputs) -> list[Sequence[torch.Tensor]]:
        """Of each depth of the heads, their states ``[batch, seq, hidden_size]``: after each block, then the norm."""
        output = self.model(**inputs, active_heads=heads, use_cache=False, output_hidden_states=True)
        blocks = self.config.blocks_in_head
        # Blocks are recorded in the order in which they run: the backbone's, then head after head.
        in_heads = output.hidden_states[len(output.hidden_states) - len(heads) * blocks :]
        last = by_head(output.last_hidden_state, self.config.hidden_size)
        return [*(in_heads[depth::blocks] for depth in range(blocks)), last]

    def get_lm_heads(self) -> list[nn.Module]:
        """The LM heads, in the order of the heads."""
        return list(self.lm_heads)


class TokenTablesMixin:
    """Embeddings and LM heads of a multi-head ``PreTrainedModel``, for the tools that ask for one of each."""

    def get_embeddings(self) -> list[nn.Embedding]:
        """The token embeddings: the shared one, or one a head."""
        model = self.base_model
        owners = [model] if self.config.share_embedding else model.heads
        return [model.stock_class.get_input_embeddings(owner) for owner in owners]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.get_embeddings()[0]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        wanted, weight = self.config.embedding_initializer_range, getattr(module, "weight", None)
        is_new = weight is not None and not weight.is_meta and not getattr(weight, "_is_hf_initialized", False)
        if wanted is None or not is_new or all(module is not embedding for embedding in self.get_embeddings()):
            return
        # Scaled by what was drawn: families draw in different ways, and this needs no random numbers more.
        drawn = weight.float()
        if (padding := getattr(module, "padding_idx", None)) is not None:  # a row of zeros
            drawn = torch.cat([drawn[:padding], drawn[padding + 1 :]])
        deviation = drawn.std()
        if not deviation > 0:
            raise ValueError(
                f"embedding_initializer_range={wanted}: accepted is None for {type(self).stock_class.__name__}, whose "
                "embedding starts with equal weights"
            )
        weight.mul_(wanted / deviation)

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
        model = self.base_model
        model.stock_class.set_input_embeddings(model, value)

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
            if resized.bias is not None:
                lm_head.bias = resized.bias.requires_grad_(lm_head.bias.requires_grad)
            lm_head.out_features = rows
            resize_mask(lm_head)
        return self.get_input_embeddings()


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters of some modules that are to have gradients."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def check_not_quantised(model: nn.Module, purpose: str) -> None:
    """Refuses a model whose weights a quantiser has replaced: nobody else can copy or compress them.

    Args:
        model: any model.
        purpose: what the weights are needed for; the message begins with it.

    Raises:
        ValueError: a weight is a quantiser's own kind of tensor, or no floating-point number of 16 bits or more.
    """
    for name, weight in model.named_parameters():
        data = weight.data
        foreign = type(data).__module__.partition(".")[0] != "torch"  # a DTensor is torch's
        if foreign or not data.is_floating_point() or data.element_size() == 1:
            raise ValueError(
                f"{purpose}: {name} is quantised; accepted is a model that was loaded without quantization_config "
                "(quantise what comes out)"
            )


def select_heads(config: PreTrainedConfig, choice: Sequence[int] | None, name: str = "active_heads") -> list[int]:
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
    match = re.match(r"((?:model\.)?heads\.|lm_heads\.|classifiers\.)(\d+)(\..*)", name)
    if match is None:
        return name
    start, number, rest = match.groups()
    return f"{start}{numbers[int(number)]}{rest}" if int(number) in numbers else None


def keep_heads(
    config: PreTrainedConfig, heads: Sequence[int], maskable_names: Callable[[PreTrainedConfig], list[str]]
) -> PreTrainedConfig:
    """The configuration of a model of these heads alone, in this order; the same weights of theirs carry masks.

    ``masked_modules`` loses the globs that fit nothing any more, and gains the names of weights that the others would
    choose, or not choose, by their new numbers alone.

    Args:
        config: of a model of all heads.
        heads: the heads to keep.
        maskable_names: the weights that can carry masks in the model of a configuration.
    """
    numbers = dict(enumerate(heads))
    kept = copy.deepcopy(config)
    kept.num_ensemble_heads, kept.masked_modules = len(numbers), []
    names = maskable_names(kept)
    masked = {name: matches(renumber_head(name, numbers), config.masked_modules) for name in names}
    globs = [glob for glob in config.masked_modules if any(matches(name, [glob.removeprefix("!")]) for name in names)]
    corrections = [name if chosen else f"!{name}" for name, chosen in masked.items() if matches(name, globs) != chosen]
    kept.masked_modules = globs + corrections
    return kept
