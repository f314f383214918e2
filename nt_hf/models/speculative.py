"""Speculative decoding of an ensemble: a trail or a small model drafts, the heads verify, the output is the ensemble's.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318) in rounds of ``k``
positions, of two kinds:

- A trail drafts (``TrailDrafter`` of the drafters module). It runs all ``k`` positions and keeps its backbone states,
  cache entries and logits. Then each other head runs once over them, from the stored backbone states: nothing of the
  draft is computed again. A round costs ``k`` passes of a trail and one of the other heads, which reads their weights
  once instead of ``k`` times.
- A model of its own drafts (``ModelDrafter``), such as a trail in eight bits. A round costs ``k - 1`` passes of it and
  one pass of the ensemble over ``k`` positions.

The rows of a batch advance apart, each by the drafts that stand in it. What is in the cache beyond them is a hole, and
the row's attention mask leaves it out. That is exact where positions enter by rotary embeddings and attention has no
window; elsewhere all rows advance by the least.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from .ensemble import Uncertainty, UncertaintyRecorder, uncertainty
from .transformers_versions import CACHE

#: Positions of the longest round: a choice, so that a round's logits stay small.
MAX_DRAFT = 16


@dataclass
class Speculation:
    """What the rounds of one call did.

    Attributes:
        drafted: of each round, its positions ``k``: the tokens that a row can get from it.
        emitted: of each round, the tokens that came out of it, of all rows together.
        accepted: of each round, how many of them were drafts that stood.
        refused: of each round, in how many rows the ensemble refused a draft.
    """

    drafted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts looked at that the ensemble accepted."""
        return sum(self.accepted) / max(1, sum(self.accepted) + sum(self.refused))


class DraftLength:
    """Decides how many positions a round has, from how likely the drafts are to stand.

    That a draft stands is about as likely as drafts of its confidence, the probability that the draft model gave the
    token, have stood so far. From counts alone, not from measured times, so that a seed gives the same samples again.

    Args:
        verification_cost: what a round costs beyond one pass of the draft for each of its positions, in such passes. A
            few positions cost as much as one, for what takes the time is reading the weights.
    """

    BINS = 10  # of confidence
    PRIOR = (1.6, 0.4)  # drafts that stood and did not, of each bin, before the first round
    DECAY = 0.97  # of what a bin has beyond that, by each round: so it follows the text, and tries again in the end

    def __init__(self, verification_cost: float):
        self.cost = verification_cost
        self.accepted, self.refused = ([count] * self.BINS for count in self.PRIOR)

    def begin(self, limit: int, apart: bool) -> None:
        """Begins a round of up to ``limit`` positions, in a batch whose rows advance apart or do not."""
        self.limit, self.apart = limit, apart
        self.positions, self.tokens = 1, None
        self.bins: list[list[int]] = []

    def goes_on(self, confidences: Sequence[float]) -> bool:
        """Whether another position pays, after the drafts of the one before it, with each active row's confidence."""
        bins = [min(int(confidence * self.BINS), self.BINS - 1) for confidence in confidences]
        stand = [self.accepted[i] / (self.accepted[i] + self.refused[i]) for i in bins]
        if not self.apart:  # a position counts if the drafts of all rows stand
            stand = [math.prod(stand)]
        if self.tokens is None:
            self.chances, self.tokens = [1.0] * len(stand), float(len(stand))
        self.bins.append(bins)
        self.chances = [chance * one for chance, one in zip(self.chances, stand)]
        if self.positions >= self.limit or sum(self.chances) <= self.tokens / (self.positions + self.cost):
            return False
        self.positions += 1
        self.tokens += sum(self.chances)
        return True

    def add(self, accepted: Sequence[int], refused: Sequence[bool]) -> None:
        """Counts, of each active row, the first drafts that stood and whether the next one was refused."""
        for counts, prior in zip((self.accepted, self.refused), self.PRIOR):
            counts[:] = (prior + self.DECAY * (count - prior) for count in counts)
        for row, (stood, failed) in enumerate(zip(accepted, refused)):
            for position in range(stood + failed):
                counts = self.accepted if position < stood else self.refused
                counts[self.bins[position][row]] += 1


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


