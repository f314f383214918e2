"""Tables of a suite over texts: perplexity, what the heads bring, zero-shot tasks."""

import math
import statistics
from collections.abc import Callable, Mapping

from nt_hf.models.configuration_neurotrails import ENSEMBLE_MODES
from nt_hf.text import markdown_table, score_text

from experiments.finished import (
    Finished,
    Measure,
    Result,
    measured,
    paired_differences,
    paired_ratios,
    spread,
    with_diagonal,
)
from experiments.motion import MOTION, Gain, motion_table
from experiments.suite import Suite

VALIDATION = Measure("perplexity", lambda record: record["perplexity"], 2, log=True)
COMPARED = "ratios are"


def quality(suite: Suite) -> Measure:
    text = next(iter(suite.evaluation.texts))
    return Measure(f"perplexity, {text}", perplexity_on(text), 2)


def perplexity_on(text: str) -> Callable[[Result], float]:
    return lambda result: own_mode(result["texts"][text]["ensemble_perplexities"], result)


def own_mode(by_mode: Mapping[str, float], result: Result) -> float:
    """The value of the model's own ensemble mode."""
    return by_mode[result["validation"]["ensemble_mode"]]


def head_quality(suite: Suite) -> Measure:
    """The mean of the heads' perplexities on the first text."""
    text = next(iter(suite.evaluation.texts))
    return Measure("mean head", lambda result: statistics.fmean(result["texts"][text]["head_perplexities"]), 2)


def gain(result: Result) -> float | None:
    """What combining the heads gains, in nats a token; ``None`` of one head."""
    if len(result["diversity"]["heads"]) == 1:
        return None
    return result["diversity"]["gains"][result["validation"]["ensemble_mode"]]["diversity"]


def calibration(result: Result) -> float:
    return result["diversity"]["ensemble_scores"][result["validation"]["ensemble_mode"]]["calibration"]["error"]


def disagreement(result: Result) -> float | None:
    return result["diversity"]["disagreement"]["mean"]


def overlap(result: Result) -> float | None:
    overlaps = result["diversity"]["mask_overlap"]
    return overlaps and overlaps["overall"]


GAIN = Measure("gain (nats)", gain)
PLOTTED_GAIN = "gain of the ensemble (nats a token)"
DISAGREEMENT = Measure("disagreement", disagreement)
REFERENCE = Measure("with the diagonal", lambda result: with_diagonal(result["diversity"]["disagreement"]))
OVERLAP = Measure("mask overlap", overlap)


# ------------------------------------------------------------------------------------------------------- tables


def tables(suite: Suite, arms: Mapping[str, Finished]) -> dict[str, str | None]:
    """The tables of scores, Markdown by title."""
    return {
        "Quality": quality_table(suite, arms),
        "One change": effects_table(suite, arms),
        MOTION: motion_table(suite, arms, gains_of_motion(suite)),
        "Texts": texts_table(suite, arms),
        "Heads used": heads_table(arms),
        "Averaging": averaging_table(suite, arms),
        "Zero-shot accuracy, ± standard error over items": zero_shot_table(arms),
    }


def quality_table(suite: Suite, arms: Mapping[str, Finished]) -> str:
    main, head = quality(suite), head_quality(suite)
    others = (suite.baseline, suite.rival)
    rest = (GAIN, DISAGREEMENT, REFERENCE, OVERLAP, Measure("ECE", calibration))
    ratios = [f"/ {suite.arms[name].label}" for name in others]
    rows = [["arm", "seeds", main.label, head.label, *ratios, *(measure.label for measure in rest)]]
    for runs in arms.values():
        ratios = [spread(paired_ratios(runs, arms[name], main.read), 3) if name in arms else "" for name in others]
        cells = [*measured((main, head), runs), *ratios, *measured(rest, runs)]
        rows.append([runs.arm.label, str(len(runs.by_seed)), *cells])
    return markdown_table(rows)


