"""How all pictures look: one size of type, one colour for each role, told apart by the colour-blind too.

Charts are about four inches wide, so that their type is as large as a page's where one is shown 400 pixels wide.
"""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, without its black
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
STUDENT, TEACHER, BEFORE, CUT = BLUE, VERMILLION, SKY, "#6B7280"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, YELLOW)
CLASSES = (YELLOW, SKY, VERMILLION, GREEN, PURPLE, ORANGE, BLUE, "#FFFFFF")  # bright: these lie on photographs
MIDDLE_GREY = "#808080"  # legible on white and on black

WIDTH, WIDE = 4.2, 6.4  # inches: a chart, and a sheet of images
DPI, SHEET_DPI = 200, 150

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9CA3AF",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.7,
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": DPI,
}


def styled():
    """A context in which figures are made and saved in this style."""
    return matplotlib.rc_context(STYLE)


def new_chart(height: float = 2.8, rows: int = 1, columns: int = 1, width: float = WIDTH, **keywords) -> Figure:
    """A figure with axes, in inches; it belongs to no window and to no global list of figures."""
    figure = Figure(figsize=(width, height))
    figure.subplots(rows, columns, squeeze=False, **keywords)
    return figure


def new_sheet(rows: int, columns: int, aspect: float, head: float = 0.35) -> tuple[Figure, list[list[Axes]]]:
    """A sheet of images without frames, on no ground of its own, so that it suits a light page and a dark one.

    Args:
        rows: of images.
        columns: of images.
        aspect: height of an image by its width.
        head: inches for titles above.
    """
    height = WIDE / columns * aspect * rows + head
    figure = Figure(figsize=(WIDE, height), dpi=SHEET_DPI, layout="none")
    figure.patch.set_alpha(0)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1 - head / height, wspace=0.02, hspace=0.02 / aspect)
    for axes in grid.flat:
        axes.axis("off")
    return figure, grid.tolist()


def whole_epochs(axes: Axes, last: int) -> None:
    """An x axis that counts epochs."""
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("epochs done")


def class_color(label: int) -> str:
    """The colour of a class; there are eight, then they come again."""
    return CLASSES[label % len(CLASSES)]


def legend_lines(class_names: Sequence[str]) -> int:
    """How many lines the names of the classes take above a sheet; 0 where each cannot have a colour of its own."""
    lines = -(-sum(map(len, class_names)) // 40)
    return lines if len(class_names) <= len(CLASSES) and lines <= 2 else 0


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()
