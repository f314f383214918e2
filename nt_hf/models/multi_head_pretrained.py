"""What multi-head base models and models with LM heads or classifiers share, before a stock ``PreTrainedModel``."""

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .checkpoint_files import CheckpointFilesMixin
from .configuration_neurotrails import PREFIX
from .masks import full_mask
from .multi_head import keep_heads, select_heads
from .stock_forward import plain_forward


class MultiHeadPreTrained(CheckpointFilesMixin):
    """What multi-head classes share; goes before a stock ``PreTrainedModel``.

    A class has what ``make_model_class`` gives it, and a method ``build(config)``, its ``__init__`` for a configuration
    that has been checked.
    """

    base_model_prefix = "model"
    # Of a checkpoint that is loaded dense, or into layers that a quantiser puts in place of the masked ones.
    _keys_to_ignore_on_load_unexpected = (r"weight_mask$",)
    # Stock plans of parallelism name one stack and one LM head.
    _tp_plan = _pp_plan = _fsdp_plan = None

    def __init__(self, config: PreTrainedConfig, heads: Sequence[int] | None = None):
        config.check_heads()
        chosen = select_heads(config, heads, "heads")
        self.build(config if heads is None else keep_heads(config, chosen, type(self).maskable_names))
        if heads is not None:
            self._source_heads = chosen  # until the weights are loaded, from a checkpoint of all heads

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Reached for a mask that a checkpoint lacks: without this it would stay uninitialised memory.
        if getattr(module, "weight_mask", None) is not None:
            init.copy_(module.weight_mask, full_mask(module.weight.shape, module.weight_mask.device))


def built_anew(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """A module like another one that was just built, with values of its own; both refer to the same configuration."""
    copied = copy.deepcopy(module, {id(config): config})
    reset_parameters(copied)
    return copied


def reset_parameters(module: nn.Module) -> None:
    """Draws as many random numbers as building the module anew."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def make_model_class(
    stock: type[PreTrainedModel],
    mixin: type,
    config: type[PreTrainedConfig],
    module: str,
    names: dict,
    maskable_names: Callable[[PreTrainedConfig], list[str]],
) -> type[PreTrainedModel]:
    """The multi-head class over a stock class, put among the ``names`` of a ``module``.

    Pickles and the code of checkpoints look for it there.

    Args:
        stock: the stock class.
        mixin: what the class adds to it.
        config: the class of its configurations.
        maskable_names: the weights that can carry masks in the whole model of a configuration.
    """
    forward = plain_forward(stock)
    namespace = {
        "__module__": module,
        "__doc__": f"{stock.__name__} with several heads over one backbone. {mixin.__doc__}",
        "__annotations__": {"config": config},
        "config_class": config,
        "stock_class": stock,
        "stock_forward": staticmethod(forward),
        "stock_arguments": frozenset(inspect.signature(forward).parameters),
        "maskable_names": staticmethod(maskable_names),
    }
    made = type(PREFIX + stock.__name__, (mixin, stock), namespace)
    names[made.__name__] = made
    return made
