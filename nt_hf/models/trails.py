"""Trails: the stock model of each path through the backbone and one head, and multi-head models made of stock ones."""

import copy
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from .multi_head import select_heads


class TrailsMixin:
    """Conversion between a multi-head model and stock models; its class names theirs as ``stock_class``."""

    stock_class: ClassVar[type[PreTrainedModel]]

    @classmethod
    def from_llama(
        cls,
        llama: PreTrainedModel,
        *,
        num_ensemble_heads: int = 3,
        blocks_in_head: int | None = None,
        ensemble_mode: str = "logits",
        share_embedding: bool = True,
        masked_modules: Sequence[str] = (),
    ) -> PreTrainedModel:
        """A NeuroTrails Llama whose every trail is a copy of ``llama``; the masks, if any, are all ones.

        Identical heads stay identical in training until their masks differ: draw masks before training on.
        """
        stock = {key: value for key, value in llama.config.to_dict().items() if key != "model_type"}
        config = cls.config_class(
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
    def from_llamas(cls, llamas: Sequence[PreTrainedModel], ensemble_mode: str = "logits") -> PreTrainedModel:
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

    def extract_trail(self, head: int) -> PreTrainedModel:
        """The stock ``LlamaForCausalLM`` of one trail, its weights copied."""
        (head,) = select_heads(self.config, [head])
        config = self.config.to_llama_config()
        config._attn_implementation = self.config._attn_implementation
        llama = self.stock_class(config).to(self.device)
        for ours, theirs in self._trail(head, llama):
            copy_tensors(ours, theirs, names=_tensors(theirs))
        llama.generation_config = copy.deepcopy(self.generation_config)
        return llama.train(self.training)

    def _copy_trail(self, head: int, llama: PreTrainedModel) -> None:
        for ours, theirs in self._trail(head, llama):
            copy_tensors(theirs, ours, names=_tensors(theirs))

    def _trail(self, head: int, llama: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
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


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def copy_tensors(source: nn.Module, target: nn.Module, names: Iterable[str]) -> None:
    """Copies parameters and buffers, each in its own dtype.

    ``Module.to(dtype)`` would also round the frequencies of the rotary embedding, which stay in fp32 when a model is
    loaded in bf16, and the state dict lacks them.
    """
    source, target = _tensors(source), _tensors(target)
    for name in names:
        target[name].data = source[name].detach().clone()
