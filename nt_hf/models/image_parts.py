"""Where a stock image classifier keeps its blocks, and passes of its base model on stand-ins for them.

Nothing here knows a family: a probe on the meta device shows whether a classifier is what is looked for.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .stock_forward import BlockCalls, StandIn, plain_forward, recording_blocks


class Returns(StandIn):
    """Stands for a module and returns what it was given, whatever it is called with."""

    def __init__(self, value: Any, module: nn.Module | None = None):
        super().__init__(module, {"_value": value})

    def __call__(self, *args, **kwargs):
        return self._value


class _Noted(StandIn):
    """Stands for a part of a base model and notes when it is called; after the blocks it is idle."""

    def __init__(self, module: nn.Module, name: str, calls: BlockCalls, called: list[tuple[str, bool]]):
        super().__init__(module, {"_name": name, "_calls": calls, "_called": called})

    def __call__(self, *args, **kwargs):
        late = bool(self._calls.arguments)
        self._called.append((self._name, late))
        return args[0] if late else self._original(*args, **kwargs)


class _Encoder(StandIn):
    """Stands for a module that calls the blocks: runs its stock forward pass on stand-ins for them."""

    def __call__(self, *args, **kwargs):
        return plain_forward(type(self._original))(self, *args, **kwargs)


class _Stages(StandIn):
    """Stands for an encoder of stages: records its input and hands it on."""

    def __init__(self, calls: BlockCalls):
        super().__init__(None, {"_calls": calls})

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> BaseModelOutput:
        self._calls.add(0, hidden_states, (), {})
        return BaseModelOutput(last_hidden_state=hidden_states)


@dataclass(frozen=True)
class ImageParts:
    """Where a stock image classifier keeps what a multi-head model takes apart.

    Attributes:
        base: name of its base model.
        classifier: name of its classifier.
        stack: in the base model, name of the list of blocks, or of the encoder that holds them.
        blocks: in the encoder, name of the list of blocks, or ``"stages"``; empty where there is no encoder.
        encoder: the encoder without its blocks.
        before: names of the base model's children that run before the blocks.
        after: names of the base model's children that run after the blocks and have weights or buffers, each by itself:
            a head calls it the same.
        options: of the base model's ``__init__``.
    """

    base: str
    classifier: str
    stack: str
    blocks: str
    encoder: nn.Module | None
    before: tuple[str, ...]
    after: Mapping[str, str]
    options: Mapping[str, bool]

    @property
    def has_stages(self) -> bool:
        return self.blocks == "stages"

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a stock base model, in order.

        Between stages some families have modules that halve the image; such a module is one with the block that
        follows.
        """
        child = getattr(model, self.stack)
        if not self.has_stages:
            return list(getattr(child, self.blocks) if self.blocks else child)
        blocks = []
        for stage in child.stages:
            before = [module for name, part in stage.named_children() if name != "layers" for module in part.children()]
            for layer in stage.layers:
                blocks.append(nn.Sequential(*before, layer) if before else layer)
                before = []
        return blocks

    def run(
        self, model: nn.Module, blocks: Sequence[nn.Module], replaced: Mapping[str, Any], pixel_values: torch.Tensor
    ) -> tuple[BlockCalls, Any]:
        """Runs a base model's stock forward pass on stand-ins for its blocks: what they are called with, its output.

        Args:
            model: of a class made by ``model_class``, or a stock model with these attributes.
            blocks: of one trail; none if the pass is to run without them.
            replaced: other parts of the model for this pass.
            pixel_values: ``[batch, channels, height, width]``, or whatever the replaced parts take in its place.
        """
        calls = BlockCalls(model.stock_class.__name__)
        stack = self.recorder(blocks, calls)
        return calls, model.stock_forward(StandIn(model, {**replaced, self.stack: stack}), pixel_values)

    def recorder(self, blocks: Sequence[nn.Module], calls: BlockCalls) -> Any:
        """What stands for ``stack``: it hands its input on and records what the blocks are called with."""
        if self.has_stages:
            return _Stages(calls)
        recording = recording_blocks(blocks, calls)
        return _Encoder(self.encoder, {self.blocks: recording}) if self.blocks else recording


