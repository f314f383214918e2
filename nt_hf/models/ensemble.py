"""What a model of several heads returns, how the heads' predictions combine, and how far they differ."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .configuration_neurotrails import ENSEMBLE_MODES

# Probabilities of one head that exist at one time when uncertainties are measured: 8 MB, so that a CPU's cache holds
# them.
UNCERTAINTY_CHUNK = 2**21


@dataclass
class Uncertainty(ModelOutput):
    """How unsure the heads are of the next token, and how far they differ.

    ``p_h`` is the next-token distribution of head ``h``, ``H`` an entropy in nats; means are over the ``M`` active
    heads. The probabilities are averaged in either ``ensemble_mode``: only so do the parts add up. Each measure is
    fp32, of shape ``[batch, seq]``; position ``t`` is about the prediction made there, of token ``t + 1``.

    Attributes:
        predictive_entropy: ``H[mean p_h]``, 0 to ``log(vocab)``: the whole uncertainty.
        mutual_information: ``H[mean p_h] - mean H[p_h]``, 0 to ``log(M)``, between the head and its prediction: the
            epistemic part (BALD, Houlsby et al. 2011, arXiv 1112.5745; ensembles of networks, Lakshminarayanan et al.
            2017, arXiv 1612.01474). What it leaves of the predictive entropy, the mean entropy of a head, is the
            aleatoric part (Depeweg et al. 2018, arXiv 1710.07283). 0 with one head.
        disagreement: the share of pairs of heads whose most probable tokens differ, 0 to 1; 0 with one head.
    """

    predictive_entropy: torch.FloatTensor | None = None
    mutual_information: torch.FloatTensor | None = None
    disagreement: torch.FloatTensor | None = None


@dataclass
class NeuroTrailsCausalLMOutput(CausalLMOutputWithPast):
    """Output of a multi-head causal LM.

    Attributes:
        loss: mean of ``head_losses``, a scalar.
        logits: the ensemble's prediction, ``[batch, seq, vocab]``. ``None`` in training mode with labels: the
            loss needs none, and holding them is what limits the batch.
        head_losses: mean next-token cross-entropy of each active head, ``[M]``, in nats.
        head_logits: ``[M, batch, seq, vocab]``, with ``output_head_logits=True``.
        uncertainty: of the positions that have logits, with ``output_uncertainty=True``.
        hidden_states: the embedding's output, then each block's: the backbone's, then head after head.
        attentions: of each block, in the same order.
    """

    head_losses: torch.FloatTensor | None = None
    head_logits: torch.FloatTensor | None = None
    uncertainty: Uncertainty | None = None


@dataclass
class NeuroTrailsModelOutput(BaseModelOutputWithPast):
    """Output of a multi-head base model.

    Attributes:
        last_hidden_state: ``[batch, seq, active heads * hidden_size]``, the states after each head's final norm side by
            side; ``lm_heads`` maps them to the ensemble's logits.
        backbone_states: the backbone's output ``[batch, seq, hidden_size]``; ``None`` where each head has an embedding
            of its own, and so nothing is shared.
        head_losses: ``[active heads]``, summed over the positions, where ``lm_heads`` and ``labels`` were given; there
            is no ``last_hidden_state`` then.
    """

    backbone_states: torch.FloatTensor | None = None
    head_losses: torch.FloatTensor | None = None


def combine_logits(logits: Iterable[torch.Tensor], mode: str) -> torch.Tensor:
    """Combines the heads' logits ``[..., vocab]`` into the ensemble's.

    ``"logits"``: their mean. ``"probs"``: log of the mean probability (soft voting); these are normalised. The logits
    are taken one by one and not changed: those that a generator makes need not exist all at one time.

    Raises:
        ValueError: ``mode`` is neither.
    """
    if mode not in ENSEMBLE_MODES:
        raise ValueError(f"ensemble_mode={mode!r}: accepted are {', '.join(ENSEMBLE_MODES)}")
    logits, count = iter(logits), 1
    if mode == "logits":
        mean = next(logits).clone()
        for head in logits:
            count += 1
            mean.lerp_(head, 1 / count)
            del head  # before the next one is made; ``enumerate`` would keep it as well
        return mean
    total = torch.log_softmax(next(logits).float(), -1)
    for head in logits:
        total = torch.logaddexp(total, torch.log_softmax(head.float(), -1))
        count += 1
    return total - math.log(count)


@torch.no_grad()
def uncertainty(logits: Sequence[torch.Tensor]) -> Uncertainty:
    """The measures of ``Uncertainty`` from the heads' logits ``[..., vocab]``, each ``[...]``.

    In fp32 whatever the logits' type, without gradients, and in chunks: it needs no memory of the logits' size.
    """
    *shape, vocab = logits[0].shape
    size = max(1, UNCERTAINTY_CHUNK // vocab)
    chunks = zip(*(head.reshape(-1, vocab).split(size) for head in logits))
    measures = zip(*(_uncertainty(chunk) for chunk in chunks))
    return Uncertainty(*(torch.cat(values).view(shape) for values in measures))


def _uncertainty(logits: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The measures, each ``[n]``, from the heads' logits ``[n, vocab]``."""
    heads = len(logits)
    mean, mean_entropy = 0, 0
    for head in logits:
        probs = torch.softmax(head, -1, dtype=torch.float32)
        mean_entropy = mean_entropy + _entropy(probs) / heads
        mean = mean + probs / heads
    entropy = _entropy(mean)
    guesses = torch.stack([head.argmax(-1) for head in logits])
    differing = (guesses[:, None] != guesses).float().sum((0, 1))  # each pair twice
    return entropy, (entropy - mean_entropy).clamp(min=0), differing / max(heads * (heads - 1), 1)


def _entropy(probs: torch.Tensor) -> torch.Tensor:
    # ``torch.special.entr`` is slower on a CPU. A probability of 0 counts 0 here as there.
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)


class UncertaintyRecorder:
    """Stands for ``output_uncertainty=True`` within ``generate`` and keeps what each step's forward pass measured."""

    def __init__(self):
        self.steps: list[Uncertainty] = []

    def __deepcopy__(self, memo) -> None:
        # A draft model gets copies of the arguments; its tokens are proposals, and a stock one would refuse this one.
        return None

    def add(self, measures: Uncertainty, positions: int) -> None:
        """Keeps the first ``positions`` of a step's measures, copied: a compiled step overwrites its outputs."""
        self.steps.append(Uncertainty(*(values[:, :positions].clone() for values in measures.to_tuple())))

    def select(self, rows: torch.LongTensor) -> Uncertainty:
        """The measures of each new token; ``rows`` ``[sequences, new tokens]`` is its step's row, or -1 for NaN."""
        steps = zip(*(step.to_tuple() for step in self.steps))
        recorded = (torch.cat(values, 1).to(rows.device) for values in steps)
        picked = (values.gather(0, rows.clamp(min=0)).masked_fill(rows < 0, math.nan) for values in recorded)
        return Uncertainty(*picked)
