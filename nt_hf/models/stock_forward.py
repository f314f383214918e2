"""The forward pass of a stock model, run once on stand-ins: what would each of its blocks be called with?

Only the stock ``forward`` knows how a family scales embeddings, makes masks and positions. So it runs as it is, on a
stand-in for the model whose blocks hand their input on unchanged and record their arguments. The blocks themselves
run afterwards with these arguments, the backbone once and then head after head. What a stand-in cannot show (something
happens between the blocks, a block is called twice) is refused.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from .transformers_versions import CACHE


class StandIn:
    """An object that differs from another in some attributes, for a method of the other's class."""

    def __init__(self, original: Any, replaced: Mapping[str, Any]):
        self.__dict__.update(replaced)
        self._original = original

    def __getattr__(self, name: str):
        return getattr(self._original, name)


class TrailCache(Cache):
    """A key-value cache as one trail sees it: its blocks' slots, counted by depth.

    Args:
        cache: with a slot for each block of the backbone and of every head.
        slots: those of one trail, by depth.
    """

    def __init__(self, cache: Cache, slots: Sequence[int]):
        self.all_slots, self.slots = cache, slots

    @property
    def layers(self) -> list:
        layers = self.all_slots.layers
        return [layers[slot] for slot in self.slots if slot < len(layers)]  # slots may be made when they are filled

    def __getattr__(self, name: str):
        return getattr(self.__dict__["all_slots"], name)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        return self.all_slots.update(key_states, value_states, self.slots[layer_idx], *args, **kwargs)

    def sized_by_heads(self, backbone: int) -> "TrailCache":
        """The same, but what is asked of a backbone slot is said of a slot of the same kind in the head."""
        layers, slots = self.all_slots.layers, self.slots
        alike = {type(layers[slot]): slot for slot in reversed(slots[backbone:]) if slot < len(layers)}
        kinds = [type(layers[slot]) if slot < len(layers) else None for slot in slots[:backbone]]
        return TrailCache(self.all_slots, [*map(alike.get, kinds, slots[:backbone]), *slots[backbone:]])


class _TupleExpected(NotImplementedError):
    pass


