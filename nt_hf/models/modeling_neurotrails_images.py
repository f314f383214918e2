"""Image classifiers with several heads over one backbone, built from the blocks of a stock model.

As with decoders (see the modeling_neurotrails module), the stock base model is taken apart and its own forward pass
runs on stand-ins: once up to the blocks, and once more after each head's last block, for what a family does then
(norm, pooling). Blocks are the layers of a transformer, or the residual blocks of all stages of a convolutional
network. What comes after the blocks and has weights or statistics, such as a batch norm, exists once a head.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput

from .configuration_neurotrails import PREFIX, make_config_class
from .ensemble import Uncertainty, combine_logits, uncertainty
from .forward_arguments import checked_forward
from .image_parts import Returns, find_parts
from .losses import HeadByHead
from .masks import attach_masks, maskable_modules
from .multi_head import MultiHeadMixin, select_heads, trainable
from .multi_head_pretrained import (
    MultiHeadBase,
    MultiHeadPreTrained,
    built_anew,
    make_model_class,
    reset_parameters,
)
from .stock_forward import BlockCalls, StandIn
from .trails import TrailsMixin
from .wide_resnet import WideResNetConfig, WideResNetForImageClassification, WideResNetModel

WIDE_RESNETS = {cls.__name__: cls for cls in (WideResNetConfig, WideResNetForImageClassification, WideResNetModel)}


@dataclass
class MultiHeadImageOutput(ModelOutput):
    """Output of a multi-head image model without classifiers.

    Attributes:
        last_hidden_state: of each active head, ``[heads, batch, ...]`` with what the stock model has after the batch.
        pooler_output: of each active head, where the stock model has one.
        backbone_states: the backbone's output; ``None`` where nothing is shared.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    backbone_states: torch.FloatTensor | None = None


@dataclass
class NeuroTrailsImageClassifierOutput(ImageClassifierOutput):
    """Output of a multi-head image classifier.

    Attributes:
        loss: mean of ``head_losses``, a scalar.
        logits: the ensemble's, ``[batch, num_labels]``. ``None`` in training mode with labels.
        head_losses: mean cross-entropy of each active head, ``[M]``, in nats.
        head_logits: ``[M, batch, num_labels]``, with ``output_head_logits=True``.
        uncertainty: each measure ``[batch]``, with ``output_uncertainty=True``.
    """

    head_losses: torch.FloatTensor | None = None
    head_logits: torch.FloatTensor | None = None
    uncertainty: Uncertainty | None = None


class MultiHeadImageModel(MultiHeadBase):
    """Backbone and heads, without classifiers; goes before a stock base model."""

    def build(self, config: PreTrainedConfig) -> None:
        self.build_of_parts(config, find_parts(_classifier_class(config), config.to_stock_config()))

    def trunk(self, pixel_values: torch.Tensor, heads: Sequence[int]) -> tuple[list[BlockCalls], list[torch.Tensor]]:
        """The calls of the blocks and the backbone's output, once for all heads or for each."""
        own_batches = pixel_values.dim() == 5
        if own_batches and len(pixel_values) != len(heads):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}, a batch for each head: accepted are {len(heads)} "
                "batches, one for each active head"
            )
        batches = list(pixel_values) if own_batches else [pixel_values]
        if not self.config.share_embedding:
            batches = batches if own_batches else batches * len(heads)
        every, states = [], []
        for index, batch in enumerate(batches):
            replaced = self.own_parts(heads[index]) | {name: Returns(batch) for name in self._parts.after}
            calls, _ = self._parts.run(self, self.trail_blocks(heads[index]), replaced, batch)
            every.append(calls)
            states.append(self.run_blocks(calls, self.layers, 0, calls.first_input))
        return (every, states) if len(every) == len(heads) else (every * len(heads), states * len(heads))

    def run_blocks(
        self, calls: BlockCalls, blocks: Sequence[nn.Module], depth: int, hidden: torch.Tensor
    ) -> torch.Tensor:
        """The output of a trail's blocks from ``depth`` on."""
        if not self._parts.has_stages:
            return calls.run(blocks, depth, hidden, None)
        for block in blocks:
            hidden = block(hidden)
        return hidden

    def run_head(self, head: int, calls: BlockCalls, states: torch.Tensor) -> Any:
        """The stock base model's output of a trail, from the backbone's states."""
        hidden = self.run_blocks(calls, self.heads[head].layers, self.config.num_backbone_layers, states)
        own = self.own_parts(head)
        names = self._parts.before
        skipped = {name: Returns(hidden, own[name] if name in own else getattr(self, name)) for name in names}
        return self._parts.run(self, [], own | skipped, hidden)[1]

    @checked_forward
    def forward(
        self, pixel_values: torch.Tensor | None = None, active_heads: Sequence[int] | None = None, **kwargs
    ) -> MultiHeadImageOutput:
        """Runs the backbone once and each active head on its output.

        Args:
            pixel_values: ``[batch, channels, height, width]``, or ``[active heads, batch, ...]``, a batch for each.
            active_heads: the heads to run, all by default.
        """
        _refuse(self, kwargs)
        heads = select_heads(self.config, active_heads)
        calls, states = self.trunk(pixel_values, heads)
        outputs = [self.run_head(head, *values) for head, *values in zip(heads, calls, states)]
        pooled = [output.pooler_output for output in outputs]
        shared = self.config.share_embedding and pixel_values.dim() == 4
        return MultiHeadImageOutput(
            last_hidden_state=torch.stack([output.last_hidden_state for output in outputs]),
            pooler_output=None if pooled[0] is None else torch.stack(pooled),
            backbone_states=states[0] if shared else None,
        )


