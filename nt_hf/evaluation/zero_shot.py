"""Zero-shot scores of every trail and of the ensemble in one pass, by lm-eval's own tasks and metrics.

lm-eval builds the requests and turns answers into scores; this module only reads local data sets where the hub cannot
be reached, and runs the model: a context once for all its answers, the backbone once for all heads, the LM heads on the
tokens of the answers alone.
"""

import hashlib
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
import torch
from lm_eval.api.metrics import (
    aggregate_subtask_metrics,
    pooled_sample_stderr,
    stderr_for_metric,
    unweighted_mean_stderr,
)
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.configuration_neurotrails import MultiHeadConfig
from ..models.ensemble import combine_logits
from ..models.modeling_neurotrails import MultiHeadForCausalLM
from ..models.multi_head import select_heads
from ..text import markdown_table, score_text
from .zero_shot_tasks import quiet

# Tokens of a batch, its padding included, with batch_size="auto". On two cores more rows gain nothing; a GPU wants more
# (not measured), and halves it where its memory ends.
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
# Positions whose logits exist at one time: few enough to stay in a CPU's cache.
POSITIONS = {"cpu": 64, "cuda": 4096}


# ------------------------------------------------------------------------------------------------ answers to scores


@dataclass(frozen=True)
class Scorer:
    """A predictor to score: the ensemble of some heads, or one trail."""

    name: str
    heads: tuple[int, ...]


def choose_scorers(config: MultiHeadConfig, heads: str) -> list[Scorer]:
    """The scorers that ``--heads`` names, the main one first.

    ``"ensemble"``: the ensemble of all heads. ``"each"``: it and every trail. ``"0,2"``: the ensemble of these two, and
    both trails. With one head the ensemble is that head, named so.

    Raises:
        ValueError: ``heads`` is none of these or names a head that the model lacks.
    """
    count = config.num_ensemble_heads
    if heads in ("ensemble", "each"):
        chosen = list(range(count))
    else:
        try:
            chosen = select_heads(config, [int(head) for head in heads.split(",")])
        except ValueError:
            raise ValueError(
                f"heads={heads!r}: accepted are 'ensemble', 'each', or different numbers of 0 to {count - 1} as in "
                f"'{','.join(map(str, range(min(count, 2))))}'"
            ) from None
    trails = [Scorer(f"head {head}", (head,)) for head in chosen]
    if len(chosen) == 1:
        return trails
    ensemble = Scorer("ensemble" if len(chosen) == count else f"ensemble {heads}", tuple(chosen))
    return [ensemble] if heads == "ensemble" else [ensemble, *trails]


