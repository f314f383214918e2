"""Self-speculative decoding: one trail drafts, the other heads verify, the output is the ensemble's.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318) with a draft model
that is a part of the model itself. A round drafts up to ``k`` tokens with one trail and keeps its backbone states,
cache entries and logits. Then each other head runs once over all ``k`` positions, from the stored backbone states:
nothing of the draft is computed again. A round costs ``k`` passes of a trail and one of the other heads, which reads
their weights once instead of ``k`` times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from .lm_heads import by_head
from .transformers_versions import CACHE

#: Positions of the longest round: a choice, so that a round's logits stay small.
MAX_DRAFT = 16


@dataclass
class Speculation:
    """What the rounds of one call did.

    Attributes:
        drafted: of each round, the positions ``k`` that the draft trail ran.
        emitted: of each round, the tokens that came out of it, at least 1.
        refused: of each round, whether the ensemble refused a draft.
    """

    drafted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    refused: list[bool] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts looked at that the ensemble accepted, in a batch: for all unfinished rows."""
        accepted, refused = sum(self.emitted) - len(self.emitted), sum(self.refused)
        return accepted / max(1, accepted + refused)


class DraftLength:
    """Chooses ``k``, the positions of a round, from the drafts accepted so far.

    From counts alone, not from measured times, so that a seed gives the same samples again.

    Args:
        verification_cost: of running the other heads over a round's positions, in passes of the draft trail. A few
            positions cost as much as one, for what takes the time is reading the weights.
    """

    DECAY = 0.9  # of earlier rounds in the estimate, so that it follows the text
    PRIOR = (3.2, 0.8)  # accepted and refused drafts before the first round

    def __init__(self, verification_cost: float):
        self.cost = verification_cost
        self.accepted, self.refused = self.PRIOR

    def add(self, accepted: int, refused: bool) -> None:
        """Counts a round's drafts."""
        self.accepted = self.DECAY * self.accepted + accepted
        self.refused = self.DECAY * self.refused + refused

    def choose(self, limit: int) -> int:
        """The ``k`` from 1 to ``limit`` with the most expected tokens for its cost."""
        rate = self.accepted / (self.accepted + self.refused)
        best, best_value, tokens, chance = 1, 0.0, 0.0, 1.0
        for k in range(1, min(limit, MAX_DRAFT) + 1):
            tokens += chance  # position k counts if all drafts before it were accepted
            chance *= rate
            if tokens / (k + self.cost) > best_value:
                best, best_value = k, tokens / (k + self.cost)
        return best


def verification_cost(model: nn.Module, draft: int, others: Sequence[int]) -> float:
    """Weights of the ``others`` heads divided by those of the draft trail."""

    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def head(h: int) -> int:
        return count(model.model.heads[h].layers, model.lm_heads[h])

    return sum(map(head, others)) / max(1, count(model.model.layers) + head(draft))


