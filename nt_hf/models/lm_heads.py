"""The LM heads of a model, one by one and as the single LM head that tools ask for."""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from .ensemble import combine_logits
from .losses import LinearCrossEntropy, chunked_cross_entropy


class LMHead(nn.Linear):
    """An LM head that computes its loss within its own forward.

    Reading ``weight`` from outside would miss what a wrapper (FSDP2, LoRA, quantisation) does around the forward.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of ``hidden`` ``[..., hidden_size]``; with ``labels``, the sum of the cross-entropies."""
        if labels is None:
            return super().forward(hidden)
        # Who wants second derivatives switches fused attention off, which has none either. A quantised weight, which
        # is a tensor of another class, knows few operations beside the product. A compiled graph fuses by itself.
        plain = not torch.compiler.is_compiling() and torch.backends.cuda.flash_sdp_enabled()
        if plain and type(self.weight) is nn.Parameter and self.bias is None:
            return LinearCrossEntropy.apply(hidden, self.weight, labels)
        return chunked_cross_entropy(super().forward, hidden, labels)


def head_loss(
    lm_head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, stock_logits: Callable | None = None
) -> torch.Tensor:
    """Summed cross-entropy of one head.

    Args:
        lm_head: the LM head.
        hidden: ``[n, hidden_size]``.
        labels: ``[n]``.
        stock_logits: called with ``lm_head`` and states, for a model whose logits are not the LM head's output itself.
    """
    if stock_logits is not None:
        return chunked_cross_entropy(functools.partial(stock_logits, lm_head), hidden, labels)
    if isinstance(lm_head, LMHead):
        return lm_head(hidden, labels)
    # Replaced by an adapter or a quantised layer, which only computes logits.
    return chunked_cross_entropy(lm_head, hidden, labels)


def stacked_losses(
    lm_heads: Sequence[nn.Module], states: torch.Tensor, targets: torch.Tensor, stock_logits: Callable | None = None
) -> torch.Tensor:
    """Summed cross-entropies ``[M]`` from ``states`` ``[M, batch, seq, hidden_size]`` and ``targets`` ``[M, n]``."""
    targets = targets.to(states.device)
    pairs = zip(lm_heads, states, targets)
    return torch.stack([head_loss(head, x.flatten(0, 1), y, stock_logits) for head, x, y in pairs])


def side_by_side(states: Iterable[torch.Tensor]) -> torch.Tensor:
    """The heads' states, each ``[..., hidden_size]``, as one tensor ``[..., heads * hidden_size]``."""
    return torch.cat(list(states), -1)


def by_head(states: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """The inverse of [`side_by_side`]: a view ``[heads, ..., hidden_size]``."""
    return states.unflatten(-1, (-1, hidden_size)).movedim(-2, 0)


class LMHeads(nn.ModuleList):
    """All LM heads, and at the same time the one LM head that stands for them.

    Tools that ask a model for *the* LM head (quantisers, PEFT, the trainers of TRL) find this module: what they do with
    it they do with every head, and as a linear map from the base model's ``last_hidden_state``, the heads' states side
    by side, it gives the ensemble's logits.

    Args:
        heads: the LM heads.
        ensemble_mode: how their logits combine.
        is_linear: whether the model's logits are what the LM heads return, neither scaled nor capped.
    """

    def __init__(self, heads: Iterable[nn.Module] = (), ensemble_mode: str = "logits", is_linear: bool = True):
        super().__init__(heads)
        self.ensemble_mode, self.is_linear = ensemble_mode, is_linear

    @property
    def weight(self) -> torch.Tensor:
        """``[vocab, heads * hidden_size]``, joined from the heads' weights, to which gradients go.

        Raises:
            NotImplementedError: no single matrix says what the heads do: they are combined by "probs", a head is an
                adapter or quantised, or the model scales or caps its logits.
        """
        self._check_linear()
        plain = all(type(head) is LMHead and type(head.weight) is nn.Parameter for head in self)
        if self.ensemble_mode != "logits" or not plain:
            state = f"ensemble_mode={self.ensemble_mode!r}" if plain else "adapted or quantised LM heads"
            raise NotImplementedError(
                f"lm_heads.weight with {state}: accepted are plain LM heads with ensemble_mode='logits', which are "
                "together one linear map (PEFT leaves them as they are with exclude_modules=['lm_heads.0', ...])"
            )
        return torch.cat([head.weight for head in self], 1) / len(self)

    @property
    def bias(self) -> torch.Tensor | None:
        """``[vocab]``, the mean of the heads' biases, if the family's LM heads have them."""
        biases = [getattr(head, "bias", None) for head in self]
        return None if any(bias is None for bias in biases) else torch.stack(biases).mean(0)

    def _check_linear(self) -> None:
        if not self.is_linear:
            raise NotImplementedError(
                "lm_heads as one linear map: this model scales or caps its logits; accepted are model(...).logits and "
                "model.head_logits(head, states)"
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The ensemble's logits ``[..., vocab]`` of all heads' states side by side, ``[..., heads * hidden_size]``."""
        self._check_linear()
        size = hidden.shape[-1] // len(self)
        return combine_logits((head(x) for head, x in zip(self, by_head(hidden, size))), self.ensemble_mode)


def check_adapters(model: nn.Module) -> None:
    """Looks, once for each set of adapters, at what PEFT is to do with LM heads, which it would leave out unsaid.

    Raises:
        ValueError: it is to train a module called ``lm_head``, or to adapt a full ensemble whose vocabulary has grown.
    """
    configs = vars(model).get("peft_config", {})
    if torch.compiler.is_compiling() or not configs or vars(model).get("_checked_adapters") == list(configs):
        return
    heads = f"lm_heads.0 to lm_heads.{len(model.lm_heads) - 1}"
    names = [name for name, _ in model.named_modules()]
    for config in configs.values():
        targets = getattr(config, "target_modules", None) or ()
        asked = [("target_modules", name) for name in targets if not isinstance(targets, str) and name == "lm_head"]
        asked += [("modules_to_save", name) for name in getattr(config, "modules_to_save", None) or ()]
        for option, wanted in asked:
            if not any(name.endswith(wanted) for name in names):
                raise ValueError(f"{option}: {wanted!r} fits no module; the LM heads are {heads}, each named by itself")
    if getattr(model, "_vocabulary_resized", False) and not model.config.share_embedding:
        raise ValueError(
            "adapters on a full ensemble whose vocabulary was resized: PEFT would save the new rows of one embedding "
            "only; accepted is the resized model saved and loaded again"
        )
    if model.config.tie_word_embeddings and any(hasattr(head, "base_layer") for head in model.lm_heads):
        warnings.warn(
            "adapters on LM heads that share one weight with the embedding: merged, each changes that weight for all "
            "of them; keep them as adapters, or adapt a model with tie_word_embeddings=False",
            stacklevel=3,
        )
    model._checked_adapters = list(configs)