@torch.no_grad()
def log_likelihoods(
    model: MultiHeadForCausalLM,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    scorers: Sequence[Scorer],
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict[str, list[tuple[float, bool]]]:
    """Log-likelihoods of answers given their contexts, by every scorer, in one pass over the requests.

    Args:
        model: in eval mode.
        requests: pairs of token ids, a context of one token or more and an answer of one or more. A context that does
            not fit loses its beginning.
        scorers: the first one's heads are run, once each; any others are single ones of them.
        batch_size: rows a batch; by default as many as ``BATCH_TOKENS`` allows.
        progress: show a bar where the errors go to a terminal.

    Returns:
        For each scorer's name and each request, (log-likelihood in nats, whether the answer is the greedy one).

    Raises:
        ValueError: an answer does not fit the model's context at all.
        FloatingPointError: a log-likelihood is not finite; the message names scorers and request.
    """
    limit = model.config.max_position_embeddings
    # Answers to one question share its context, which is run once.
    questions: dict[tuple[int, ...], list[int]] = {}
    for index, (context, answer) in enumerate(requests):
        if len(answer) > limit:
            raise ValueError(f"an answer of {len(answer)} tokens does not fit the model's context of {limit}")
        questions.setdefault(tuple(context[-(limit + 1 - len(answer)) :]), []).append(index)
    rows = [_Row(context, {index: requests[index][1] for index in indices}) for context, indices in questions.items()]
    rows.sort(key=len, reverse=True)
    results: dict[str, list[Any]] = {scorer.name: [None] * len(requests) for scorer in scorers}
    budget = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    start = 0
    hidden = None if progress else True  # None: only where there is no terminal
    with tqdm(total=len(requests), desc="scoring", disable=hidden, leave=False, file=sys.__stderr__) as bar:
        while start < len(rows):
            batch = rows[start : start + (batch_size or max(1, budget // len(rows[start])))]
            try:
                scores, greedy = _score(model, batch, scorers)
            except torch.OutOfMemoryError:
                if batch_size or len(batch) == 1:
                    raise
                budget //= 2
                continue
            indices = [index for row in batch for index in row.answers]
            if not (finite := scores.isfinite()).all():
                where, bad = indices[(~finite).any(0).nonzero()[0, 0]], (~finite).any(1).tolist()
                raise FloatingPointError(
                    f"the log-likelihoods of {', '.join(s.name for s, x in zip(scorers, bad) if x)} are not finite, "
                    f"for example of request {where}: weights are not finite, or activations overflow"
                )
            for scorer, values, flags in zip(scorers, scores.tolist(), greedy.tolist()):
                for index, value, flag in zip(indices, values, flags):
                    results[scorer.name][index] = (value, flag)
            start += len(batch)
            bar.update(len(indices))
    return results


@dataclass
class _Row:
    """A context, and the answers that branch off its end, by number of request.

    Its tokens are the context's, then each answer's but the last, which predicts nothing.
    """

    context: Sequence[int]
    answers: Mapping[int, Sequence[int]]

    def __len__(self) -> int:
        return len(self.context) + sum(len(answer) - 1 for answer in self.answers.values())


def _pack(rows: Sequence[_Row]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows, longest first, as the model's inputs, and what to read from its outputs.

    Returns:
        The inputs; ``outputs`` ``[n, 2]``, (row, column) of every output that an answer needs, and ``answers``
        ``[tokens, 3]``, sorted: (number of the output, number of the answer, token) of every token of an answer.
    """
    width = len(rows[0])
    table, outputs, answers, count = [], [], [], 0  # of (token, position, branch), by row
    for r, row in enumerate(rows):
        line = [(token, position, 0) for position, token in enumerate(row.context)]
        begin, first = len(line), len(outputs)
        outputs.append((r, begin - 1))  # where all answers begin
        for branch, answer in enumerate(row.answers.values(), 1):
            answers.append((first, count, answer[0]))
            for position, (token, following) in enumerate(itertools.pairwise(answer), begin):
                answers.append((len(outputs), count, following))
                outputs.append((r, len(line)))
                line.append((token, position, branch))
            count += 1
        table.append(line + [(0, 0, -1)] * (width - len(line)))
    tokens, positions, branches = torch.tensor(table).permute(2, 0, 1)
    # A token sees what comes before it in the context and in its own branch.
    seen = (branches[:, None] == branches[:, :, None]) | (branches[:, None] == 0)
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": seen.tril()[:, None]}
    return inputs, torch.tensor(outputs), torch.tensor(sorted(answers))


def _score(
    model: MultiHeadForCausalLM, rows: Sequence[_Row], scorers: Sequence[Scorer]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihoods of the rows' answers and whether each is the greedy one, both ``[scorers, answers]``."""
    device, heads = model.device, scorers[0].heads
    inputs, outputs, answers = _pack(rows)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    hidden = model.head_states(heads, **inputs)[:, outputs[:, 0].to(device), outputs[:, 1].to(device)]
    count = sum(len(row.answers) for row in rows)
    scores, misses = torch.zeros(2, len(scorers), count, dtype=torch.float64, device=device)

    def record(scorer: int, logits: torch.Tensor, targets: torch.Tensor) -> None:
        output, answer, token = targets.T
        log_probs = logits.log_softmax(-1)
        chosen, best = log_probs[output, token], log_probs.amax(-1)[output]
        scores[scorer].index_add_(0, answer, chosen.double())
        misses[scorer].index_add_(0, answer, (chosen < best).double())

    trails = {scorer.heads[0]: k for k, scorer in enumerate(scorers) if k}

    def chunk_logits(chunk: slice, targets: torch.Tensor) -> Iterator[torch.Tensor]:
        for head, states in zip(heads, hidden):
            logits = model.head_logits(head, states[chunk]).float()
            if head in trails:
                record(trails[head], logits, targets)
            yield logits

    size = POSITIONS.get(device.type, POSITIONS["cuda"])
    for start in range(0, len(outputs), size):
        in_chunk = (answers[:, 0] >= start) & (answers[:, 0] < start + size)
        targets = (answers[in_chunk] - torch.tensor([start, 0, 0])).to(device)
        logits = chunk_logits(slice(start, start + size), targets)
        record(0, combine_logits(logits, model.config.ensemble_mode), targets)
    return scores.cpu(), misses.cpu() == 0


class TrailsLM(HFLM):
    """lm-eval's model of a Transformers checkpoint, which scores by several scorers at once.

    lm-eval sees the first scorer's answers; `answers` keeps everyone's until the next task.

    Attributes:
        answers: by scorer's name and by (context, continuation), the strings of the request.
        truncated: requests whose context lost its beginning.
    """

    def __init__(
        self,
        model: MultiHeadForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        scorers: Sequence[Scorer],
        batch_size: int | None = None,
    ):
        with quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size or 1)
        self.scorers, self.rows_a_batch = list(scorers), batch_size
        self.answers: dict[str, dict[tuple[str, str], tuple[float, bool]]] = {}
        self.truncated = 0

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        tokens = [(context, answer) for _, context, answer in requests]
        results = log_likelihoods(
            self.model, tokens, self.scorers, batch_size=self.rows_a_batch, progress=not disable_tqdm
        )
        texts = [text for text, _, _ in requests]
        self.answers = {name: dict(zip(texts, values)) for name, values in results.items()}
        self.truncated = sum(len(context) + len(answer) > self.max_length + 1 for context, answer in tokens)
        return results[self.scorers[0].name]


# ---------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True)
class TaskScore:
    """Mean of a metric over a task's items and the standard error of that mean, ``None`` where there is none."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """What the scorers reached on one task.

    Attributes:
        items: number of items scored.
        fingerprint: hash of the items, the same for two runs over the same ones.
        scores: by scorer and metric.
        per_item: by scorer and metric, each item's value in the order of the data set; "0110…" where all are 0 or 1.
        requests: contexts with an answer, several an item.
        truncated: those whose context lost its beginning.
        seconds: wall time.
    """

    items: int
    fingerprint: str
    scores: dict[str, dict[str, TaskScore]]
    per_item: dict[str, dict[str, list[float] | str]]
    requests: int
    truncated: int
    seconds: float


def score_task(lm: TrailsLM, task: Any, limit: int | None = None) -> TaskResult:
    """Scores one task, as [`Tasks.load`] returns it, by every scorer of ``lm``.

    The first scorer's answers go through ``lm_eval.evaluate``; the same items are then judged by the task's own metrics
    with the answers of the others.

    Raises:
        ValueError: an answer does not fit the model's context.
        FloatingPointError: a likelihood is not finite.
    """
    began = time.perf_counter()
    name = task.config.task
    with quiet():
        evaluation = lm_eval.evaluate(lm, {"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=0)
    samples = sorted(evaluation["samples"][name], key=lambda sample: sample["doc_id"])
    metrics = samples[0]["metrics"]
    per_item: dict[str, dict[str, list[float]]] = {}
    for scorer in lm.scorers:
        answers = lm.answers[scorer.name]
        judged = [
            task.process_results(sample["doc"], [answers[tuple(pair)] for pair in sample["arguments"]])
            for sample in samples
        ]
        per_item[scorer.name] = {metric: [float(values[metric]) for values in judged] for metric in metrics}
    scores = {
        scorer: {metric: _score_of(task, metric, values) for metric, values in by_metric.items()}
        for scorer, by_metric in per_item.items()
    }
    hashes = "".join(sample["doc_hash"] for sample in samples)
    return TaskResult(
        items=len(samples),
        fingerprint=hashlib.sha256(hashes.encode()).hexdigest()[:16],
        scores=scores,
        per_item={s: {m: _compact(v) for m, v in by_metric.items()} for s, by_metric in per_item.items()},
        requests=sum(len(sample["arguments"]) for sample in samples),
        truncated=lm.truncated,
        seconds=time.perf_counter() - began,
    )


def _score_of(task: Any, metric: str, values: Sequence[float]) -> TaskScore:
    aggregate = task.aggregation()[metric]
    error = stderr_for_metric(metric=aggregate, bootstrap_iters=1000) if len(values) > 1 else None
    return TaskScore(float(aggregate(values)), float(error(values)) if error else None)


def _compact(values: Sequence[float]) -> list[float] | str:
    return "".join(str(int(value)) for value in values) if set(values) <= {0.0, 1.0} else list(values)


def combine_tasks(results: Mapping[str, TaskResult], by_size: bool) -> dict[str, dict[str, TaskScore]]:
    """The score of a group from those of its tasks, by lm-eval's rules, for each scorer and each metric they share."""
    tasks = list(results.values())
    sizes = [task.items for task in tasks]
    combined: dict[str, dict[str, TaskScore]] = {}
    for scorer in tasks[0].scores:
        shared = [m for m in tasks[0].scores[scorer] if all(m in task.scores[scorer] for task in tasks)]
        combined[scorer] = {}
        for metric in shared:
            scores = [task.scores[scorer][metric] for task in tasks]
            value = aggregate_subtask_metrics([score.value for score in scores], sizes, by_size)
            errors, error = [score.stderr for score in scores], None
            if None not in errors:
                error = float(pooled_sample_stderr(errors, sizes) if by_size else unweighted_mean_stderr(errors))
            combined[scorer][metric] = TaskScore(value, error)
    return combined


def average(results: Mapping[str, Mapping[str, Mapping[str, TaskScore]]]) -> dict[str, TaskScore]:
    """Unweighted mean accuracy over the tasks that have one, for each scorer."""
    by_scorer: dict[str, list[TaskScore]] = {}
    for scores in results.values():
        for scorer, by_metric in scores.items():
            if "acc" in by_metric:
                by_scorer.setdefault(scorer, []).append(by_metric["acc"])
    means = {}
    for scorer, scores in by_scorer.items():
        errors = [score.stderr for score in scores]
        value = sum(score.value for score in scores) / len(scores)
        means[scorer] = TaskScore(value, None if None in errors else float(unweighted_mean_stderr(errors)))
    return means


def results_table(results: Mapping[str, Mapping[str, Mapping[str, TaskScore]]]) -> str:
    """Markdown: a row for each task and metric and one for the average, a column for each scorer."""
    rows = [
        (task, metric, {scorer: by_metric[metric] for scorer, by_metric in scores.items()})
        for task, scores in results.items()
        for metric in next(iter(scores.values()))
    ]
    if means := average(results):
        rows.append((f"mean of {sum('acc' in next(iter(s.values())) for s in results.values())}", "acc", means))
    names = list(rows[0][2])
    table = [["task", "metric", *names]]
    for task, metric, scores in rows:
        table.append([task, metric, *(score_text(scores[name].value, scores[name].stderr) for name in names)])
    return markdown_table(table)