def accept(
    target: torch.Tensor, draft: torch.Tensor | None, token: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One position of speculative sampling: tokens ``[batch]`` of the target distribution, and whether drafts stand.

    Args:
        target, draft: probabilities ``[batch, vocab]``; the drafted ``token`` ``[batch]`` was drawn from ``draft``.
            ``None``: there is no draft, a token is drawn from the target, and stands.
    """
    if draft is None:
        return torch.multinomial(target, 1).squeeze(1), torch.ones(len(target), dtype=torch.bool, device=target.device)
    place = token.unsqueeze(1)
    p, q = target.gather(1, place).squeeze(1), draft.gather(1, place).squeeze(1)
    accepted = torch.rand_like(p) * q < p
    if accepted.all():
        return token, accepted
    # What the target has more of than the draft gave it. Rounding can leave nothing of it: then both are the same.
    rest = (target - draft).clamp(min=0)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, target)
    return torch.where(accepted, token, torch.multinomial(rest, 1).squeeze(1)), accepted


class _Decoding:
    """The state of one call of ``generate_speculatively``: the tokens so far, the rows that go on, the cache."""

    def __init__(
        self,
        model: nn.Module,
        draft: int,
        heads: Sequence[int],
        combine: Callable[[list[torch.Tensor]], torch.Tensor],
        input_ids: torch.LongTensor,
        logits_processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        stopping_criteria: Callable,
        config,
        streamer,
    ):
        self.model, self.draft, self.heads, self.combine = model, draft, heads, combine
        self.others = [head for head in heads if head != draft]
        self.input_ids = input_ids
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.config, self.streamer = config, streamer
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.stops_early = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.scores: list[torch.Tensor] = []
        self.raw_logits: list[torch.Tensor] = []

    def prefill(self, model_kwargs: dict, observe: Callable[[list[torch.Tensor], int], None] | None) -> None:
        """Runs the prompt through all heads and emits the first token."""
        attention_mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        outputs = self.model._prefill(
            self.input_ids, self.config, model_kwargs | {"output_head_logits": observe is not None}
        )
        self.emit(outputs.logits[:, -1:])
        if observe is not None:
            observe(list(outputs.head_logits[:, :, -1:]), 1)
        self.cache = outputs[CACHE]
        if position_ids is not None:
            self.next_position = position_ids[..., -1:] + 1
        elif attention_mask is not None:
            self.next_position = attention_mask.sum(-1, keepdim=True)
        else:
            # Not from the ids, which are empty after a prompt of embeddings.
            seen = max(layer.get_seq_length() for layer in self.cache.layers)
            self.next_position = torch.full((1, 1), seen, device=self.input_ids.device)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # attention without a mask is faster
        self.attention_mask = attention_mask

    def process(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The logits ``[batch, vocab]`` that the next token of ``ids`` is chosen by."""
        return self.logits_processor(ids, logits.to(copy=True, dtype=torch.float32, device=ids.device))

    def emit(
        self, logits: torch.Tensor, drafts: Sequence[torch.Tensor] = (), proposals: Sequence[torch.Tensor | None] = ()
    ) -> tuple[int, bool]:
        """Appends the tokens of logits ``[batch, k, vocab]`` up to the first refused draft.

        Returns:
            How many tokens were appended, and whether a draft was refused.
        """
        for i in range(logits.shape[1]):
            processed = self.process(self.input_ids, logits[:, i])
            token, proposal = (drafts[i], proposals[i]) if i < len(drafts) else (None, None)
            if self.config.do_sample:
                tokens, accepted = accept(processed.softmax(-1), proposal, token)
            else:
                tokens = processed.argmax(-1)
                accepted = self.unfinished if token is None else tokens == token
            if self.stops_early:
                tokens = torch.where(self.unfinished, tokens, self.config._pad_token_tensor)
            self.input_ids = torch.cat([self.input_ids, tokens[:, None]], 1)
            if self.config.output_scores:
                self.scores.append(processed)
            if self.config.output_logits:
                self.raw_logits.append(logits[:, i].float())
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            refused = bool((self.unfinished & ~accepted).any())
            self.unfinished = self.unfinished & ~self.stopping_criteria(self.input_ids, tuple(self.scores))
            if refused or not self.unfinished.any():
                break
        return i + 1, refused

    def run(self, position: int, count: int, heads: Sequence[int], **inputs) -> object:
        """The base model over ``count`` positions of a round, from its ``position`` on."""
        mask = None if self.attention_mask is None else _with_ones(self.attention_mask, position + count)
        positions = self.next_position + position + torch.arange(count, device=self.next_position.device)
        return self.model.model(
            **inputs, attention_mask=mask, position_ids=positions, cache=self.cache, use_cache=True,
            active_heads=heads, return_dict=True,
        )  # fmt: skip

    def round(self, k: int) -> tuple[list[torch.Tensor], int, bool]:
        """Drafts up to ``k`` tokens with one trail, verifies them with the other heads, and emits what stands.

        Returns:
            Each head's logits ``[batch, k, vocab]``, how many tokens were emitted, and whether a draft was refused.
        """
        states, logits, drafts, proposals = [], [], [], []
        ids = self.input_ids
        for i in range(k):
            output = self.run(i, 1, [self.draft], input_ids=ids[:, -1:])
            states.append(output.backbone_states)
            logits.append(self.model.head_logits(self.draft, output.last_hidden_state))
            if i < k - 1:
                processed = self.process(ids, logits[-1][:, -1])
                sampling = self.config.do_sample
                proposals.append(processed.softmax(-1) if sampling else None)
                token = torch.multinomial(proposals[-1], 1).squeeze(1) if sampling else processed.argmax(-1)
                drafts.append(token)
                ids = torch.cat([ids, token[:, None]], 1)
        logits_of = {self.draft: torch.cat(logits, 1)}
        if self.others:
            # Heads with embeddings of their own share no states.
            known = {"input_ids": ids[:, -k:]} if states[0] is None else {"backbone_states": torch.cat(states, 1)}
            hidden = by_head(self.run(0, k, self.others, **known).last_hidden_state, self.model.config.hidden_size)
            logits_of |= {head: self.model.head_logits(head, x) for head, x in zip(self.others, hidden)}
        head_logits = [logits_of[head] for head in self.heads]
        emitted, refused = self.emit(self.combine(head_logits), drafts, proposals)
        for layer in self.cache.layers:
            if layer.is_initialized:  # those of inactive heads are not
                layer.crop(emitted - k)
        self.next_position = self.next_position + emitted
        if self.attention_mask is not None:
            self.attention_mask = _with_ones(self.attention_mask, emitted)
        return head_logits, emitted, refused


@torch.no_grad()
def generate_speculatively(
    model: nn.Module,
    draft: int,
    heads: Sequence[int],
    combine: Callable[[list[torch.Tensor]], torch.Tensor],
    input_ids: torch.LongTensor,
    logits_processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stopping_criteria: Callable,
    generation_config,
    streamer=None,
    observe: Callable[[list[torch.Tensor], int], None] | None = None,
    **model_kwargs,
) -> GenerateDecoderOnlyOutput | torch.LongTensor:
    """``GenerationMixin._sample``, greedy or sampling, with drafts of one trail.

    A batch advances together: a round emits up to the first position where a row that is not finished refuses its
    draft. What other rows had accepted beyond it is drafted again, which keeps the distribution: whether a token is
    looked at depends on earlier positions only.

    Args:
        model: a multi-head causal LM.
        draft: the head of the trail that drafts, one of ``heads``.
        heads: of the ensemble, in the order in which ``combine`` takes their logits ``[batch, k, vocab]``.
        observe: called with these logits and the number of positions whose tokens were emitted.
        input_ids ... model_kwargs: as ``generate`` prepares them for ``_sample``.

    Raises:
        ValueError: no cache, a cache that cannot be shortened, or attentions or hidden states are asked for.
    """
    config = generation_config
    if config.output_attentions or config.output_hidden_states:
        raise ValueError("trail_draft with output_attentions or output_hidden_states: accepted are False")
    cache = model_kwargs.get(CACHE)
    # Older releases cannot run several passes over a window that has slid and slide it back then.
    kinds = (DynamicLayer, DynamicSlidingWindowLayer) if hasattr(DynamicCache, "is_recording_past") else (DynamicLayer,)
    if not isinstance(cache, DynamicCache) or not all(type(layer) in kinds for layer in cache.layers):
        kind = type(cache).__name__ if cache is not None else f"use_cache={model_kwargs.get('use_cache')}"
        raise ValueError(
            f"trail_draft with {kind}: accepted is the default cache, a DynamicCache that is not offloaded (over "
            "sliding windows from Transformers 5.24 on)"
        )

    cache.activate_past_recording()  # so that a window that has slid can slide back
    decoding = _Decoding(model, draft, heads, combine, input_ids, logits_processor, stopping_criteria, config, streamer)
    length = DraftLength(verification_cost(model, draft, decoding.others))
    speculation = Speculation()
    decoding.prefill(model_kwargs, observe)
    while decoding.unfinished.any():
        room = config.max_length - decoding.input_ids.shape[1] if config.max_length is not None else MAX_DRAFT
        k = length.choose(max(1, room))
        head_logits, emitted, refused = decoding.round(k)
        if observe is not None:
            observe(head_logits, emitted)
        length.add(emitted - 1, refused)
        speculation.drafted.append(k)
        speculation.emitted.append(emitted)
        speculation.refused.append(refused)

    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return decoding.input_ids
    output = GenerateDecoderOnlyOutput(
        sequences=decoding.input_ids,
        scores=tuple(decoding.scores) if config.output_scores else None,
        logits=tuple(decoding.raw_logits) if config.output_logits else None,
        **{CACHE: decoding.cache},
    )
    output["speculation"] = speculation
    return output


def _with_ones(mask: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)
