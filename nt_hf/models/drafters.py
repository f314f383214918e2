"""What proposes tokens for speculative decoding: a trail of the ensemble, or a model of its own."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache

from .lm_heads import by_head
from .speculative import Decoding, DraftLength, check_cache, crop
from .transformers_versions import CACHE

# Each head's logits [batch, k, vocab]; k - 1 drafts [batch]; and of each its distribution [batch, vocab], if sampled.
Round = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]


class TrailDrafter:
    """Drafts with the trail of a head, whose backbone states and logits are parts of the ensemble's."""

    def __init__(self, model: nn.Module, head: int, heads: Sequence[int]):
        self.model, self.head, self.heads = model, head, heads
        self.others = [other for other in heads if other != head]
        self.length = DraftLength(verification_cost(model, head, self.others))

    def prefill(self, decoding: Decoding) -> None:
        """Nothing: the ensemble's pass over the prompt was the trail's, too."""

    def round(self, decoding: Decoding, limit: int) -> Round:
        """Runs the trail over up to ``limit`` positions, one by one, then the other heads over all."""
        self.length.begin(limit, decoding.apart)
        states, logits, drafts, proposals = [], [], [], []
        tokens = decoding.last_tokens(1)
        goes_on = True
        while goes_on:
            output = decoding.run_heads(len(drafts), 1, [self.head], input_ids=tokens[:, -1:])
            states.append(output.backbone_states)
            logits.append(self.model.head_logits(self.head, output.last_hidden_state))
            token, proposal, confidences = propose(decoding, logits[-1][:, -1], drafts)
            if goes_on := self.length.goes_on(confidences):
                drafts.append(token)
                proposals.append(proposal)
                tokens = torch.cat([tokens, token[:, None]], 1)
        logits_of = {self.head: torch.cat(logits, 1)}
        if self.others:
            # Heads with embeddings of their own share no states.
            shared = states[0] is not None
            known = {"backbone_states": torch.cat(states, 1)} if shared else {"input_ids": tokens}
            logits_of |= run(self.model, decoding, tokens.shape[1], self.others, **known)
        return [logits_of[head] for head in self.heads], drafts, proposals

    def crop(self, columns: int) -> None:
        """Nothing: the cache is the ensemble's."""


class ModelDrafter:
    """Drafts with a stock model of the same vocabulary, which has a cache of its own.

    That cache lacks the last two tokens of every row, the ensemble's the last one: the first pass of a round reads two.
    So a round adds the same columns to both, however many drafts stand.

    Raises:
        ValueError: the vocabulary is another, or the draft's cache cannot be shortened.
    """

    def __init__(self, model: nn.Module, draft: nn.Module, heads: Sequence[int]):
        sizes = model.config.vocab_size, draft.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(f"trail_draft: a model with vocab_size={sizes[1]}: accepted is {sizes[0]}")
        self.model, self.draft, self.heads = model, draft, heads
        self.takes_positions = "position_ids" in inspect.signature(draft.forward).parameters
        self.cache = DynamicCache(config=draft.config)
        check_cache(self.cache)
        self.cache.activate_past_recording()
        self.length = DraftLength(max(0.0, bytes_read(model) / bytes_read(draft) - 1))

    def prefill(self, decoding: Decoding) -> None:
        """Runs the draft over the prompt without its last token.

        Raises:
            ValueError: the prompt has embeddings instead of tokens.
        """
        prompt = decoding.input_ids[:, :-1]
        columns = decoding.prompt_mask.shape[1]
        if prompt.shape[1] + 1 != columns:
            raise ValueError("trail_draft: a model with inputs_embeds: accepted are input_ids")
        if prompt.shape[1]:
            offsets = torch.arange(-columns, -1, device=decoding.next_position.device)
            self._run(decoding, prompt, 0, (decoding.next_position + offsets).clamp(min=0))

    def _run(self, decoding: Decoding, ids: torch.Tensor, added: int, positions: torch.Tensor) -> torch.Tensor:
        """The draft's logits ``[batch, vocab]`` after the last of ``ids``."""
        arguments = {"input_ids": ids, "attention_mask": decoding.mask(added, without_last=True)}
        if self.takes_positions:
            arguments["position_ids"] = positions.expand(len(ids), -1)
        arguments = {key: x.to(self.draft.device) for key, x in arguments.items() if x is not None}
        return self.draft(**arguments, **{CACHE: self.cache}, use_cache=True).logits[:, -1]

    def round(self, decoding: Decoding, limit: int) -> Round:
        """Runs the draft up to ``limit - 1`` times, and once at least, then the ensemble over all positions."""
        self.length.begin(limit - 1, decoding.apart)
        drafts, proposals = [], []
        inputs, added = decoding.last_tokens(2), 0
        tokens = inputs[:, 1:]
        goes_on = True
        while goes_on:
            offsets = torch.arange(added - 1, added - 1 + inputs.shape[1], device=decoding.next_position.device)
            added += inputs.shape[1]
            logits = self._run(decoding, inputs, added, decoding.next_position + offsets)
            token, proposal, confidences = propose(decoding, logits, drafts)
            drafts.append(token)
            proposals.append(proposal)
            inputs = token[:, None]
            tokens = torch.cat([tokens, inputs], 1)
            goes_on = self.length.goes_on(confidences)
        logits_of = run(self.model, decoding, tokens.shape[1], self.heads, input_ids=tokens)
        return [logits_of[head] for head in self.heads], drafts, proposals

    def crop(self, columns: int) -> None:
        """Takes the last ``columns`` of a round out of the draft's cache."""
        crop(self.cache, columns)


def propose(
    decoding: Decoding, logits: torch.Tensor, drafts: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, list[float]]:
    """Draws the draft after ``drafts`` from logits ``[batch, vocab]``.

    Returns:
        The tokens ``[batch]``; if they were sampled, their distributions ``[batch, vocab]``; and their probabilities in
        the rows that go on.
    """
    contexts = {row: torch.cat([ids, *(d[row : row + 1] for d in drafts)]) for row, ids in enumerate(decoding.rows)}
    distribution = decoding.process(contexts, logits).softmax(-1)
    sampled = decoding.config.do_sample
    token = torch.multinomial(distribution, 1) if sampled else distribution.argmax(-1, keepdim=True)
    confidences = distribution.gather(1, token)[decoding.active(), 0].tolist()
    return token.squeeze(1), distribution if sampled else None, confidences


def run(model: nn.Module, decoding: Decoding, k: int, heads: Sequence[int], **inputs) -> dict[int, torch.Tensor]:
    """By head, the logits ``[batch, k, vocab]`` of a round."""
    hidden = decoding.run_heads(0, k, heads, **inputs).last_hidden_state
    states = by_head(hidden, model.config.hidden_size)
    return {head: model.head_logits(head, x) for head, x in zip(heads, states)}


def verification_cost(model: nn.Module, draft: int, others: Sequence[int]) -> float:
    """Weights of the ``others`` heads divided by those of the draft trail."""

    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def head(h: int) -> int:
        return count(model.model.heads[h].layers, model.lm_heads[h])

    return sum(map(head, others)) / max(1, count(model.model.layers) + head(draft))


def bytes_read(model: nn.Module) -> int:
    """Of the matrices that a pass multiplies by, at least 1; a pass over few tokens reads little else."""
    layers = [layer for layer in model.modules() if not isinstance(layer, nn.Embedding)]
    tensors = (x for layer in layers for x in (*layer.parameters(False), *layer.buffers(False)))
    return max(1, sum(x.numel() * x.element_size() for x in tensors if x.dim() > 1 and x.dtype != torch.bool))
