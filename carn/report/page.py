"""Page furniture: self-contained HTML from templates, pictures as data URIs, plots as inline SVG.

Same input, same bytes: nothing here takes a clock, a random id or the order of a set.
"""

import base64
import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = Literal["ink", "muted", "line", "kept", "dropped", "surplus", "alert"]

# Plots are drawn in the light theme's colours, each of which then becomes the CSS variable of that
# name in templates/base.html, so that an inline plot follows the page into the dark theme. The hues
# are of the palette of Okabe and Ito, https://jfly.uni-koeln.de/color/, safe for colour-blind eyes.
COLOURS: Mapping[Colour, str] = {
    "ink": "#1b2330",
    "muted": "#5b6675",
    "line": "#d9dee5",
    "kept": "#0072b2",
    "dropped": "#a3adba",
    "surplus": "#e69f00",
    "alert": "#b3261e",
}
NUM_BINS = 50
PLOT_SIZE_IN = (6.4, 2.7)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One stack of a histogram.

    Attributes:
        label: its name in the legend.
        values: (N,), any unit; not a number and infinite values are an error of the plot.
        colour: its place in the palette.
    """

    label: str
    values: npt.NDArray[np.float64]
    colour: Colour


def render_page(template: str, /, **context: object) -> str:
    """The HTML of a template of this package; everything put into it is escaped.

    Raises:
        jinja2.UndefinedError: the template uses a name that the context does not hold.
        jinja2.TemplateNotFound: there is no such template in carn/report/templates.
    """
    return _environment().get_template(template).render(**context)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("carn.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=format_count, percent=format_percent, data_uri=data_uri)
    return environment


# ---------------------------------------------------------------------------------------- words


def format_count(number: int) -> str:
    """An integer with its thousands apart: `1,200`."""
    return f"{number:,}"


def format_percent(fraction: float) -> str:
    """A fraction (1.0 is the whole) as a percentage: `72.1 %`; a dash when it is not a number."""
    return f"{100 * fraction:.1f} %" if math.isfinite(fraction) else "–"


def plural(number: int, noun: str) -> str:
    """A count with its noun, which takes an s: `1 tile`, `1,200 tiles`."""
    return f"{format_count(number)} {noun}{'' if number == 1 else 's'}"


# ------------------------------------------------------------------------------------- pictures


def data_uri(content: bytes, mime: str = "image/jpeg") -> str:
    """The content as an address that needs no network.

    Raises:
        ValueError: the content is empty, and would show as a torn picture.
    """
    if not content:
        raise ValueError(f"a picture ({mime}) of 0 bytes; leave the picture out instead")
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


# ---------------------------------------------------------------------------------------- plots


def plot_histogram(
    series: Sequence[Series],
    *,
    name: str,
    x_label: str,
    x_range: tuple[float, float] | None = None,
    limit: tuple[float, str] | None = None,
) -> Markup | None:
    """A stacked histogram of tiles as inline SVG, or None when there is no value to draw.

    Args:
        series: what is stacked, the first lowest; those without values stay out of the legend.
        name: prefix of the ids within the SVG, unique on the page: letters, digits and hyphens.
        x_label: what is counted, with its unit.
        x_range: first and last edge of the bins, values outside it are not shown; None: 0 (or the
            least value if that is below) to the largest value.
        limit: where to draw an upright line, and what to write at it.

    Raises:
        ValueError: a value is infinite or not a number, or the name cannot stand in an id.
    """
    from matplotlib.figure import Figure

    values = np.concatenate([np.empty(0), *(part.values for part in series)])
    if not np.isfinite(values).all():
        raise ValueError(f"plot {name!r}: values must be finite; drop those that are not")
    if values.size == 0:
        return None
    low, high = x_range or (min(0.0, float(values.min())), float(values.max()))
    edges = np.linspace(low, high if high > low else low + 1.0, NUM_BINS + 1)
    figure = Figure(figsize=PLOT_SIZE_IN, layout="constrained")
    axes = figure.add_subplot()
    base = np.zeros(NUM_BINS)
    for part in (part for part in series if part.values.size):
        counts = np.histogram(part.values, bins=edges)[0]
        axes.bar(
            edges[:-1],
            counts,
            width=0.9 * np.diff(edges),
            bottom=base,
            align="edge",
            color=COLOURS[part.colour],
            label=f"{part.label} ({format_count(part.values.size)})",
        )
        base += counts
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.12 * max(1.0, float(base.max())))
    axes.set_xlabel(x_label, color=COLOURS["muted"])
    axes.set_ylabel("tiles", color=COLOURS["muted"])
    if limit is not None:
        _draw_limit(axes, *limit)
    _dress(axes)
    figure.legend(
        loc="outside upper left", ncols=3, frameon=False, labelcolor=COLOURS["ink"], handlelength=1
    )
    return inline_svg(figure, name=name, label=f"Histogram: {x_label}")


def _draw_limit(axes: "Axes", limit: float, text: str) -> None:
    low, high = axes.get_xlim()
    is_right_half = limit > (low + high) / 2
    axes.axvline(limit, color=COLOURS["alert"], linewidth=1.5, linestyle=(0, (4, 2)))
    axes.annotate(
        text,
        (limit, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if is_right_half else 5, -3),
        textcoords="offset points",
        ha="right" if is_right_half else "left",
        va="top",
        color=COLOURS["alert"],
    )


def _dress(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.tick_params(colors=COLOURS["line"], labelcolor=COLOURS["muted"])
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["line"])


def inline_svg(figure: "Figure", *, name: str, label: str) -> Markup:
    """A matplotlib figure as an SVG element to stand within HTML, the same bytes each time.

    Colours of `COLOURS` become CSS variables, text stays text in the page's font, ids get `name` in
    front, and what would reach out of the element (its style sheet, foreign addresses) is removed.

    Args:
        figure: built without pyplot, so that no global state holds on to it.
        name: prefix of the ids, unique on the page: letters, digits and hyphens.
        label: what a screen reader says in place of the picture.

    Raises:
        ValueError: the name cannot stand in an id.
    """
    import matplotlib as mpl

    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise ValueError(f"plot name {name!r}: letters, digits and hyphens only, a letter first")
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "carn"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    head, _, body = buffer.getvalue().partition("<svg ")[2].partition(">")
    view_box = re.findall(r'viewBox="([^"]*)"', head)[0]
    body = re.sub(r"<style .*?</style>|<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for colour, code in COLOURS.items():
        body = body.replace(code, f"var(--{colour})")
    head = Markup('<svg class="plot" role="img" aria-label="{}" viewBox="{}">')
    return head.format(label, view_box) + Markup(body.strip())