def texts_table(suite: Suite, arms: Mapping[str, Finished]) -> str:
    rows = [["arm"]]
    for name in suite.evaluation.texts:
        rows[0] += [f"{name}: perplexity", f"{name}: bits per byte"]
    for runs in arms.values():
        cells = [runs.arm.label]
        for name in suite.evaluation.texts:
            cells += [
                spread(runs.values(perplexity_on(name))),
                spread(runs.values(lambda r, name=name: r["texts"][name]["bits_per_byte"]), 4),
            ]
        rows.append(cells)
    return markdown_table(rows)


def effects_table(suite: Suite, arms: Mapping[str, Finished]) -> str | None:
    """What one change does: each arm against the one that it is a change of, seed by seed."""
    read = perplexity_on(first := next(iter(suite.evaluation.texts)))
    rows = [["arm", "against", "seeds", f"ratio, {first}", "ratio, mean head", "gain (nats) more"]]
    for runs in arms.values():
        if source := arms.get(runs.arm.changed):
            ratios = paired_ratios(runs, source, read)
            gains = paired_differences(runs, source, gain)
            heads = paired_ratios(runs, source, head_quality(suite).read)
            cells = [spread(ratios, 3), spread(heads, 3), spread(gains, 3)]
            rows.append([runs.arm.label, source.arm.label, str(len(ratios)), *cells])
    return markdown_table(rows) if len(rows) > 1 else None


def gains_of_motion(suite: Suite) -> dict[str, Gain]:
    """What moving masks bring, in two units; the plot has the first."""
    read = quality(suite).read
    return {
        "% of perplexity": Gain(lambda static, moving: 100 * (1 - read(moving) / read(static)), 2),
        "nats a token": Gain(lambda static, moving: math.log(read(static) / read(moving)), 4),
    }


def averaging_table(suite: Suite, arms: Mapping[str, Finished]) -> str | None:
    """The same models with the mean of the heads' logits and with the mean of their probabilities."""
    first = next(iter(suite.evaluation.texts))
    rows = [["arm", *(f"mean of {mode}" for mode in ENSEMBLE_MODES)]]
    for runs in arms.values():
        if runs.values(gain):
            scores = runs.values(lambda result: result["texts"][first]["ensemble_perplexities"])
            rows.append([runs.arm.label, *(spread([score[mode] for score in scores]) for mode in ENSEMBLE_MODES)])
    return markdown_table(rows) if len(rows) > 1 else None


def zero_shot_table(arms: Mapping[str, Finished]) -> str | None:
    scored = {
        runs.arm.label: [r["zero_shot"] for r in runs.by_seed.values() if "zero_shot" in r] for runs in arms.values()
    }
    scored = {label: scores[0] for label, scores in scored.items() if scores}
    if not scored:
        return None
    tasks = list(next(iter(scored.values()))["results"])
    rows = [["arm", *tasks, "mean"]]
    for label, scores in scored.items():
        # The first scorer is the ensemble, or the only head.
        accuracies = [next(iter(scores["results"][task].values()))["acc"] for task in tasks]
        cells = [score_text(accuracy["value"], accuracy["stderr"]) for accuracy in accuracies]
        rows.append([label, *cells, f"{statistics.fmean(accuracy['value'] for accuracy in accuracies):.3f}"])
    return markdown_table(rows)


def heads_table(arms: Mapping[str, Finished]) -> str | None:
    """Perplexity of the ensemble of some of the heads."""
    most = max(len(r["diversity"]["heads_used"]) for runs in arms.values() for r in runs.by_seed.values())
    rows = [["arm", *(f"{n} head{'s' * (n > 1)}" for n in range(1, most + 1))]]
    for runs in arms.values():
        used = [[each["mean"] for each in r["diversity"]["heads_used"]] for r in runs.by_seed.values()]
        if len(used[0]) > 1:
            cells = [spread(values) for values in zip(*used)]
            rows.append([runs.arm.label, *cells, *[""] * (most - len(cells))])
    return markdown_table(rows) if len(rows) > 1 else None
