"""What multi-head base models and models with LM heads or classifiers share, before a stock ``PreTrainedModel``."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .checkpoint_files import CheckpointFilesMixin
from .configuration_neurotrails import PREFIX
from .masks import attach_masks, full_mask
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


class Parts(Protocol):
    """Where a stock base model keeps what a multi-head model takes apart.

    Attributes:
        stack: name of the child that holds the blocks.
        after: the children that come after the blocks and exist once a head, and what a head calls them.
        options: of the base model's ``__init__``.
    """

    stack: str
    after: Mapping[str, str]
    options: Mapping[str, Any]

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a stock base model, in order."""


class NeuroTrailsHead(nn.Module):
    """The last blocks of one trail and what comes after them (the LM head or classifier lies beside the base model).

    Args:
        embeddings: what comes before the blocks, by name, where each head has its own.
        layers: the blocks.
        after: what comes after them, by name.
    """

    def __init__(
        self, embeddings: Mapping[str, nn.Module], layers: Iterable[nn.Module], after: Mapping[str, nn.Module]
    ):
        super().__init__()
        for name, module in {**embeddings, "layers": nn.ModuleList(layers), **after}.items():
            self.add_module(name, module)


class MultiHeadBase(MultiHeadPreTrained):
    """Backbone and heads, without LM heads or classifiers; goes before a stock base model."""

    def build_of_parts(self, config: PreTrainedConfig, parts: Parts) -> None:
        """What ``build`` does once it is known where the stock model keeps its parts."""
        # Past the module's own attributes, which exist only when the stock ``__init__`` has begun.
        self.__dict__["_parts"] = parts
        self.stock_class.__init__(self, config, **parts.options)
        attach_masks(self, config.masked_modules, prefix="model.", strict=False)

    def post_init(self) -> None:
        # The stock ``__init__`` ends here: a trail of its own has been built, and nothing is initialised yet.
        self._take_apart()
        super().post_init()

    def _take_apart(self) -> None:
        """Makes backbone and heads of the stock model's parts, which are built anew for further heads."""
        config, parts = self.config, self._parts
        blocks, modules, backbone = parts.blocks_of(self), dict(self._modules), config.num_backbone_layers
        embeddings = {}
        if not config.share_embedding:
            others = {key: x for key, x in modules.items() if x is not None and key not in (parts.stack, *parts.after)}
            embeddings = {name: child for name, child in others.items() if any(True for _ in child.parameters())}
        after = {own_name: modules[name] for name, own_name in parts.after.items()}
        heads = [NeuroTrailsHead(embeddings, blocks[backbone:], after)]
        heads += [built_anew(heads[0], config) for _ in range(1, config.num_ensemble_heads)]
        self._modules.clear()
        for name, child in modules.items():  # in the stock model's order, in which weights are initialised
            if name == parts.stack:
                self._modules["layers"] = nn.ModuleList(blocks[:backbone])
                self._modules["heads"] = nn.ModuleList(heads)
            elif name not in embeddings and name not in parts.after:
                self._modules[name] = child

    def trail_blocks(self, head: int) -> list[nn.Module]:
        """The blocks of one trail, by depth."""
        return [*self.layers, *self.heads[head].layers]

    def own_parts(self, head: int) -> dict[str, nn.Module]:
        """What a head has beside its blocks, by the stock model's names."""
        names = {own_name: name for name, own_name in self._parts.after.items()}
        children = self.heads[head].named_children()
        return {names.get(name, name): child for name, child in children if name != "layers"}

    def trail_modules(self, head: int, stock: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of corresponding modules: one trail's and a stock base model's, which lack the masks alone."""
        own = self.own_parts(head)
        others = [(name, child) for name, child in stock.named_children() if name != self._parts.stack]
        return [
            *zip(self.trail_blocks(head), self._parts.blocks_of(stock)),
            *((own[name] if name in own else getattr(self, name), child) for name, child in others),
        ]


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