def _refuse(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Raises ``TypeError`` for what Transformers hands through a forward pass and image models do nothing with."""
    asked = {name: getattr(model.config, name) for name in ("output_hidden_states", "output_attentions")} | options
    if names := [name for name, value in asked.items() if value and name != "return_dict"]:
        raise TypeError(
            f"{type(model).__name__}.forward: {', '.join(names)}: not known to image models of several heads; accepted "
            "are these with a stock model, extract_trail(h)"
        )


class MultiHeadForImageClassification(MultiHeadMixin, TrailsMixin, MultiHeadPreTrained):
    """Several heads over one backbone, whose classifications are combined; goes before a stock image classifier."""

    accepts_loss_kwargs = False  # so that ``Trainer`` divides the loss, a mean, by the passes of a step

    def build(self, config: PreTrainedConfig) -> None:
        parts = find_parts(self.stock_class, config.to_stock_config())
        # Not the stock class's own ``__init__``, which would build a trail more.
        next(base for base in self.stock_class.__mro__[1:] if issubclass(base, PreTrainedModel)).__init__(self, config)
        self._parts, self.num_labels = parts, config.num_labels
        with torch.device("meta"):
            stock = getattr(self.stock_class(config.to_stock_config()), parts.classifier)
        self.model = base_class(type(self))(config)
        classifiers = [built_anew(stock, config) for _ in range(config.num_ensemble_heads)]
        self.classifiers = nn.ModuleList(classifiers)
        if self.device.type != "meta":
            self.classifiers.to_empty(device=self.device)
            for classifier in self.classifiers:
                reset_parameters(classifier)
        self.post_init()
        attach_masks(self, config.masked_modules)

    def head_logits(self, head: int, output: Any) -> torch.Tensor:
        """The logits ``[batch, num_labels]`` of one head from the stock base model's output of its trail."""
        parts = {self._parts.base: lambda *_, **__: output, self._parts.classifier: self.classifiers[head]}
        return type(self).stock_forward(StandIn(self, parts), output.last_hidden_state).logits

    @checked_forward
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        active_heads: Sequence[int] | None = None,
        output_head_logits: bool = False,
        output_uncertainty: bool = False,
        **kwargs,
    ) -> NeuroTrailsImageClassifierOutput:
        """Classifies images by every active head and their ensemble.

        Args:
            pixel_values: ``[batch, channels, height, width]``; in training also ``[M, batch, ...]``, a batch for each
                of the ``M`` active heads, and ``labels`` likewise.
            labels: classes ``[batch]``, or shares of classes ``[batch, num_labels]``.
            active_heads: the heads to use, all by default; loss and ensemble are over these.
            output_head_logits: also return the heads' logits ``[M, batch, num_labels]``.
            output_uncertainty: also return an ``Uncertainty`` over the active heads.
        """
        _refuse(self, kwargs)
        heads = select_heads(self.config, active_heads)
        own_batches = pixel_values is not None and pixel_values.dim() == 5
        wants_logits = labels is None or not self.training or output_head_logits or output_uncertainty
        if own_batches and (wants_logits or len(labels) != len(heads)):
            raise ValueError(
                "pixel_values with a batch for each head: accepted are labels with one, too, in training mode, without "
                "output_head_logits and output_uncertainty: the logits of different images have no ensemble"
            )
        calls, states = self.model.trunk(pixel_values, heads)
        targets = labels if own_batches else [labels] * len(heads)
        if not wants_logits:
            losses = torch.stack([self._loss(*values) for values in zip(heads, calls, states, targets)])
            return NeuroTrailsImageClassifierOutput(loss=losses.mean(), head_losses=losses)
        outputs = (self.model.run_head(head, *values) for head, *values in zip(heads, calls, states))
        logits = [self.head_logits(head, output) for head, output in zip(heads, outputs)]
        losses = None
        if labels is not None:
            losses = torch.stack([nn.functional.cross_entropy(x.float(), labels) for x in logits])
        return NeuroTrailsImageClassifierOutput(
            loss=None if losses is None else losses.mean(),
            logits=combine_logits(logits, self.config.ensemble_mode),
            head_losses=losses,
            head_logits=torch.stack(logits) if output_head_logits else None,
            uncertainty=uncertainty(logits) if output_uncertainty else None,
        )

    def _loss(self, head: int, calls: BlockCalls, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of one head, whose gradients are computed along with it where nobody is to see the graph."""

        def loss(states: torch.Tensor) -> torch.Tensor:
            logits = self.head_logits(head, self.model.run_head(head, calls, states))
            return nn.functional.cross_entropy(logits.float(), labels)

        modules = [self.model.heads[head], self.classifiers[head]]
        if not self.may_compute_gradients_early(modules):
            return loss(states)
        return HeadByHead.apply(loss, states, *trainable(*modules))

    def _trail(self, head: int, stock: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
        classifier = getattr(stock, self._parts.classifier)
        return [*self.model.trail_modules(head, getattr(stock, self._parts.base)), (self.classifiers[head], classifier)]


def maskable_names(config: PreTrainedConfig) -> list[str]:
    with torch.device("meta"):
        return list(maskable_modules(image_class(config)(config)))


def _classifier_class(config: PreTrainedConfig | type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The stock classifier's class of a configuration, stock or multi-head.

    Raises:
        ValueError: it is no image classifier's.
    """
    kind = config if isinstance(config, type) else type(config)
    kind = getattr(kind, "stock_class", kind)
    if kind not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{kind.__name__} (model_type={kind.model_type!r}): accepted are the families that "
            "AutoModelForImageClassification knows, such as resnet, vit, convnext, wide_resnet"
        )
    classes = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[kind]
    return classes[0] if isinstance(classes, tuple) else classes


