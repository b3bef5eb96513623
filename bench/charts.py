"""The charts of the page: an SVG for a light page, and one for a dark page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from bench.measure import Bars

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bench.measure import Chart, Lines

THEMES = {
    "light": {"page": "#ffffff", "ink": "#1f2328", "grid": "#d8dee4", "others": "#a8b1bb"},
    "dark": {"page": "#131416", "ink": "#d7dde3", "grid": "#30363d", "others": "#59636e"},
}
OURS = {"light": "#0969da", "dark": "#4493f8"}
BY_HAND = {"light": "#57606a", "dark": "#9198a1"}
OTHERS = ("#bf8700", "#8250df", "#1a7f37", "#cf222e", "#bc4c00", "#6e7781", "#bf3989", "#0a7ea4")


def draw(chart: Chart, titles: Mapping[str, str], directory: Path) -> list[Path]:
    """Write both files of a chart; *titles* are those of the contestants, by their names."""
    # Slow to import, and there is a page without it.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for theme, colours in THEMES.items():
        style: Any = {
            "svg.fonttype": "none",  # text is text, in the page's reader's own font
            "svg.hashsalt": chart.name,  # the same chart is the same file
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": colours["grid"],
            "grid.color": colours["grid"],
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["ink"]
            ),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), colours["page"]),
            **dict.fromkeys(("legend.facecolor", "legend.edgecolor"), colours["page"]),
        }
        with mpl.rc_context(style):
            height = 0.8 + 0.3 * len(chart.values) if isinstance(chart, Bars) else 3.6
            figure = Figure(figsize=(7.6, height), layout="constrained")
            axes = figure.add_subplot()
            axes.set_title(chart.title)
            if isinstance(chart, Bars):
                _bars(axes, chart, titles, theme)
            else:
                _lines(axes, chart, titles, theme)
            file = directory / f"{chart.name}-{theme}.svg"
            figure.savefig(file, metadata={"Date": None, "Creator": None})
            files.append(file)
    return files


def _bars(axes: Any, chart: Bars, titles: Mapping[str, str], theme: str) -> None:
    names = [*chart.values][::-1]  # the first is on top
    values = [chart.values[name] for name in names]
    axes.barh(
        [titles.get(name, name) for name in names],
        values,
        height=0.7,
        color=[_colour(name, theme) or THEMES[theme]["others"] for name in names],
    )
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        low, high = chart.ranges.get(name, (value, value))
        axes.plot([low, high], [place, place], color=THEMES[theme]["ink"], linewidth=1)
        axes.annotate(
            chart.shown.format(value).removesuffix(".0"),
            (max(value, high), place),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
        )
    axes.margins(x=0.12)
    axes.set_xlim(left=min(0, *values), right=None if any(values) else 1)
    axes.tick_params(left=False)
    axes.xaxis.grid(visible=True)
    axes.set_axisbelow(True)


def _lines(axes: Any, chart: Lines, titles: Mapping[str, str], theme: str) -> None:
    others = iter(OTHERS * len(chart.values))
    for name, values in chart.values.items():
        colour = _colour(name, theme) or next(others)
        axes.plot(
            [*values], [*values.values()], marker="o", color=colour, label=titles.get(name, name)
        )
    axes.set_xscale("log")
    ticks = sorted({number for values in chart.values.values() for number in values})
    axes.set_xticks(ticks, [f"{number:,}" for number in ticks])
    axes.minorticks_off()
    axes.set_xlabel(chart.over)
    axes.set_ylim(bottom=0)
    axes.yaxis.grid(visible=True)
    axes.legend()


def _colour(name: str, theme: str) -> str | None:
    if ".ours" in name:
        return OURS[theme]
    return BY_HAND[theme] if ".by_hand" in name else None


def image(chart: Chart, place: str) -> str:
    """A chart in Markdown, as GitHub and Sphinx show it."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{place}/{chart.name}-dark.svg">'
        f'<img src="{place}/{chart.name}-light.svg" alt="{escape(chart.title)}"></picture>\n'
    )
