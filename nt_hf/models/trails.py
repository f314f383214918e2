"""Trails: the stock model of each path through the backbone and one head, and multi-head models made of stock ones."""

import copy
import os
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .multi_head import check_not_quantised, select_heads


class TrailsMixin:
    """Conversion between a multi-head model and stock models of its class's ``stock_class``."""

    @classmethod
    def from_stock(
        cls,
        stock: PreTrainedModel | str | os.PathLike,
        *,
        num_ensemble_heads: int = 3,
        blocks_in_head: int | None = None,
        ensemble_mode: str = "logits",
        share_embedding: bool = True,
        masked_modules: Sequence[str] = (),
        **kwargs,
    ) -> PreTrainedModel:
        """A multi-head model whose every trail is a copy of ``stock``; the masks, if any, are all ones.

        Identical heads stay identical in training until their masks differ: draw masks before training on.

        Args:
            stock: a model, or a directory or hub id of one.
            num_ensemble_heads, blocks_in_head, ensemble_mode, share_embedding, masked_modules: as in the configuration.
            kwargs: for ``from_pretrained``, where ``stock`` is no model yet (``dtype``, ``revision`` and the like).

        Raises:
            TypeError: ``stock`` is a model of another class, or there are ``kwargs`` for one that is loaded already.
            ValueError: a checkpoint lacks weights, or they are quantised.
        """
        if isinstance(stock, (str, os.PathLike)):
            stock = load_complete(cls.stock_class, stock, **kwargs)
        elif kwargs:
            raise TypeError(f"from_stock got {', '.join(kwargs)} with a model: accepted are these with a path")
        if type(stock) is not cls.stock_class:
            raise TypeError(f"from_stock({type(stock).__name__}): accepted is a {cls.stock_class.__name__}")
        check_not_quantised(stock, "from_stock")
        config = cls.config_class.from_stock_config(
            stock.config,
            num_ensemble_heads=num_ensemble_heads,
            blocks_in_head=blocks_in_head,
            ensemble_mode=ensemble_mode,
            share_embedding=share_embedding,
            masked_modules=list(masked_modules),
        )
        config._name_or_path = stock.config._name_or_path
        with init.no_init_weights():
            model = cls(config)
        model.name_or_path = ""  # it lies nowhere yet; PEFT would look for its configuration where the stock model lies
        model.tie_weights()
        model = model.to(stock.device)
        for head in range(num_ensemble_heads):
            model._copy_trail(head, stock)
        if hasattr(stock, "generation_config"):
            model.generation_config = copy.deepcopy(stock.generation_config)
        return model.train(stock.training)

    @classmethod
    def from_stocks(cls, stocks: Sequence[PreTrainedModel], ensemble_mode: str = "logits") -> PreTrainedModel:
        """A full ensemble of stock models trained apart; head ``h`` is a copy of the ``h``-th and shares nothing.

        Raises:
            ValueError: there are none, or their configurations differ.
        """
        if not stocks:
            raise ValueError("stocks=[]: accepted are one or more")
        own = {"architectures", "dtype", "transformers_version", "_name_or_path", "quantization_config"}
        configs = [{key: x for key, x in stock.config.to_dict().items() if key not in own} for stock in stocks]
        for index, config in enumerate(configs):
            if changed := sorted(key for key in config if config[key] != configs[0].get(key)):
                raise ValueError(f"stocks[{index}]: {', '.join(changed)} must be as in the first")
        model = cls.from_stock(
            stocks[0], num_ensemble_heads=len(stocks), share_embedding=False, ensemble_mode=ensemble_mode
        )
        for head, stock in enumerate(stocks[1:], 1):
            model._copy_trail(head, stock)
        return model

    def extract_trail(self, head: int) -> PreTrainedModel:
        """The stock model of one trail, its weights copied.

        Raises:
            ValueError: there is no such head, or the weights are quantised.
        """
        (head,) = select_heads(self.config, [head])
        check_not_quantised(self, "extract_trail")
        with init.no_init_weights():
            stock = self.stock_class(self.config.to_stock_config())
        stock.tie_weights()
        stock = stock.to(self.device)
        for ours, theirs in self._trail(head, stock):
            copy_tensors(ours, theirs, names=tensors_of(theirs))
        if hasattr(self, "generation_config"):
            stock.generation_config = copy.deepcopy(self.generation_config)
        return stock.train(self.training)

    def _copy_trail(self, head: int, stock: PreTrainedModel) -> None:
        for ours, theirs in self._trail(head, stock):
            copy_tensors(theirs, ours, names=tensors_of(theirs))

    def _trail(self, head: int, stock: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of corresponding modules: one trail's and the stock model's, which lacks the masks alone."""
        return [*self.model.trail_modules(head, stock.base_model), (self.lm_heads[head], stock.get_output_embeddings())]


def load_complete(kind: type, path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """The model of a checkpoint that has all of its weights.

    Transformers makes weights that are missing random ones, and names that, or a wrong shape, in the log only.

    Args:
        kind: a class of models, or an Auto class.
        path: a directory or hub id.
        kwargs: for ``from_pretrained``; with ``ignore_mismatched_sizes=True`` weights of another shape are made anew.

    Raises:
        ValueError: weights are missing, or of another shape; the message names one.
    """
    ignored = kwargs.pop("ignore_mismatched_sizes", False)
    model, info = kind.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    reshaped = {key for key, *_ in info["mismatched_keys"]}
    missing = [key for key in info["missing_keys"] if key not in reshaped and not key.endswith("weight_mask")]
    if wrong := sorted(missing) + ([] if ignored else sorted(reshaped)):
        raise ValueError(f"{path}: lacks {len(wrong)} weights that fit its config.json, for example {wrong[0]}")
    return model


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module by name, those that the state dict lacks included; a shared one once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def copy_tensors(source: nn.Module, target: nn.Module, names: Iterable[str]) -> None:
    """Copies parameters and buffers, each in its own dtype.

    ``Module.to(dtype)`` would also round the frequencies of the rotary embedding, which stay in fp32 when a model is
    loaded in bf16, and the state dict lacks them.
    """
    source, target = tensors_of(source), tensors_of(target)
    for name in names:
        target[name].data = source[name].detach().clone()
