"""Tables of a suite over images: accuracy, calibration, corrupted images, what the heads bring."""

import statistics
from collections.abc import Mapping

from nt_hf.text import markdown_table

from experiments.finished import Finished, Measure, Result, measured, paired_differences, spread, with_diagonal
from experiments.motion import MOTION, Gain, motion_table
from experiments.suite import Suite

VALIDATION = Measure("accuracy (%)", lambda record: 100 * record["accuracy"], 2)
COMPARED = "differences are"
PLOTTED_GAIN = "gain of the ensemble (points of accuracy)"


def of_model(figure: str, scale: float = 1.0):
    """Reads a figure of the model's own ensemble mode, or of the only head."""
    return lambda result: scale * result["scores"][result["main_scorer"]][figure]


def corrupted(figure: str, scale: float = 1.0):
    """Reads a figure's mean over corruptions and severities."""

    def read(result: Result) -> float | None:
        means = result.get("corruptions_means")
        return means and scale * means[result["main_scorer"]][figure]

    return read


def mean_head(result: Result) -> float:
    """Accuracy of the heads, in per cent."""
    heads = [score["accuracy"] for name, score in result["scores"].items() if name.startswith("head")]
    return 100 * statistics.fmean(heads)


def gain(result: Result) -> float | None:
    """Points of accuracy that combining the heads gains; ``None`` of one head."""
    gains = result["gains"].get(result["main_scorer"])
    return gains and 100 * gains["accuracy"]


def disagreement(result: Result) -> float | None:
    return result["disagreement"]["mean"]


def overlap(result: Result) -> float | None:
    return result["mask_overlap"]


ACCURACY = Measure("accuracy (%)", of_model("accuracy", 100), 2)
MEAN_HEAD = Measure("mean head (%)", mean_head, 2)
NLL = Measure("NLL", of_model("nll"))
ECE = Measure("ECE", of_model("ece"), 4)
REFERENCE = Measure("with the diagonal", lambda result: with_diagonal(result["disagreement"]))
CORRUPTED = Measure("corrupted accuracy (%)", corrupted("accuracy", 100), 2)


def quality(suite: Suite) -> Measure:
    return ACCURACY


def head_quality(suite: Suite) -> Measure:
    return MEAN_HEAD


def tables(suite: Suite, arms: Mapping[str, Finished]) -> dict[str, str | None]:
    """The tables of scores, Markdown by title."""
    return {
        "Quality": quality_table(suite, arms),
        "One change": effects_table(arms),
        MOTION: motion_table(suite, arms, gains_of_motion(suite)),
        "Calibration": calibration_table(arms),
        "Corrupted images": corruption_table(arms),
        "Other images": unknown_table(arms),
    }


def quality_table(suite: Suite, arms: Mapping[str, Finished]) -> str:
    others = (suite.baseline, suite.rival)
    rest = (NLL, ECE, CORRUPTED, Measure("disagreement", disagreement), REFERENCE, Measure("mask overlap", overlap))
    gaps = [f"less {suite.arms[name].label}" for name in others]
    rows = [["arm", "seeds", ACCURACY.label, MEAN_HEAD.label, *gaps, *(measure.label for measure in rest)]]
    for runs in arms.values():
        gaps = [
            signed(paired_differences(runs, arms[name], ACCURACY.read), 2) if name in arms else "" for name in others
        ]
        cells = [*measured((ACCURACY, MEAN_HEAD), runs), *gaps, *measured(rest, runs)]
        rows.append([runs.arm.label, str(len(runs.by_seed)), *cells])
    return markdown_table(rows)


def effects_table(arms: Mapping[str, Finished]) -> str | None:
    """What one change does: each arm less the one that it is a change of, seed by seed."""
    measures = (ACCURACY, MEAN_HEAD, NLL, ECE, CORRUPTED)
    rows = [["arm", "less", "seeds", *(measure.label for measure in measures)]]
    for runs in arms.values():
        if source := arms.get(runs.arm.changed):
            gaps = [paired_differences(runs, source, measure.read) for measure in measures]
            cells = [signed(values, measure.digits) for values, measure in zip(gaps, measures)]
            rows.append([runs.arm.label, source.arm.label, str(len(gaps[0])), *cells])
    return markdown_table(rows) if len(rows) > 1 else None


def gains_of_motion(suite: Suite) -> dict[str, Gain]:
    """What moving masks bring, in two units; the plot has the first."""
    return {
        "points of accuracy": Gain(lambda static, moving: ACCURACY.read(moving) - ACCURACY.read(static), 2),
        "NLL": Gain(lambda static, moving: NLL.read(static) - NLL.read(moving), 4),
    }


def calibration_table(arms: Mapping[str, Finished]) -> str:
    """Before and after scaling by a temperature that was fitted on held-out images."""
    measures = (
        ECE, Measure("ECE at T", of_model("scaled_ece"), 4), NLL, Measure("NLL at T", of_model("scaled_nll")),
        Measure("Brier", of_model("brier")), Measure("Brier at T", of_model("scaled_brier")),
        Measure("T", of_model("temperature"), 2),
    )  # fmt: skip
    rows = [["arm", *(measure.label for measure in measures)]]
    return markdown_table(rows + [[runs.arm.label, *measured(measures, runs)] for runs in arms.values()])


def corruption_table(arms: Mapping[str, Finished]) -> str | None:
    """Accuracy of every corruption, the mean over its severities, and the means over all."""
    names = next(iter(next(iter(arms.values())).by_seed.values())).get("corruptions")
    if not names:
        return None

    def of_corruption(name: str):
        def read(result: Result) -> float:
            cells = result["corruptions"][name].values()
            return 100 * statistics.fmean(cell[result["main_scorer"]]["accuracy"] for cell in cells)

        return read

    measures = [Measure(name.replace("_", " "), of_corruption(name), 1) for name in names]
    measures += [CORRUPTED, Measure("NLL", corrupted("nll")), Measure("ECE", corrupted("ece"))]
    rows = [["arm", *(measure.label for measure in measures)]]
    return markdown_table(rows + [[runs.arm.label, *measured(measures, runs)] for runs in arms.values()])


def unknown_table(arms: Mapping[str, Finished]) -> str | None:
    """AUROC of telling images of another task from the test images, where a suite has such images."""

    def area(name: str):
        return lambda result: result["ood"] and result["ood"]["auroc"].get(name)

    names = ("mutual_information", "predictive_entropy", "maximum_probability")
    measures = [Measure(f"AUROC, {name.replace('_', ' ')}", area(name)) for name in names]
    if not any(runs.values(measures[-1].read) for runs in arms.values()):
        return None
    rows = [["arm", *(measure.label for measure in measures)]]
    return markdown_table(rows + [[runs.arm.label, *measured(measures, runs)] for runs in arms.values()])


def signed(values: list[float], digits: int) -> str:
    """As `spread`, with a sign."""
    text = spread(values, digits)
    return text if not text or text.startswith("-") else f"+{text}"