@dataclass
class BlockCalls:
    """What a stock forward pass calls its blocks with.

    It knows nothing of the stand-ins that fill it: a cycle of references would keep the graph of the pass alive until
    the garbage collector comes by.

    Attributes:
        first_input: of the first block, ``[batch, seq, hidden_size]``.
        arguments: of each block, by depth, beside its input.
    """

    family: str
    as_tuple: bool = False
    first_input: torch.Tensor | None = None
    arguments: list[tuple[tuple, dict]] = field(default_factory=list)

    def add(self, depth: int, hidden: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor | tuple[torch.Tensor]:
        if depth != len(self.arguments):
            raise NotImplementedError(f"{self.family}: a block is called twice, or out of order")
        if depth == 0:
            self.first_input = hidden
        self.arguments.append((args, kwargs))
        return (self.unchanged(hidden),) if self.as_tuple else self.unchanged(hidden)

    def unchanged(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden is not self.first_input:
            if hidden.dim() < self.first_input.dim() and not self.as_tuple:
                raise _TupleExpected(f"{self.family}: the first of what a block returns is taken")
            raise NotImplementedError(f"{self.family}: something happens to the hidden states between the blocks")
        return hidden

    def run(
        self, blocks: Iterable[nn.Module], depth: int, hidden: torch.Tensor, cache: TrailCache | None
    ) -> torch.Tensor:
        """The output of a trail's blocks from ``depth`` on, called as in the recorded pass, with the trail's cache."""
        for block, (args, kwargs) in zip(blocks, self.arguments[depth:]):
            if cache is not None:
                args = [cache if isinstance(value, TrailCache) else value for value in args]
                kwargs = {name: cache if isinstance(value, TrailCache) else value for name, value in kwargs.items()}
            hidden = block(hidden, *args, **kwargs)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden


class _RecordingBlock(StandIn):
    """Stands for a block: hands its input on, and records the other arguments."""

    def __init__(self, block: nn.Module, calls: BlockCalls, depth: int):
        super().__init__(block, {"_record": functools.partial(calls.add, depth)})

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs):
        return self._record(hidden_states, args, kwargs)


def recording_blocks(blocks: Sequence[nn.Module], calls: BlockCalls) -> list[_RecordingBlock]:
    """Stand-ins for blocks, which record what they are called with."""
    return [_RecordingBlock(block, calls, depth) for depth, block in enumerate(blocks)]


@dataclass(frozen=True)
class StockParts:
    """Where a stock base model keeps what a multi-head model takes apart.

    Attributes:
        stack: name of the list of blocks.
        norm: name of the final norm.
        as_tuple: whether its forward pass expects tuples of its blocks.
    """

    stack: str
    norm: str
    as_tuple: bool

    def record(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        replaced: Mapping[str, Any],
        cache: TrailCache | None,
        **inputs,
    ) -> BlockCalls:
        """Runs the stock forward pass of ``model`` on stand-ins for ``blocks``.

        Args:
            model: of a class made by ``model_class``.
            blocks: of one trail.
            replaced: other parts of the model for this pass.
            cache: of the trail.
            inputs: of the forward pass.
        """
        calls = BlockCalls(model.stock_class.__name__, self.as_tuple)
        stand_ins = recording_blocks(blocks, calls)
        stand_in = StandIn(model, {**replaced, self.stack: stand_ins, self.norm: calls.unchanged})
        if "position_ids" not in model.stock_arguments:  # positions follow from the mask
            del inputs["position_ids"]
        if cache is not None:
            inputs[CACHE] = cache
        model.stock_forward(stand_in, **inputs)
        return calls


def plain_forward(stock_class: type) -> Callable:
    """A stock class's forward pass without its decorators.

    One that collects hidden states would take them from the multi-head model's own.
    """
    return inspect.unwrap(stock_class.forward)


def find_parts(stock_class: type[PreTrainedModel], config: PreTrainedConfig) -> StockParts:
    """Looks at a stock base model, whether it can have heads, on the meta device: no weight is allocated.

    Args:
        stock_class: of the base model.
        config: a configuration of it.

    Raises:
        NotImplementedError: it cannot; the message names the class and what stands in the way.
    """
    name = stock_class.__name__
    if getattr(config, "num_kv_shared_layers", 0):
        raise NotImplementedError(f"{name}: num_kv_shared_layers={config.num_kv_shared_layers}: accepted is 0")
    if getattr(config, "output_router_logits", False):
        raise NotImplementedError(f"{name}: output_router_logits=True: accepted is False, no router loss is added")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise NotImplementedError(f"{name}: accepted are decoders without an encoder and cross-attention")
    with torch.device("meta"):
        model = stock_class(copy.deepcopy(config))
    children = dict(model.named_children())
    depth = config.num_hidden_layers
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise NotImplementedError(f"{name}: layer_types {sorted(kinds)}: accepted are full and sliding attention")
    stacks = [key for key, child in children.items() if isinstance(child, nn.ModuleList) and len(child) == depth]
    if len(stacks) != 1:
        raise NotImplementedError(f"{name}: accepted are models of one stack of {depth} blocks")
    model.config._attn_implementation = "eager"  # whose masks are made without a look at their values
    try:
        try:
            return _probe(model, stacks[0], as_tuple=False)
        except _TupleExpected:
            return _probe(model, stacks[0], as_tuple=True)
    except NotImplementedError as error:
        raise NotImplementedError(f"{name} cannot have heads: {error}") from error
    except Exception as error:  # of any kind: it does something else than the pass that is looked for
        raise NotImplementedError(
            f"{name} cannot have heads: accepted are an embedding, blocks that are called one after another, and a "
            f"norm ({' '.join(str(error).split())})"
        ) from error


def _probe(model: PreTrainedModel, stack: str, as_tuple: bool) -> StockParts:
    """Finds the final norm: the child that is called once, and with what the last block returned."""
    blocks = getattr(model, stack)
    calls = BlockCalls(type(model).__name__, as_tuple)
    passes: list[tuple[str, bool, torch.Tensor]] = []  # of its other children: name, whether after the blocks, output

    def note(name: str, args: tuple, output: torch.Tensor) -> None:
        last = len(calls.arguments) == len(blocks) and any(value is calls.first_input for value in args[:1])
        passes.append((name, last, output))

    for name, child in model.named_children():
        child.register_forward_hook(lambda _, args, output, name=name: note(name, args, output))
    ids, mask = torch.ones(2, 1, 3, dtype=torch.long, device="meta")
    stand_in = StandIn(model, {stack: recording_blocks(blocks, calls)})
    output = plain_forward(type(model))(stand_in, input_ids=ids, attention_mask=mask, use_cache=False)
    if len(calls.arguments) != len(blocks):
        raise NotImplementedError(f"{len(calls.arguments)} of {len(blocks)} blocks are called")
    norms = [(name, normed) for name, last, normed in passes if last]
    if len(norms) != 1 or [name for name, *_ in passes].count(norms[0][0]) != 1:
        raise NotImplementedError("accepted are models of one final norm, used once, after the blocks")
    norm, normed = norms[0]
    if output.last_hidden_state.untyped_storage()._cdata != normed.untyped_storage()._cdata:
        raise NotImplementedError("something happens to the hidden states after the final norm")
    return StockParts(stack, norm, as_tuple)


class _BaseOutput:
    """The output of a base model that has nothing but its last hidden states."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return (self.last_hidden_state, None)[index]


class StockLogits:
    """What a stock causal LM makes of its base model's states: logits, which it may scale or cap.

    Args:
        model_class: the multi-head class of the causal LM.
        config: a stock configuration of it.

    Attributes:
        are_plain: whether the logits are what the LM head returns, and nothing else.
        has_bias: whether the LM head has one.
        attributes: plain attributes of the causal LM.

    Raises:
        NotImplementedError: it has more parts than a base model and an LM head.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig):
        stock_class = model_class.stock_class
        with torch.device("meta"):
            shell = stock_class(copy.deepcopy(config))
        lm_head, children = shell.get_output_embeddings(), dict(shell.named_children())
        names = [name for name, child in children.items() if child is lm_head]
        bases = [name for name, child in children.items() if isinstance(child, PreTrainedModel)]
        if [len(names), len(bases), len(children)] != [1, 1, 2] or type(lm_head) is not nn.Linear:
            raise NotImplementedError(
                f"{stock_class.__name__} cannot have heads: accepted are a base model and one linear LM head, this has "
                f"{', '.join(children)}"
            )
        self.model_class, self.base_name, self.name = model_class, bases[0], names[0]
        self.has_bias = lm_head.bias is not None
        self.attributes = {
            name: value
            for name, value in vars(shell).items()
            if not name.startswith("_") and isinstance(value, (bool, int, float, str, type(None)))
        }
        self.attributes.pop("training")
        self.config = shell.config
        received: list[torch.Tensor] = []
        states, logits = torch.ones(1, 1, 2, device="cpu"), torch.ones(1, 1, 3, device="cpu")
        try:
            finished = self(lambda hidden: received.append(hidden) or logits, states)
        except Exception as error:  # of any kind: it asks more of its parts than their outputs
            raise NotImplementedError(
                f"{stock_class.__name__} cannot have heads: accepted are models that call a base model and an LM head, "
                f"and this one asks for more ({error})"
            ) from error
        self.are_plain = finished is logits and torch.equal(received[0], states)

    def __call__(self, lm_head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """The logits ``[..., vocab]`` of ``states`` ``[..., hidden_size]``, by the stock class's own forward pass."""
        hidden = states if states.dim() == 3 else states.flatten(0, -2).unsqueeze(0)
        output = _BaseOutput(hidden)
        parts = {self.base_name: lambda *_, **__: output, self.name: lm_head, "config": self.config, **self.attributes}
        keep = {"logits_to_keep": 0} if "logits_to_keep" in self.model_class.stock_arguments else {}
        stand_in = StandIn(self.model_class.stock_class, parts)
        logits = self.model_class.stock_forward(stand_in, inputs_embeds=hidden, **keep).logits
        return logits if states.dim() == 3 else logits.view(*states.shape[:-1], -1)
