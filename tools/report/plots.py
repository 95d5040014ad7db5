"""Draw the charts of a report: as PNG files, and as SVG in the page's colors, which differ in light and dark."""

import io
import os
import re
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from files import atomic_write
from loadgen_logs import primary_metric
from tools.report.read import Run, Samples

# Colors of the PNG files; in the page, each becomes the variable of template.html that has its name.
# fmt: off
COLORS = {
    "ink": "#1f2329", "muted": "#59636f", "grid": "#d8dee5", "limit": "#c4132b", "s1": "#0b62c5", "s2": "#b3470c",
    "s3": "#1a7f38", "s4": "#8250e0", "s5": "#8a5d01", "s6": "#b5307f",
}
STYLE = {
    "svg.fonttype": "none", "font.size": 10.5, "font.family": "sans-serif", "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["ink"], "axes.edgecolor": COLORS["muted"], "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"], "grid.color": COLORS["grid"], "grid.linewidth": 0.8, "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False, "lines.linewidth": 1.8,
    "text.parse_math": False,  # a name with $, _, ^ or \\ is not a formula
}
# fmt: on
SERIES = [COLORS[f"s{number}"] for number in range(1, 7)]
LIMIT: dict[str, Any] = {"color": COLORS["limit"], "linewidth": 1.4}
MANY = 20  # more runs than this are compared without the charts of each
DOTS = "#6d8fbb"  # readable on white and on black, because dots are an image and keep their color


class Curves(NamedTuple):
    """What a comparison shows of a run's samples: arrays of some hundred points each."""

    percentiles: tuple[np.ndarray, np.ndarray]  # (places on the axis of percentiles, latency in ms)
    throughput: tuple[np.ndarray, np.ndarray]  # (seconds, samples/s)


class Chart(NamedTuple):
    """A chart of the page."""

    name: str
    caption: str
    alt: str  # what the chart shows, in words
    svg: str


def number(value: float, digits: int = 4) -> str:
    """Return `value` as text of `digits` significant digits, with thousands separators."""
    if not 1e-9 < abs(value) < 1e15:  # also 0, NaN and infinity
        return f"{value:.{digits}g}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def new_axes(title: str, x: str, y: str) -> Axes:
    """Return the axes of an empty chart; `x` and `y` are their labels."""
    axes = Figure(figsize=(4.8, 3.1), layout="constrained").add_subplot(title=title, xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: number(value))
    return axes


def save_chart(axes: Axes, out: str, name: str, caption: str, summary: str = "", bottom: float | None = 0) -> Chart:
    """Write a chart as a PNG file into the folder `out` and return it; its alt text is `summary` or the caption.

    The vertical axis begins at `bottom`, or as it is if that is None.
    """
    figure: Any = axes.figure
    axes.set_ylim(bottom=bottom)
    if (legend := axes.get_legend_handles_labels())[0]:
        figure.legend(*legend, loc="outside lower left", ncols=2, fontsize=9)
    path = os.path.join(out, f"report-{name}.png")
    with atomic_write(path, "name another folder with --out", "a chart") as png:
        figure.savefig(png, format="png", dpi=160)
    figure.set_layout_engine("none")  # keep the layout, whose computation takes a third of the time
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # an id must be unique in the page, but every chart has the same ones
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)  # HTML needs no namespaces
    for color, value in COLORS.items():
        svg = svg.replace(value, f"var(--{color})")
    return Chart(name, caption, f"{axes.get_title(loc='left')}. {summary or caption}", svg)


def plot_dots(axes: Axes, x: np.ndarray, y: np.ndarray, bins: int) -> None:
    """Plot points, and lines of their p50 and p99 over at most `bins` ranges of `x` with 20 points on average."""
    size, alpha = 3 if len(x) > 300 else 7, max(0.1, min(0.8, 1000 / len(x)))
    # An image, because shapes for all samples of a run would take megabytes.
    axes.plot(x, y, ".", color=DOTS, markersize=size, alpha=alpha, rasterized=True)
    bins = min(bins, len(x) // 20)
    if bins < 2:
        return
    edges = np.linspace(x.min(), x.max(), bins + 1)
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, bins - 1)
    filled = np.unique(place)
    centers = (edges[filled] + edges[filled + 1]) / 2
    for percent, color, dash in ((50, SERIES[0], "-"), (99, SERIES[1], "--")):
        values = [np.percentile(y[place == row], percent) for row in filled]
        axes.plot(centers, values, color=color, label=f"p{percent}", linestyle=dash)


