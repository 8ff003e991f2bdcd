"""Draws docs/data_flow.png, the picture of docs/architecture.md."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

BLUE, GREEN, SAND, GREY = "#dbe9f6", "#dff0d8", "#fbeed5", "#eeeeee"
BOXES = {
    "live": (0.2, 3.1, 2.3, 1.5, SAND, "live objects\nmodel, optimizer, loss:\nunmodified, unchanged"),
    "values": (0.2, 0.5, 2.3, 1.5, SAND, "values\nTrainState, batch, meta,\nHyperparameters: pytrees"),
    "capture": (3.3, 3.1, 2.5, 1.5, BLUE, "capture\nrecorder, concolic numbers,\nclosed escapes"),
    "passes": (6.6, 3.1, 2.6, 1.5, BLUE, "passes, each verified\nfunctionalize, reconnect,\nguard zeros, merge, prune"),
    "check": (10.0, 3.1, 2.6, 1.5, BLUE, "validation\nagainst the live code,\nat other numbers too"),
    "table": (
        6.6,
        0.5,
        6.0,
        1.5,
        GREEN,
        "tables of variants\nprograms by form of the inputs and by guards,\nprinted text = what runs",
    ),
    "loop": (3.3, 0.5, 2.5, 1.5, GREEN, "step, unroll, tasks\nrecompute, truncate,\nfirst order"),
    "outer": (
        3.3,
        -1.8,
        9.3,
        1.2,
        GREY,
        "the outer loop\nplain PyTorch: val_loss.backward(), any torch.optim, torch.func",
    ),
}
ARROWS = [
    ((2.5, 3.85), (3.3, 3.85), "a miss"),
    ((5.8, 3.85), (6.6, 3.85), "raw graph"),
    ((9.2, 3.85), (10.0, 3.85), "program"),
    ((11.3, 3.1), (11.3, 2.0), "variant"),
    ((6.6, 1.25), (5.8, 1.25), "program"),
    ((2.5, 1.25), (3.3, 1.25), ""),
    ((4.5, 0.5), (4.5, -0.6), "new state, losses"),
]


def main() -> None:
    """Draws and saves the picture."""
    figure, axes = plt.subplots(figsize=(12.8, 6.6))
    for left, bottom, width, height, colour, text in BOXES.values():
        box = FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", fc=colour, ec="#555555"
        )
        axes.add_patch(box)
        head, _, rest = text.partition("\n")
        middle = left + width / 2
        axes.text(middle, bottom + height - 0.38, head, ha="center", va="center", fontsize=12, fontweight="bold")
        axes.text(middle, bottom + (height - 0.55) / 2, rest, ha="center", va="center", fontsize=10)
    for start, end, label in ARROWS:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.6, "color": "#333333"})
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        vertical = start[0] == end[0]
        axes.text(
            x + (0.12 if vertical else 0),
            y + (0 if vertical else 0.14),
            label,
            fontsize=9,
            ha="left" if vertical else "center",
        )
    axes.set_xlim(0, 12.9)
    axes.set_ylim(-2.0, 4.9)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("data_flow.png"), dpi=110)


if __name__ == "__main__":
    main()
