"""Draws the picture of docs/concepts.md: python docs/make_concepts.py writes docs/concepts.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

BACKBONE, HEAD, TRAIL, QUIET = "#d9e2ec", "#dcebd7", "#d1495b", "#eeeeee"
# One mask of 8 x 8 weights with 16 active ones. A 1 is an active weight.
MASK = ["10010000", "00100001", "01000100", "00011000", "10000010", "01010000", "00000101", "00101000"]


def box(axis, x, y, width, text, color):
    style = "round,pad=0.02,rounding_size=0.08"
    axis.add_patch(FancyBboxPatch((x, y), width, 0.6, boxstyle=style, facecolor=color, edgecolor="#555555"))
    axis.text(x + width / 2, y + 0.3, text, ha="center", va="center", fontsize=9)


def arrow(axis, start, end, trail=False):
    color, width = (TRAIL, 2.4) if trail else ("#777777", 1.0)
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": width})


def draw_model(axis):
    """The blocks of a model of three heads, from the bottom to the top, with one trail in red."""
    for y, text in ((0, "embedding"), (1, "block 1"), (2, "block 2")):
        box(axis, 2.6, y, 1.8, text, BACKBONE)
        if y:
            arrow(axis, (3.5, y - 0.4), (3.5, y), trail=True)
    for head, x in enumerate((0, 2.6, 5.2)):
        for y, text in ((3.4, "block 3"), (4.4, "block 4"), (5.4, "LM head")):
            box(axis, x, y, 1.8, text, HEAD)
        arrow(axis, (3.5, 2.6), (x + 0.9, 3.4), trail=head == 2)
        for low in (4.0, 5.0):
            arrow(axis, (x + 0.9, low), (x + 0.9, low + 0.4), trail=head == 2)
        arrow(axis, (x + 0.9, 6.0), (3.5 + (x - 2.6) * 0.25, 6.9), trail=False)
        axis.text((0, 3.7, 7.0)[head], 3.05, f"head {head}", ha="right" if head == 2 else "left", fontsize=9)
    box(axis, 2.1, 6.9, 2.8, "ensemble: mean of the logits", QUIET)
    axis.text(-0.2, 1.3, "backbone\n(runs once)", ha="left", va="center", fontsize=9)
    axis.text(5.2, 1.3, "a trail: the backbone\nand one head", color=TRAIL, ha="left", va="center", fontsize=9)
    axis.set(xlim=(-0.4, 7.6), ylim=(-0.2, 7.7), title="A model of three heads")


def draw_mask(axis):
    for row, bits in enumerate(MASK):
        for column, bit in enumerate(bits):
            color = "#30638e" if bit == "1" else "white"
            axis.add_patch(Rectangle((column, 7 - row), 1, 1, facecolor=color, edgecolor="#bbbbbb"))
    active = sum(bits.count("1") for bits in MASK)
    axis.set(xlim=(-0.2, 8.2), ylim=(-2.6, 8.2), title="The mask of one weight matrix")
    note = f"blue: active, {active} of 64 weights\nwhite: outside the mask, exactly 0\n"
    note += f"density {active / 64:g}, sparsity {1 - active / 64:g}"
    axis.text(4, -1.5, note, ha="center", va="center", fontsize=9)
    axis.set_aspect("equal")


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), width_ratios=[1.9, 1])
    draw_model(axes[0])
    draw_mask(axes[1])
    for axis in axes:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("concepts.png"), dpi=110)


if __name__ == "__main__":
    main()