class Decoding:
    """The state of one call of ``generate_speculatively``: each row's tokens, which rows go on, the cache.

    Attributes:
        input_ids: the prompt ``[batch, n]``.
        rows: each row's tokens so far, with the prompt.
        apart: whether rows advance apart.
        speculation: what the rounds did.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Sequence[int],
        combine: Callable[[list[torch.Tensor]], torch.Tensor],
        input_ids: torch.LongTensor,
        logits_processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        stopping_criteria: Callable,
        config,
        streamer,
        recorder: UncertaintyRecorder | None,
    ):
        self.model, self.heads, self.combine, self.recorder = model, heads, combine, recorder
        self.input_ids, self.rows = input_ids, list(input_ids)
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.config, self.streamer = config, streamer
        self.ends: list[int | None] = [None] * len(input_ids)  # the length at which a row met a stopping criterion
        # Without an end-of-sequence token, plain decoding lengthens every row until the last one has met a criterion.
        self.stops_early = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.scores, self.raw_logits, self.measures = ([[] for _ in input_ids] for _ in range(3))
        self.speculation = Speculation()

    def active(self) -> list[int]:
        """The rows that need more tokens."""
        unfinished = [row for row, end in enumerate(self.ends) if end is None]
        if self.stops_early:
            return unfinished
        if unfinished:
            return unfinished if self.apart else list(range(len(self.rows)))
        return [row for row, tokens in enumerate(self.rows) if len(tokens) < max(self.ends)]

    def prefill(self, model_kwargs: dict) -> None:
        """Runs the prompt through all heads and emits the first token."""
        attention_mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        each = {"output_head_logits": self.recorder is not None}
        outputs = self.model._prefill(self.input_ids, self.config, model_kwargs | each)
        self.cache = outputs[CACHE]
        windowed = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in self.cache.layers)
        self.apart = bool(getattr(self.model.config, "rope_parameters", None)) and not windowed
        # Not from the ids, which are empty after a prompt of embeddings.
        seen = max(layer.get_seq_length() for layer in self.cache.layers)
        batch, device = len(self.rows), self.input_ids.device
        if position_ids is not None:
            self.next_position = position_ids[..., -1:] + 1
        elif attention_mask is not None:
            self.next_position = attention_mask.sum(-1, keepdim=True)
        else:
            self.next_position = torch.full((1, 1), seen, device=device)
        ones = torch.ones(batch, seen, dtype=torch.long, device=device)
        self.prompt_mask = ones if attention_mask is None else attention_mask
        self.kept = self.prompt_mask.new_ones(batch, 0)  # of the columns that rounds added, those that count in a row
        self.needs_mask = not bool(self.prompt_mask.all())  # attention without a mask is faster
        head_logits = list(outputs.head_logits[:, :, -1:]) if self.recorder else []
        self._emit(outputs.logits[:, -1:], head_logits, [], [])

    def last_tokens(self, count: int) -> torch.Tensor:
        """The last tokens of every row, ``[batch, count]``."""
        return torch.stack([row[-count:] for row in self.rows])

    def process(self, contexts: dict[int, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """The logits ``[rows, vocab]`` that the next token of each row's context is chosen by."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        by_length: dict[int, list[int]] = {}
        for row, context in contexts.items():
            by_length.setdefault(len(context), []).append(row)
        places = {row: place for place, row in enumerate(contexts)}
        for rows in by_length.values():
            # Processors may keep something for each row of the batch, so they always get all of them: beside the rows
            # of one length copies of the first of these.
            full = [row if row in rows else rows[0] for row in range(len(self.rows))]
            scores = self.logits_processor(
                torch.stack([contexts[row] for row in full]), logits[[places[row] for row in full]]
            )
            if len(by_length) == 1 and len(rows) == len(full):
                return scores
            logits[[places[row] for row in rows]] = scores[rows]
        return logits

    def run_heads(self, position: int, count: int, heads: Sequence[int], **inputs) -> object:
        """The base model over ``count`` positions of a round, from its ``position`` on."""
        positions = self.next_position + position + torch.arange(count, device=self.next_position.device)
        return self.model.model(
            **inputs, attention_mask=self.mask(position + count), position_ids=positions, cache=self.cache,
            use_cache=True, active_heads=heads, return_dict=True,
        )  # fmt: skip

    def mask(self, added: int, without_last: bool = False) -> torch.Tensor | None:
        """Of the prompt, what rounds kept, and ``added`` columns; ``without_last``: of a prompt one token shorter."""
        if not self.needs_mask:
            return None
        prompt = self.prompt_mask[:, :-1] if without_last else self.prompt_mask
        return torch.cat([prompt, self.kept, self.kept.new_ones(len(self.kept), added)], 1)

    def round(self, drafter) -> None:
        """Drafts, verifies, emits what stands, and takes the rest out of the caches."""
        active, limit = self.active(), MAX_DRAFT
        if self.config.max_length is not None:
            limit = min(limit, self.config.max_length - min(len(self.rows[row]) for row in active))
        head_logits, drafts, proposals = drafter.round(self, limit)
        logits = self.combine(head_logits)
        k = logits.shape[1]
        counts, refused = self._emit(logits, head_logits, drafts, proposals)
        longest = max(counts)
        crop(self.cache, k - longest)
        drafter.crop(k - longest)
        # A row that goes on later must find its cache as it was; one that has ended for good needs no mask.
        idle = longest if self.stops_early else 0
        advanced = torch.tensor([[count or idle] for count in counts], device=self.kept.device)
        kept = torch.arange(longest, device=self.kept.device) < advanced
        self.needs_mask |= not bool(kept.all())
        self.kept = torch.cat([self.kept, kept.to(self.kept.dtype)], 1)
        self.next_position = self.next_position + advanced.to(self.next_position.device)
        refusals = [refused[row] for row in active]
        accepted = [min(counts[row], k - 1) - refused[row] for row in active]
        drafter.length.add(accepted, refusals)
        self.speculation.drafted.append(k)
        self.speculation.emitted.append(sum(counts))
        self.speculation.accepted.append(sum(accepted))
        self.speculation.refused.append(sum(refusals))

    def _emit(
        self,
        logits: torch.Tensor,
        head_logits: list[torch.Tensor],
        drafts: Sequence[torch.Tensor],
        proposals: Sequence[torch.Tensor | None],
    ) -> tuple[list[int], list[bool]]:
        """Appends to every active row the tokens of logits ``[batch, k, vocab]`` up to its first refused draft.

        Returns:
            Of every row, how many tokens were appended, and whether a draft was refused.
        """
        counts, refused = [0] * len(self.rows), [False] * len(self.rows)
        going = self.active()
        for i in range(logits.shape[1]):
            raw = logits[going, i]
            processed = self.process({row: self.rows[row] for row in going}, raw)
            token, proposal = (drafts[i], proposals[i]) if i < len(drafts) else (None, None)
            token = None if token is None else token[going]
            if self.config.do_sample:
                tokens, stand = accept(processed.softmax(-1), None if proposal is None else proposal[going], token)
            else:
                tokens = processed.argmax(-1)
                stand = torch.ones_like(tokens, dtype=torch.bool) if token is None else tokens == token
            for j, (row, stands) in enumerate(zip(going, stand.tolist())):
                self._append(row, tokens[j : j + 1], processed[j], raw[j])
                counts[row], refused[row] = i + 1, not stands
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            active = set(self.active())
            going = [row for row in going if row in active and not refused[row]]
            if not going or (not self.apart and any(refused[row] for row in active)):
                break
        if self.recorder is not None:
            measured = torch.stack(uncertainty(head_logits).to_tuple(), -1)  # [batch, k, measures]
            for row, count in enumerate(counts):
                self.measures[row].append(measured[row, :count])
        return counts, refused

    def _append(self, row: int, token: torch.Tensor, processed: torch.Tensor, raw: torch.Tensor) -> None:
        self.rows[row] = torch.cat([self.rows[row], token])
        if self.config.output_scores:
            self.scores[row].append(processed)
        if self.config.output_logits:
            self.raw_logits[row].append(raw.float())
        scores = tuple(score[None] for score in self.scores[row])
        if self.ends[row] is None and bool(self.stopping_criteria(self.rows[row][None], scores)[0]):
            self.ends[row] = len(self.rows[row])

    def output(self) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        """What ``generate`` returns; rows that have ended are padded."""
        longest = max(map(len, self.rows))
        pad = self.config._pad_token_tensor if self.stops_early else 0
        sequences = self.input_ids.new_empty(len(self.rows), longest)
        for row, tokens in enumerate(self.rows):
            sequences[row, : len(tokens)], sequences[row, len(tokens) :] = tokens, pad
        if self.recorder is not None:
            measures = nn.utils.rnn.pad_sequence([torch.cat(m) for m in self.measures], True, math.nan)
            self.recorder.add(Uncertainty(*measures.unbind(-1)), measures.shape[1])
        if not self.config.return_dict_in_generate:
            return sequences
        output = GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_by_step(self.scores) if self.config.output_scores else None,
            logits=_by_step(self.raw_logits) if self.config.output_logits else None,
            **{CACHE: self.cache},
        )
        output["speculation"] = self.speculation
        return output