def percentile_curve(latency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (places on the axis of percentiles, latency), up to 600 points of N latencies.

    The axis is stretched towards the tail: p90 to p99 is as wide as p99 to p99.9.
    """
    count = len(latency)
    even, tail = np.linspace(0, count - 1, 400).astype(int), count - np.geomspace(1, count, 200).astype(int)
    keep = np.unique(np.concatenate((even, tail)))
    return -np.log10(1 - (keep + 0.5) / count), np.sort(latency)[keep]


def mark_percentiles(axes: Axes) -> None:
    """Name the percentiles on the axis of `percentile_curve`."""
    ticks = {-np.log10(1 - percent / 100): f"p{percent:g}" for percent in (50, 90, 99, 99.9, 99.99, 99.999)}
    shown = [place for place in ticks if place <= axes.dataLim.x1]
    axes.set_xticks(shown, [ticks[place] for place in shown])


def throughput_curve(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Return (seconds, samples/s) over the run as the corners of a step curve."""
    done = samples.start + samples.latency
    counts, edges = np.histogram(done, bins=max(1, min(60, len(done) // 10)), range=(0, done.max()))
    return np.repeat(edges, 2)[1:-1], np.repeat(counts / np.diff(edges), 2)


def mark_target(run: Run, limit: float, draw_line: Callable[..., Any]) -> None:
    """Mark the latency limit, or else a latency that is the primary metric, with axes.axvline or axes.axhline."""
    name, value, unit = primary_metric(run.scenario, run.log)
    if limit:
        percent = 100 * run.log.get("effective_target_latency_percentile", 0.99)
        draw_line(limit, label=f"p{percent:g} limit: {number(limit)} ms", **LIMIT)
    elif unit == "ms" and value is not None and run.status in ("VALID", "INVALID"):
        draw_line(value, label=f"primary metric: {name} {number(value)} ms", **LIMIT)


def draw_run(run: Run, out: str, prefix: str) -> Iterator[Chart]:
    """Draw the charts of a run into the folder `out`, if it has samples; `prefix` begins their names."""
    if not (samples := run.samples):
        return
    start, latency = samples.timings(run.scenario)
    unit = {"Offline": "samples", "MultiStream": "queries of 8 samples"}.get(run.scenario, "queries")
    p50, p90, p99 = map(number, np.percentile(latency, (50, 90, 99), method="higher"))
    limit = run.log.get("effective_target_latency_ns", 0) / 1e6 if run.scenario == "Server" else 0
    limit = limit if np.isfinite(limit) else 0
    within = f"{number(100 * (latency <= limit).mean())} % within the limit of {number(limit)} ms, " if limit else ""
    summary = f"{len(latency):,} {unit}: {within}p50 {p50} ms, p90 {p90} ms, p99 {p99} ms."

    axes = new_axes("Latency distribution", "latency (ms)", unit)
    axes.hist(latency, bins=50, color=SERIES[0], range=(0, max(np.percentile(latency, 99.9), limit * 1.05)))
    mark_target(run, limit, axes.axvline)
    yield save_chart(axes, out, f"{prefix}histogram", summary)

    axes = new_axes("Latency by percentile", "percentile", "latency (ms)")
    axes.plot(*percentile_curve(latency), color=SERIES[0])
    mark_percentiles(axes)
    mark_target(run, limit, axes.axhline)
    yield save_chart(axes, out, f"{prefix}percentiles", f"The axis is stretched towards the slowest {unit}.", summary)

    if run.scenario == "Offline":
        axes = new_axes("Samples answered over time", "time (s)", "samples")
        done = np.sort(start + latency / 1e3)
        keep = np.linspace(0, len(done) - 1, min(500, len(done))).astype(int)
        axes.plot(done[keep], keep + 1, color=SERIES[0])
        caption = f"All {len(done):,} samples arrive at the start; the last is answered after {number(done[-1])} s."
    else:
        axes = new_axes("Latency over time", "time (s)", "latency (ms)")
        plot_dots(axes, start, latency, 40)
        halves = " and ".join(number(np.median(half)) for half in np.array_split(latency, 2) if len(half))
        caption = f"The dots are {unit}. p50 of the first and the second half of the run: {halves} ms."
    yield save_chart(axes, out, f"{prefix}time", caption)

    axes = new_axes("Throughput over time", "time (s)", "throughput (samples/s)")
    seconds, rate = throughput_curve(samples)
    axes.plot(seconds, rate, color=SERIES[0])
    axes.fill_between(seconds, rate, color=SERIES[0], alpha=0.15, linewidth=0)
    if run.scenario in ("Offline", "Server") and (target := run.log.get("effective_target_qps")):
        axes.axhline(target, label=f"target_qps: {number(target)}", **LIMIT)
    caption = f"{number(rate.min())} to {number(rate.max())} samples/s, counted every {number(seconds[1])} s."
    yield save_chart(axes, out, f"{prefix}throughput", caption)

    if run.lengths is not None:
        axes = new_axes("Latency by sequence length", "sequence length (tokens)", "latency (ms)")
        latency = samples.latency * 1e3
        plot_dots(axes, run.lengths, latency, 24)
        by_length = latency[np.argsort(run.lengths, kind="stable")]
        short, long = (number(np.median(half)) for half in np.array_split(by_length, 2))
        lengths = f"{run.lengths.min()} to {run.lengths.max()} tokens"
        caption = f"Sequences of {lengths}. p50 of the shorter and the longer half: {short} and {long} ms."
        yield save_chart(axes, out, f"{prefix}length", caption)


def curves_of(run: Run) -> Curves | None:
    """Return what a comparison shows of a run's samples, None if it has none."""
    if not run.samples:
        return None
    return Curves(percentile_curve(run.samples.timings(run.scenario)[1]), throughput_curve(run.samples))


def comparison_styles(runs: list[Run]) -> list[dict[str, Any]]:
    """Return the style of each run's curves: all different or, of many runs, gray with the extreme results marked."""
    names = [f" {run.name}" if run.name.startswith("_") else run.name for run in runs]  # matplotlib hides _names
    if len(runs) <= MANY:
        styles = zip(names, cycle(SERIES), cycle(("-", "--", "-.", ":")))
        return [{"label": name, "color": color, "linestyle": dash} for name, color, dash in styles]
    gray: dict[str, Any] = {"color": COLORS["muted"], "linewidth": 0.8, "alpha": 0.5}
    styles_of = [dict(gray) for _ in runs]
    results = [primary_metric(run.scenario, run.log) for run in runs]
    ranked = sorted((value, place) for place, (_, value, _) in enumerate(results) if value is not None)
    for word, color, (value, place) in zip(("lowest", "highest"), SERIES, ranked[:: max(1, len(ranked) - 1)]):
        label = f"{word}: {number(value)} {results[place][2]}, {names[place].strip()}"
        styles_of[place] = {"label": label, "color": color, "zorder": 3}
    return styles_of


def draw_comparison(runs: list[Run], curves: list[Curves | None], out: str) -> Iterator[Chart]:
    """Draw the curves of the performance runs of each scenario that has several into common charts."""
    for scenario in dict.fromkeys(run.scenario for run in runs):
        same = [(run, curve) for run, curve in zip(runs, curves) if run.scenario == scenario and curve]
        if len(same) < 2:
            continue
        percentiles = new_axes(f"{scenario}: latency by percentile", "percentile", "latency (ms)")
        throughput = new_axes(f"{scenario}: throughput over time", "time (s)", "throughput (samples/s)")
        shown = [run for run, _ in same]
        for (_, curve), style in zip(same, comparison_styles(shown)):
            percentiles.plot(*curve.percentiles, **style)
            throughput.plot(*curve.throughput, **style)
        mark_percentiles(percentiles)
        names = ", ".join(run.name for run in shown)
        caption = f"Runs: {names}." if len(shown) <= MANY else f"{len(shown)} runs; the table below has their results."
        summary = f"{caption} The tables below have the numbers."
        yield save_chart(percentiles, out, f"compare-{scenario}-percentiles", caption, summary)
        yield save_chart(throughput, out, f"compare-{scenario}-throughput", caption, summary)
