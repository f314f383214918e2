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
from transformers.cache_utils import DynamicLayer
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
        model: a ``NeuroTrailsLlamaForCausalLM``.
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
    if not isinstance(cache, DynamicCache) or not all(type(layer) is DynamicLayer for layer in cache.layers):
        kind = type(cache).__name__ if cache is not None else f"use_cache={model_kwargs.get('use_cache')}"
        raise ValueError(
            f"trail_draft with {kind}: accepted is the default cache, a DynamicCache that is not offloaded"
        )

    others = [h for h in heads if h != draft]
    length = DraftLength(verification_cost(model, draft, others))
    speculation = Speculation()
    scores, raw_logits = [], []
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    stops_early = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = config._pad_token_tensor

    def process(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits_processor(ids, logits.to(copy=True, dtype=torch.float32, device=ids.device))

    def emit(
        logits: torch.Tensor, drafts: Sequence[torch.Tensor] = (), proposals: Sequence[torch.Tensor | None] = ()
    ) -> tuple[int, bool]:
        """Appends the tokens of logits ``[batch, k, vocab]`` up to the first refused draft; how many, and whether one
        was refused."""
        nonlocal input_ids, unfinished
        for i in range(logits.shape[1]):
            processed = process(input_ids, logits[:, i])
            token, proposal = (drafts[i], proposals[i]) if i < len(drafts) else (None, None)
            if config.do_sample:
                tokens, accepted = accept(processed.softmax(-1), proposal, token)
            else:
                tokens = processed.argmax(-1)
                accepted = unfinished if token is None else tokens == token
            if stops_early:
                tokens = torch.where(unfinished, tokens, pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            if config.output_scores:
                scores.append(processed)
            if config.output_logits:
                raw_logits.append(logits[:, i].float())
            if streamer is not None:
                streamer.put(tokens.cpu())
            refused = bool((unfinished & ~accepted).any())
            unfinished = unfinished & ~stopping_criteria(input_ids, tuple(scores))
            if refused or not unfinished.any():
                break
        return i + 1, refused

    attention_mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    outputs = model._prefill(input_ids, config, model_kwargs | {"output_head_logits": observe is not None})
    emit(outputs.logits[:, -1:])
    if observe is not None:
        observe(list(outputs.head_logits[:, :, -1:]), 1)
    cache = outputs[CACHE]
    del outputs

    if position_ids is not None:
        next_position = position_ids[..., -1:] + 1
    elif attention_mask is not None:
        next_position = attention_mask.sum(-1, keepdim=True)
    else:
        # Not from the ids, which are empty after a prompt of embeddings.
        seen = max(layer.get_seq_length() for layer in cache.layers)
        next_position = torch.full((1, 1), seen, device=input_ids.device)
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # attention without a mask is faster

    def run(position: int, count: int, heads: Sequence[int], **inputs) -> object:
        """The inner model over ``count`` positions of a round, from its ``position`` on."""
        mask = None if attention_mask is None else _with_ones(attention_mask, position + count)
        positions = next_position + position + torch.arange(count, device=next_position.device)
        return model.model(
            **inputs, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True,
            active_heads=heads, return_dict=True,
        )  # fmt: skip

    while unfinished.any():
        room = config.max_length - input_ids.shape[1] if config.max_length is not None else MAX_DRAFT
        k = length.choose(max(1, room))
        states, logits, drafts, proposals = [], [], [], []
        ids = input_ids
        for i in range(k):
            output = run(i, 1, [draft], input_ids=ids[:, -1:])
            states.append(output.backbone_states)
            logits.append(model.lm_heads[draft](output.last_hidden_state))
            if i < k - 1:
                processed = process(ids, logits[-1][:, -1])
                proposals.append(processed.softmax(-1) if config.do_sample else None)
                token = torch.multinomial(proposals[-1], 1).squeeze(1) if config.do_sample else processed.argmax(-1)
                drafts.append(token)
                ids = torch.cat([ids, token[:, None]], 1)
        each = {draft: torch.cat(logits, 1)}
        if others:
            # Heads with embeddings of their own share no states.
            known = {"input_ids": ids[:, -k:]} if states[0] is None else {"backbone_states": torch.cat(states, 1)}
            hidden = by_head(run(0, k, others, **known).last_hidden_state, model.config.hidden_size)
            each |= {h: model.lm_heads[h](x) for h, x in zip(others, hidden)}
        each = [each[h] for h in heads]
        emitted, refused = emit(combine(each), drafts, proposals)
        if observe is not None:
            observe(each, emitted)
        for layer in cache.layers:
            if layer.is_initialized:  # those of inactive heads are not
                layer.crop(emitted - k)
        next_position = next_position + emitted
        if attention_mask is not None:
            attention_mask = _with_ones(attention_mask, emitted)
        length.add(emitted - 1, refused)
        speculation.drafted.append(k)
        speculation.emitted.append(emitted)
        speculation.refused.append(refused)

    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    output = GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=tuple(scores) if config.output_scores else None,
        logits=tuple(raw_logits) if config.output_logits else None,
        **{CACHE: cache},
    )
    output["speculation"] = speculation
    return output


def _with_ones(mask: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)