def _by_step(rows: Sequence[Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Of every row's steps ``[vocab]`` each step's ``[batch, vocab]``, 0 where a row has ended."""
    return tuple(nn.utils.rnn.pad_sequence([torch.stack(list(row)) for row in rows]).unbind())


def crop(cache: DynamicCache, columns: int) -> None:
    """Takes the last ``columns`` out of a cache; 0 takes a sliding window back to its size."""
    for layer in cache.layers:
        if layer.is_initialized:  # those of inactive heads are not
            layer.crop(-columns)


def check_cache(cache: object, use_cache: object = None) -> None:
    """Refuses a cache that cannot be shortened.

    Raises:
        ValueError: the cache is another than a ``DynamicCache`` of layers that can.
    """
    # Older releases cannot run several passes over a window that has slid and slide it back then.
    kinds = (DynamicLayer, DynamicSlidingWindowLayer) if hasattr(DynamicCache, "is_recording_past") else (DynamicLayer,)
    if not isinstance(cache, DynamicCache) or not all(type(layer) in kinds for layer in cache.layers):
        kind = type(cache).__name__ if cache is not None else f"use_cache={use_cache}"
        raise ValueError(
            f"trail_draft with {kind}: accepted is the default cache, a DynamicCache that is not offloaded (over "
            "sliding windows from Transformers 5.24 on)"
        )


@torch.no_grad()
def generate_speculatively(
    model: nn.Module,
    drafter,
    heads: Sequence[int],
    combine: Callable[[list[torch.Tensor]], torch.Tensor],
    input_ids: torch.LongTensor,
    logits_processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stopping_criteria: Callable,
    generation_config,
    streamer=None,
    recorder: UncertaintyRecorder | None = None,
    **model_kwargs,
) -> GenerateDecoderOnlyOutput | torch.LongTensor:
    """``GenerationMixin._sample``, greedy or sampling, with drafts.

    Args:
        model: a multi-head causal LM.
        drafter: one of the drafters module.
        heads: of the ensemble, in the order in which ``combine`` takes their logits ``[batch, k, vocab]``.
        recorder: is given the uncertainty of every new token, NaN where a row has ended.
        input_ids ... model_kwargs: as ``generate`` prepares them for ``_sample``.

    Raises:
        ValueError: no cache, a cache that cannot be shortened, or attentions or hidden states are asked for.
    """
    config = generation_config
    if config.output_attentions or config.output_hidden_states:
        raise ValueError("trail_draft with output_attentions or output_hidden_states: accepted are False")
    cache = model_kwargs.get(CACHE)
    check_cache(cache, model_kwargs.get("use_cache"))
    cache.activate_past_recording()  # so that a window that has slid can slide back
    decoding = Decoding(
        model, heads, combine, input_ids, logits_processor, stopping_criteria, config, streamer, recorder
    )
    decoding.prefill(model_kwargs)
    if decoding.active():
        drafter.prefill(decoding)
    while decoding.active():
        decoding.round(drafter)
    if streamer is not None:
        streamer.end()
    return decoding.output()
