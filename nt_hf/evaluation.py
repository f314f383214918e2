"""Perplexity of the heads and of their ensemble, and how much the heads disagree."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .modeling_neurotrails_llama import IGNORE_INDEX, NeuroTrailsLlamaForCausalLM, combine_logits

# Positions whose logits of all heads exist at one time.
CHUNK = 512


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a loss in nats, infinite rather than an error where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass
class Perplexities:
    """Token-weighted results over a text.

    Attributes:
        tokens: number of predicted tokens.
        head_losses: mean negative log-likelihood of each head, in nats a token.
        ensemble_losses: the same of the ensemble, by mode (``"logits"``, ``"probs"``).
        disagreement: share of tokens for which the best guesses of two heads differ, the mean over all pairs; 0.0
            with one head.
        mode: the model's own ensemble mode.
    """

    tokens: int
    head_losses: list[float]
    ensemble_losses: dict[str, float]
    disagreement: float
    mode: str

    def to_dict(self) -> dict[str, Any]:
        """The losses and their exponentials, ready for JSON."""
        return {
            "tokens": self.tokens,
            "loss": self.ensemble_losses[self.mode],
            "perplexity": perplexity(self.ensemble_losses[self.mode]),
            "head_losses": self.head_losses,
            "head_perplexities": [perplexity(loss) for loss in self.head_losses],
            "ensemble_mode": self.mode,
            "ensemble_losses": self.ensemble_losses,
            "ensemble_perplexities": {mode: perplexity(loss) for mode, loss in self.ensemble_losses.items()},
            "disagreement": self.disagreement,
        }


@torch.no_grad()
def evaluate(
    model: NeuroTrailsLlamaForCausalLM,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    max_tokens: int | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> Perplexities:
    """Measures perplexities, every token weighing the same.

    Args:
        model: the model, not wrapped; it is left in the mode (train or eval) it was in.
        batches: dicts of ``input_ids``, ``attention_mask`` and ``labels`` ``[batch, seq]``, labels unshifted, -100
            ignored.
        max_tokens: stop after the first batch that reaches this many predicted tokens (of this process).
        autocast: makes the context to run the model in.
        reduce: sums a tensor over all processes.

    Raises:
        ValueError: there was no token to predict.
    """
    training = model.training
    model.eval()
    heads = model.config.num_ensemble_heads
    # [each head's loss, both ensembles' losses, disagreeing pairs, tokens]
    sums = torch.zeros(heads + 4, dtype=torch.float64)
    for batch in batches:
        batch = {key: value.to(model.device) for key, value in batch.items()}
        with autocast():
            sums += _batch_sums(model, batch).cpu()
        if max_tokens is not None and sums[-1] >= max_tokens:
            break
    model.train(training)
    sums = reduce(sums)
    *losses, logits_loss, probs_loss, disagreeing, tokens = sums.tolist()
    if not tokens:
        raise ValueError("the evaluation data has no token to predict: a text of at least two tokens is needed")
    pairs = heads * (heads - 1) // 2
    return Perplexities(
        tokens=int(tokens),
        head_losses=[loss / tokens for loss in losses],
        ensemble_losses={"logits": logits_loss / tokens, "probs": probs_loss / tokens},
        disagreement=disagreeing / tokens / pairs if pairs else 0.0,
        mode=model.config.ensemble_mode,
    )


def _batch_sums(model: NeuroTrailsLlamaForCausalLM, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["labels"][:, 1:]
    hidden = model.model(
        input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False
    ).last_hidden_state[:, :, :-1]
    keep = labels != IGNORE_INDEX
    hidden, labels = hidden[:, keep], labels[keep]
    total = torch.zeros(len(hidden) + 4, dtype=torch.float64, device=hidden.device)
    for start in range(0, labels.numel(), CHUNK):
        targets = labels[start : start + CHUNK, None]
        each = [head(x[start : start + CHUNK]).float() for head, x in zip(model.lm_heads, hidden)]
        ensembles = [combine_logits(each, mode) for mode in ("logits", "probs")]
        losses = [torch.logsumexp(z, -1).sum() - z.gather(-1, targets).sum() for z in [*each, *ensembles]]
        guesses = torch.stack([logits.argmax(-1) for logits in each])
        disagreeing = (guesses[:, None] != guesses[None]).sum() / 2
        total += torch.stack([x.double() for x in [*losses, disagreeing, targets.new_tensor(len(targets))]])
    return total
