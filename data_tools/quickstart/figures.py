"""Figures: a small grammar of matplotlib scripts, each executed to draw its picture."""

import io
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

matplotlib.use("Agg")  # draws in memory, also where there is a desktop

KINDS = {
    "bar": "bar chart",
    "barh": "horizontal bar chart",
    "line": "line chart",
    "scatter": "scatter plot",
    "pie": "pie chart",
}
COLOURS = ("red", "blue", "green", "orange", "purple", "black")
BACKGROUNDS = ("white", "silver", "khaki", "skyblue", "pink", "palegreen")
TITLES = ("sales", "rain", "speed", "votes", "price", "heat", "games", "trees", "birds", "wages")
NUM_VALUES = (2, 3, 4, 5)
TRENDS: dict[str, Callable[[int], list[int]]] = {
    "up": lambda count: list(range(1, count + 1)),
    "down": lambda count: list(range(count, 0, -1)),
    "flat": lambda count: [2] * count,
}

FIGURE_SIZE = 256  # pixels, both sides
# On top of matplotlib's default style. Legible at 96 x 96 pixels: no tick labels, thick lines, big markers
# and titles. A fixed title position and few ticks (through large labels, hidden) halve the drawing time.
STYLE = {
    "figure.figsize": (FIGURE_SIZE / 100, FIGURE_SIZE / 100),  # inches
    "figure.dpi": 100,
    "figure.subplot.left": 0.06,
    "figure.subplot.right": 0.94,
    "figure.subplot.bottom": 0.06,
    "figure.subplot.top": 0.82,
    "axes.facecolor": "none",
    "axes.titlesize": 26,
    "axes.titley": 1.03,
    "axes.linewidth": 2,
    "axes.axisbelow": True,
    "axes.xmargin": 0.12,
    "axes.ymargin": 0.12,
    "grid.color": "dimgray",
    "grid.linewidth": 2,
    "lines.linewidth": 6,
    "lines.marker": "o",
    "lines.markersize": 20,
    "patch.force_edgecolor": True,
    "patch.edgecolor": "white",
    "patch.linewidth": 3,
    "xtick.labelbottom": False,
    "ytick.labelleft": False,
    "xtick.labelsize": 20,
    "ytick.labelsize": 20,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One sentence of the grammar."""

    kind: str
    colour: str
    title: str
    background: str
    num_values: int
    trend: str
    grid: bool

    @property
    def code(self) -> str:
        """The script that draws it, of five or six lines."""
        values = TRENDS[self.trend](self.num_values)
        positions = f"range({self.num_values})"
        if self.kind == "pie":
            plot = f'pie({values}, colors=["{self.colour}"])'
        else:
            function = "plot" if self.kind == "line" else self.kind
            plot = f'{function}({positions}, {values}, color="{self.colour}")'
        lines = [
            "import matplotlib.pyplot as plt",
            f'plt.figure(facecolor="{self.background}")',
            f"plt.{plot}",
            f'plt.title("{self.title}")',
            *(["plt.grid()"] if self.grid else []),
            "plt.show()",
        ]
        return "\n".join(lines)

    @property
    def answers(self) -> dict[str, str]:
        """Questions about the picture, and their answers."""
        return {
            "What kind of figure is this?": KINDS[self.kind],
            "Which colour is the data?": self.colour,
            "What is the title?": self.title,
            "Which colour is the background?": self.background,
            "How many values are shown?": str(self.num_values),
        }


def draw_figures(count: int, generator: random.Random) -> list[Figure]:
    """`count` figures, no two of which have the same answers; trend and grid come on top."""
    combinations = list(product(KINDS, COLOURS, TITLES, BACKGROUNDS, NUM_VALUES))
    return [
        Figure(
            kind=kind,
            colour=colour,
            title=title,
            background=background,
            num_values=num_values,
            trend=generator.choice(list(TRENDS)),
            grid=kind != "pie" and generator.random() < 0.5,  # a pie shows no grid
        )
        for kind, colour, title, background, num_values in generator.sample(combinations, count)
    ]


def render_figure(code: str) -> bytes:
    """The picture that `code` draws in STYLE, as a PNG file of FIGURE_SIZE x FIGURE_SIZE pixels."""
    with plt.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")  # what plt.show says here
        exec(code, {})
        canvas = plt.gcf().canvas
        assert isinstance(canvas, FigureCanvasAgg)
        canvas.draw()  # type: ignore[no-untyped-call] # plt.savefig would go through the figure twice
        pixels_HWC = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
        plt.close("all")
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return file.getvalue()