def find_parts(stock_class: type[PreTrainedModel], config: PreTrainedConfig) -> ImageParts:
    """Looks at a stock classifier, whether it can have heads, on the meta device: no weight is allocated.

    Raises:
        NotImplementedError: it cannot; the message names the class and what stands in the way.
    """
    name = stock_class.__name__
    with torch.device("meta"):
        shell = stock_class(copy.deepcopy(config)).eval()
    children = dict(shell.named_children())
    bases = [key for key, child in children.items() if isinstance(child, PreTrainedModel)]
    others = [key for key in children if key not in bases]
    if len(bases) != 1 or len(others) != 1:
        raise NotImplementedError(
            f"{name} cannot have heads: accepted are a base model and one classifier, this has {', '.join(children)}"
        )
    base = children[bases[0]]
    depths = getattr(config, "depths", None)
    depth = config.num_hidden_layers if depths is None else sum(depths)
    stacks = [(key, blocks) for key, x in base.named_children() if (blocks := _blocks_name(x, depth)) is not None]
    if len(stacks) != 1:
        raise NotImplementedError(
            f"{name} cannot have heads: accepted are models of one stack of {depth} blocks, or of stages with layers"
        )
    stack, blocks = stacks[0]
    parts = ImageParts(
        base=bases[0],
        classifier=others[0],
        stack=stack,
        blocks=blocks,
        encoder=getattr(base, stack) if blocks else None,
        before=(),
        after={},
        options={"add_pooling_layer": False} if getattr(base, "pooler", base) is None else {},
    )
    try:
        parts = _probe(parts, base, depth)
    except Exception as error:  # of any kind: it does something else than the pass that is looked for
        raise NotImplementedError(
            f"{name} cannot have heads: accepted are blocks that are called one after another, on nothing but the "
            f"output of the one before ({' '.join(str(error).split())})"
        ) from error
    if parts.encoder is not None:
        setattr(parts.encoder, blocks, nn.ModuleList())
    return parts


def _blocks_name(child: nn.Module, depth: int) -> str | None:
    """How a child of a base model holds the blocks, see ``ImageParts.blocks``; ``None`` if it does not."""
    if isinstance(child, nn.ModuleList):
        return "" if len(child) == depth else None
    inner = dict(child.named_children())
    if isinstance(inner.get("stages"), nn.ModuleList) and all(hasattr(stage, "layers") for stage in child.stages):
        return "stages"
    lists = [name for name, x in inner.items() if isinstance(x, nn.ModuleList) and len(x) == depth]
    return lists[0] if len(lists) == len(inner) == 1 else None


def _probe(parts: ImageParts, base: PreTrainedModel, depth: int) -> ImageParts:
    """Fills in what comes before and after the blocks, by a pass around them and one after them, as of a model's head.

    Raises:
        NotImplementedError: the passes are not those of a multi-head model. Errors of other kinds say the same.
    """
    config, children = base.config, dict(base.named_children())
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.zeros(3, config.num_channels, height, width, device="meta")
    blocks, forward = parts.blocks_of(base), plain_forward(type(base))
    if len(blocks) != depth:
        raise NotImplementedError(f"it has {len(blocks)} blocks, its configuration speaks of {depth}")
    called: list[tuple[str, bool]] = []
    calls = BlockCalls(type(base).__name__)
    noted = {key: _Noted(child, key, calls, called) for key, child in children.items() if key != parts.stack}
    forward(StandIn(base, {**noted, parts.stack: parts.recorder(blocks, calls)}), pixels)
    if len(calls.arguments) != (1 if parts.has_stages else depth):
        raise NotImplementedError(f"{len(calls.arguments)} of {depth} blocks are called")
    if twice := {key for key, late in called if (key, not late) in called}:
        raise NotImplementedError(f"{', '.join(sorted(twice))}: used before and after the blocks")
    if parts.has_stages:
        hidden = _run_stages(getattr(base, parts.stack), blocks, calls.first_input)
    else:
        hidden = calls.run(blocks, 0, calls.first_input, None)
    before = tuple(dict.fromkeys(key for key, late in called if not late))
    skipped = {name: Returns(hidden, children[name]) for name in before}
    forward(StandIn(base, {**skipped, parts.stack: parts.recorder([], BlockCalls(type(base).__name__))}), hidden)
    has_state = {key for key, child in children.items() if [*child.parameters(), *child.buffers()]}
    after = {key: key for key, late in called if late and key in has_state}
    return dataclasses.replace(parts, before=before, after=after)


def _run_stages(encoder: nn.Module, blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    """The output of an encoder of stages.

    Raises:
        NotImplementedError: it does more than call its blocks one after another.
    """
    chain = [part for x in blocks for part in (x if type(x) is nn.Sequential else [x])]
    states, alone = [hidden], []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        expected = chain[len(alone)] if len(alone) < len(chain) else None
        alone.append(module is expected and not kwargs and len(args) == 1 and args[0] is states[-1])
        states.append(output)

    handles = [part.register_forward_hook(note, with_kwargs=True) for part in chain]
    result = encoder(hidden).last_hidden_state
    for handle in handles:
        handle.remove()
    if not (all(alone) and len(alone) == len(chain) and states[-1] is result):
        raise NotImplementedError("its stages do more than call their layers in turn")
    return result
