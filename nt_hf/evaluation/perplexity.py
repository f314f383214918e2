"""Perplexity of the heads and of their ensemble, and how much the heads disagree."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check, check_fields, integer, optional, setting
from ..data.streams import TOKENIZE_AT_ONCE, pad_rows
from ..data.tokenizers import eos_id, tokenize
from ..models.auto import class_of_family
from ..models.configuration_neurotrails import ENSEMBLE_MODES, MultiHeadConfig
from ..models.ensemble import combine_logits
from ..models.losses import IGNORE_INDEX
from ..models.modeling_neurotrails import MultiHeadForCausalLM
from ..sparsity.sharding import is_sharded, reshard

# Positions whose logits of all heads exist at one time.
CHUNK = 512
# Batches of windows that are sorted by length at a time.
BUFFER = 128


def load_config(path: str | Path) -> MultiHeadConfig:
    """The configuration of the model that [`load_for_evaluation`] loads, without its weights.

    Raises:
        ValueError: ``path`` is no directory of a multi-head model or a stock decoder, or its configuration is damaged.
    """
    path = Path(path)
    with one_line_errors(path):
        kind, is_stock = class_of_checkpoint(path, MultiHeadForCausalLM, "decoder")
        if is_stock:
            return kind.config_class.from_stock_config(AutoConfig.from_pretrained(path), num_ensemble_heads=1)
        return kind.config_class.from_pretrained(path)


def load_for_evaluation(path: str | Path) -> MultiHeadForCausalLM:
    """The model of a checkpoint directory in eval mode, on a GPU if there is one, weights in the checkpoint's dtype.

    A stock decoder becomes a model of one head.

    Raises:
        ValueError: ``path`` is no directory of a multi-head model or a stock decoder, it is damaged or incomplete, or a
            weight is not finite.
    """
    path = Path(path)
    with one_line_errors(path):
        kind, is_stock = class_of_checkpoint(path, MultiHeadForCausalLM, "decoder")
        if is_stock:
            model = kind.from_stock(path, num_ensemble_heads=1, dtype="auto")
        else:
            model = kind.from_pretrained(path, dtype="auto")
    return ready(model, path)


def ready(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """A loaded model in eval mode, on a GPU if there is one.

    Raises:
        ValueError: a weight is not finite.
    """
    # Comparisons with NaN are false: such a model would be scored, and look as if it guessed.
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: has {len(bad)} weights that are not finite everywhere, for example {bad[0]}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Makes what loading a checkpoint raises one line that names it."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(f"{path}: cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}") from error


def class_of_checkpoint(path: Path, kind: type[PreTrainedModel], word: str) -> tuple[type[PreTrainedModel], bool]:
    """The class of a checkpoint's multi-head model, and whether the checkpoint is of a stock model.

    Args:
        path: of a checkpoint directory.
        kind: of models that are accepted.
        word: for it.

    Raises:
        ValueError: there is no checkpoint, or it is of another kind.
    """
    accepted = f"accepted is a checkpoint directory of a multi-head model or a stock {word}"
    if not (path / "config.json").is_file():
        problem = "has no config.json" if path.is_dir() else "is no directory"
        raise ValueError(f"{path}: {problem}; {accepted}")
    model_type = PretrainedConfig.get_config_dict(path)[0].get("model_type")
    try:
        found = class_of_family(model_type)
        if not issubclass(found, kind):
            raise ValueError(f"{found.stock_class.__name__} is no {word}")
    except ValueError as error:
        raise ValueError(f"{path}: has model_type={model_type!r}; {accepted} ({error})") from error
    return found, model_type != found.config_class.model_type


def strided_windows(ids: Sequence[int], length: int, stride: int) -> Iterator[tuple[Sequence[int], int]]:
    """Windows of at most ``length`` ids that start every ``stride`` ids, and how many ids of each are context only.

    The first window's context is its first id; a later one's are the ``length - stride`` ids that it repeats. So every
    id but the first is scored once, the one at position ``i`` after at least ``min(i, length - stride)`` ids. This is
    the strided method of the Transformers documentation ("Perplexity of fixed-length models").
    """
    for start in range(0, max(1, len(ids) - length + stride), stride):
        yield ids[start : start + length], length - stride if start else 1


@dataclass(eq=False, repr=False)
class DocumentWindows:
    """Batches for ``evaluate`` that score every token of every document exactly once.

    The end-of-sequence token, which separates documents in training, precedes each document as context and is not
    scored. Documents that do not fit a window are scored by ``strided_windows``. Windows of like lengths share a batch,
    padded on the right; ``BUFFER`` batches are held at a time.

    Args:
        texts: the documents; each ``iter()`` of this object goes over them again.
        tokenizer: any with an end-of-sequence token; special tokens that it adds by itself are not used.
        length: tokens of a window, 2 or more.
        stride: tokens between the starts of two windows, 1 to ``length - 1``; half the length by default.
        batch_size: windows of a batch.
        max_tokens: stop after the document that reaches this many tokens; by default score all.

    Attributes:
        documents: documents read, complete (as the other counts) when the iteration is.
        tokens: tokens of these documents, each of which is scored.
        unknown: those that are the tokenizer's unknown token.
        bytes: UTF-8 bytes of the documents as they were before tokenization, those without a token left out.

    Raises:
        ValueError: an argument is outside its range, or the tokenizer lacks an end-of-sequence token.
    """

    texts: Iterable[str]
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    length: int = setting(MISSING, integer(2))  # one token of context and one to score
    stride: int | None = None
    batch_size: int = setting(8, integer(1))
    max_tokens: int | None = setting(None, optional(integer(1)))

    def __post_init__(self):
        check_fields(self)
        self.stride = self.length // 2 if self.stride is None else self.stride
        check("stride", self.stride, integer(1, self.length - 1))
        self.eos_id = eos_id(self.tokenizer)
        self.documents = self.tokens = self.unknown = self.bytes = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.documents = self.tokens = self.unknown = self.bytes = 0
        windows = self._windows()
        while buffer := list(itertools.islice(windows, BUFFER * self.batch_size)):
            buffer.sort(key=lambda window: len(window[0]), reverse=True)
            for start in range(0, len(buffer), self.batch_size):
                rows, contexts = zip(*buffer[start : start + self.batch_size])
                batch = pad_rows(rows, len(rows[0]), self.tokenizer)
                for labels, context in zip(batch["labels"], contexts):
                    labels[:context] = IGNORE_INDEX
                yield batch

    def _windows(self) -> Iterator[tuple[Sequence[int], int]]:
        texts = iter(self.texts)
        while block := list(itertools.islice(texts, TOKENIZE_AT_ONCE)):
            for text, ids in zip(block, tokenize(block, self.tokenizer)):
                self.documents += 1
                if not ids:
                    continue
                self.tokens += len(ids)
                self.unknown += ids.count(self.tokenizer.unk_token_id)
                self.bytes += len(text.encode())
                yield from strided_windows([self.eos_id, *ids], self.length, self.stride)
                if self.max_tokens is not None and self.tokens >= self.max_tokens:
                    return


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a loss in nats, infinite rather than an error where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def check_finite(losses: Mapping[str, float]) -> None:
    """Checks the losses on a text, by the name of what was scored.

    Raises:
        FloatingPointError: some are not finite; the message names them.
    """
    if bad := [name for name, loss in losses.items() if not math.isfinite(loss)]:
        raise FloatingPointError(
            f"the loss of {', '.join(bad)} is not finite on this text: weights are not finite, or activations overflow"
        )


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
        bytes: UTF-8 bytes of the text that the tokens stand for, where all of it was scored.
    """

    tokens: int
    head_losses: list[float]
    ensemble_losses: dict[str, float]
    disagreement: float
    mode: str
    bytes: int | None = None

    def bits_per_byte(self, loss: float) -> float:
        """``loss`` (nats a token) in bits for each byte of the text, which tokenizers share.

        ``loss / ln 2 * tokens / bytes``, as by Gao et al. 2020, "The Pile", arXiv 2101.00027.
        """
        return loss / math.log(2) * self.tokens / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """The losses and their exponentials, and bits per byte where the bytes are known, ready for JSON."""
        result = {
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
        if self.bytes is not None:
            result |= {
                "bytes": self.bytes,
                "bits_per_byte": self.bits_per_byte(self.ensemble_losses[self.mode]),
                "head_bits_per_byte": [self.bits_per_byte(loss) for loss in self.head_losses],
                "ensemble_bits_per_byte": {m: self.bits_per_byte(loss) for m, loss in self.ensemble_losses.items()},
            }
        return result


@torch.no_grad()
def evaluate(
    model: MultiHeadForCausalLM,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> Perplexities:
    """Measures perplexities, every token weighing the same.

    Args:
        model: the model, not wrapped by DDP; it is left in the mode (train or eval) it was in. Of a sharded one every
            process must bring as many batches.
        batches: dicts of ``input_ids``, ``attention_mask`` and ``labels`` ``[batch, seq]``, labels unshifted, -100
            ignored.
        autocast: makes the context to run the model in.
        reduce: sums a tensor over all processes.

    Raises:
        ValueError: there was no token to predict.
        FloatingPointError: a loss is not finite, on all processes if on one.
    """
    training = model.training
    model.eval()
    heads = model.config.num_ensemble_heads
    # [each head's loss, both ensembles' losses, disagreeing pairs, tokens]
    sums = torch.zeros(heads + len(ENSEMBLE_MODES) + 2, dtype=torch.float64)
    for batch in batches:
        batch = {key: value.to(model.device) for key, value in batch.items()}
        with autocast():
            sums += _batch_sums(model, batch).cpu()
    reshard(model)
    model.train(training)
    *losses, disagreeing, tokens = reduce(sums).tolist()
    if not tokens:
        raise ValueError("the evaluation data has no token to predict")
    check_finite({f"head {head}": losses[head] for head in range(heads)} | {"the ensemble": sum(losses[heads:])})
    pairs = heads * (heads - 1) // 2
    return Perplexities(
        tokens=int(tokens),
        head_losses=[loss / tokens for loss in losses[:heads]],
        ensemble_losses={mode: loss / tokens for mode, loss in zip(ENSEMBLE_MODES, losses[heads:])},
        disagreement=disagreeing / tokens / pairs if pairs else 0.0,
        mode=model.config.ensemble_mode,
    )


def _batch_sums(model: MultiHeadForCausalLM, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["labels"][:, 1:]
    keep = labels != IGNORE_INDEX
    labels = labels[keep]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    if is_sharded(model):
        # Parts of a sharded model do not run by themselves, and each part as often on every process.
        logits = model(**inputs, use_cache=False, output_head_logits=True).head_logits[:, :, :-1][:, keep]
        chunks = (logits[:, start : start + CHUNK].float() for start in range(0, labels.numel(), CHUNK))
    else:
        states = model.head_states(**inputs)[:, :, :-1][:, keep]
        chunks = (
            [model.head_logits(head, x[start : start + CHUNK]).float() for head, x in enumerate(states)]
            for start in range(0, labels.numel(), CHUNK)
        )
    size = model.config.num_ensemble_heads + len(ENSEMBLE_MODES) + 2
    total = torch.zeros(size, dtype=torch.float64, device=labels.device)
    for head_logits, targets in zip(chunks, labels.split(CHUNK)):
        mean = combine_logits(head_logits, "logits")
        *of_heads, of_mean = (nn.functional.cross_entropy(z, targets, reduction="none") for z in [*head_logits, mean])
        # Soft voting needs the probability of the label alone: -log of the mean of exp(-loss).
        of_probs = math.log(len(of_heads)) - torch.logsumexp(-torch.stack(of_heads), 0)
        ensembles = {"logits": of_mean, "probs": of_probs}
        losses = [loss.sum() for loss in [*of_heads, *(ensembles[mode] for mode in ENSEMBLE_MODES)]]
        guesses = torch.stack([logits.argmax(-1) for logits in head_logits])
        disagreeing = (guesses[:, None] != guesses[None]).sum() / 2
        total += torch.stack([x.double() for x in [*losses, disagreeing, targets.new_tensor(len(targets))]])
    return total
