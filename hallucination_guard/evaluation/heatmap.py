"""The picture of what was located: layers × positions in the three views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hallucination_guard.errors import MissingExtra
from hallucination_guard.evaluation.located import VIEWS, Located
from hallucination_guard.model.profile import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


_TITLES: Mapping[View, str] = {
    "raw": "raw cosine",
    "centred": "mean-centred cosine",
    "nearest": "nearest neighbour asks the same",
}


def draw(located: Located) -> Figure:
    """Layers × positions in the three views; ``figure.savefig(path)`` writes it.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        raise MissingExtra(
            "the heat map needs matplotlib", hint="pip install 'hallucination-guard-semgrad[evaluate]'"
        ) from None
    depth, width = len(located.table["raw"]) - 1, len(located.positions)
    figure = Figure(figsize=(3.6 + 0.95 * width, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    panels = figure.subplots(1, len(VIEWS), sharey=True)
    for panel, view in zip(panels, VIEWS, strict=True):
        rows = [list(reversed(row)) for row in located.table[view]]  # reading order: the prompt's end is on the right
        image = panel.imshow(rows, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest")
        panel.set_xticks(
            range(width),
            [f"{_printable(token)}  {at}" for at, token in zip(located.positions, located.tokens, strict=True)][::-1],
            rotation=90,
            fontsize=8,
            parse_math=False,
        )
        panel.tick_params(length=2)
        chosen, first, last = located.choice(view), located.layers[0], located.layers[-1]
        panel.add_patch(
            Rectangle(
                (width + chosen - 0.5, first - 0.5),
                1,
                last - first + 1,
                fill=False,
                edgecolor="white",
                linewidth=2.0,
            )
        )
        if located.template is not None and -located.template.index <= width:
            panel.plot([width + located.template.index], [depth + 1.1], marker="v", color="black", clip_on=False)
        panel.set_xlim(-0.5, width - 0.5)
        panel.set_ylim(-0.5, depth + 0.5)
        panel.set_title(f"{_TITLES[view]}\nchooses {chosen}", fontsize=10, pad=12, parse_math=False)
        bar = figure.colorbar(image, ax=panel, fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=8)
    panels[0].set_ylabel("layer  l")
    figure.suptitle(
        f"{located.model.name}: SPS of {located.queries} queries in {located.prompts} wordings\n"
        "frame: deep half at the chosen position; ▾: the chat template's rule",
        fontsize=10,
        parse_math=False,
    )
    return figure


def _printable(token: str) -> str:
    """A byte-level token as one would write it; a line break is shown as its sign."""
    token = token.replace("Ġ", "␣").replace("▁", "␣").replace("Ċ", "\\n").replace("\n", "\\n")
    return token if len(token) <= 14 else token[:13] + "…"