@functools.cache
def config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of multi-head configurations over a stock image classifier's.

    Raises:
        ValueError: the stock class is no image classifier's.
    """
    _classifier_class(stock)
    return make_config_class(stock, __name__, globals())


def base_class(model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The multi-head base model's class, of a multi-head classifier's."""
    return model_class(transformers.MODEL_MAPPING[model.stock_class.config_class])


def image_class(config: PreTrainedConfig | type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The multi-head class for a configuration, stock or multi-head, of an image classifier."""
    return model_class(_classifier_class(config))


@functools.cache
def model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The multi-head class over a stock image model or classifier, made when it is asked for the first time."""
    is_classifier = stock is _classifier_class(stock.config_class)
    mixin = MultiHeadForImageClassification if is_classifier else MultiHeadImageModel
    made = make_model_class(stock, mixin, config_class(stock.config_class), __name__, globals(), maskable_names)
    made.register_for_auto_class("AutoModelForImageClassification" if is_classifier else "AutoModel")
    return made


def __getattr__(name: str):
    # Imports, pickles and ``auto_map`` entries find a class that nobody has asked for yet.
    stock = None
    if name.startswith(PREFIX):
        name_of_stock = name.removeprefix(PREFIX)
        stock = WIDE_RESNETS.get(name_of_stock) or getattr(transformers, name_of_stock, None)
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return config_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return model_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
