"""Compare a performance run with published MLPerf results: those nearest to it and those of similar hardware.

published_results.csv has 419 BERT results of rounds v3.0 and v4.1: facts of MLCommons' public repositories
inference_results_v3.0 and inference_results_v4.1 (Apache 2.0), every valid performance run of bert-99 and bert-99.9.
Throughputs are in samples/s; SingleStream's latencies are 90th percentiles in ms. The systems are described as their
submitters did: some count threads as cores, or sockets as nodes.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from files import read_text
from loadgen_logs import primary_metric
from tools.report.plots import COLORS, SERIES, Chart, new_axes, number, save_chart
from tools.report.read import Run
from tools.report.values import whole_number

DATA = Path(__file__).with_name("published_results.csv")
SAMPLES = 10_833  # of MLPerf's data set, SQuAD v1.1's validation set
KINDS = {"accelerator": "with accelerators", "core": "without accelerators"}
SHOWN = 5  # rows of each table
MARKS = {  # color and marker of each benchmark; the open division's have no filling
    (benchmark, is_open): mark
    for benchmark, mark in (("bert-99", (SERIES[0], "o")), ("bert-99.9", (SERIES[1], "s")))
    for is_open in (False, True)
}
GENERAL = {"r", "tm", "cpu", "core", "processor", "ghz"}  # words that tell nothing of a processor


class Hardware(NamedTuple):
    """What a result was measured on."""

    unit: str  # "accelerator", or "core" of a system without accelerators
    name: str  # of the accelerators, or else of the processors
    units: int | float | None  # how many, None if it is not known


class Published(NamedTuple):
    """A published result."""

    entry: str  # its round, division and benchmark
    benchmark: str  # bert-99 or bert-99.9
    open: bool  # of the open division
    round: str
    submitter: str
    system: str
    description: str  # of the hardware
    hardware: Hardware
    scenario: str
    value: float
    unit: str  # samples/s or ms


class Tables(NamedTuple):
    """What the page tells beside the charts."""

    sentences: list[str]
    columns: list[str]
    own: list[str]  # the row of the run itself
    tables: dict[str, list[list[str]]]  # {caption: rows}


def read_published(scenario: str) -> list[Published]:
    """Return the published results of a scenario. Raises UserError if the file of the project is damaged."""
    text = read_text(str(DATA), "the published results", "restore it from git")
    found = []
    for row in csv.DictReader(text.splitlines()):
        if row["scenario"] != scenario:
            continue
        nodes, sockets, cores = (whole_number(row[key]) for key in ("nodes", "sockets", "cores_per_socket"))
        accelerators = whole_number(row["accelerators"]) or 0
        processors = f"{sockets or '?'} × {row['processor']} ({cores or '?'} cores each)"
        processors = processors if nodes == 1 else f"{nodes} nodes of {processors}"
        if accelerators:
            hardware = Hardware("accelerator", row["accelerator"], (nodes or 1) * accelerators)
            processors = f"{accelerators} × {row['accelerator']}; {processors}"
        else:
            hardware = Hardware("core", row["processor"], nodes and sockets and cores and nodes * sockets * cores)
        entry = f"{row['round']}, {row['division']}, {row['benchmark']}"
        is_open, value = row["division"] == "open", float(row["result"])
        names = (row["round"], row["submitter"], row["system"])
        found.append(
            Published(entry, row["benchmark"], is_open, *names, processors, hardware, scenario, value, row["unit"])
        )
    return found


def own_hardware(run: Run) -> Hardware | None:
    """Return what the run was measured on, None if it is not known or was several machines."""
    record = run.record
    if record.get("backend", "").startswith("Ray") or any(
        word.startswith("--network") for word in record.get("command", [])
    ):
        return None  # record.json describes the machine that ran LoadGen
    if record.get("gpu"):
        return Hardware("accelerator", record["gpu"], record.get("accelerators", 1))  # a run of this project uses one
    if record.get("processor"):
        return Hardware("core", record["processor"], record.get("cores"))
    return None


def words_of(name: str) -> set[str]:
    """Return the words of a product's name that tell it from others."""
    return set(re.findall("[a-z0-9]+", name.lower())) - GENERAL


def most_similar(results: list[Published], own: Hardware, value: float) -> list[Published]:
    """Return the results of the same kind of hardware, the most similar first.

    What counts first is the words that the names have in common, rare ones more (a model's number tells more than its
    maker), then the number of accelerators or cores, then the result.
    """
    same = [result for result in results if result.hardware.unit == own.unit]
    frequency = Counter(word for result in same for word in words_of(result.hardware.name))

    def distance(result: Published) -> tuple[float, float, float]:
        common = words_of(own.name) & words_of(result.hardware.name)
        counts = (own.units, result.hardware.units)
        ratio = abs(math.log(counts[0] / counts[1])) if counts[0] and counts[1] else math.inf
        shared = sum(math.log(1 + len(same) / frequency[word]) for word in common)
        return -round(shared, 6), ratio, abs(math.log(result.value / value))

    return sorted(same, key=distance)


def per_unit(value: float, unit: str, hardware: Hardware | None) -> list[str]:
    """Return the cell of a throughput per accelerator or core, "–" without a count; a latency has no such cell."""
    if unit == "ms":
        return []
    return [f"{number(value / hardware.units)} per {hardware.unit}" if hardware and hardware.units else "–"]


def own_result(run: Run) -> tuple[str, float, str] | None:
    """Return (name, value, unit) of a performance run's result, None if it cannot be compared."""
    name, value, unit = primary_metric(run.scenario, run.log)
    return (name, value, unit) if not run.accuracy and run.status != "INCOMPLETE" and value else None


def compare_published(run: Run) -> Tables | None:
    """Return the sentences and tables on published results for a performance run, None without a result."""
    if not (own := own_result(run)):
        return None
    results, (_, value, unit), hardware = read_published(run.scenario), own, own_hardware(run)
    if not results:
        sentence = f"The published rounds at hand, v3.0 and v4.1, have no BERT result of {run.scenario}."
        return Tables([sentence], [], [], {})
    nearest = sorted(results, key=lambda result: abs(math.log(result.value / value)))
    similar = most_similar(results, hardware, value) if hardware else []
    tables = {"Nearest results": nearest[:SHOWN]}
    if hardware and similar:
        caption = f"Most similar hardware: systems {KINDS[hardware.unit]}, by name, then by number of {hardware.unit}s"
        tables[caption] = similar[:SHOWN]
    described = "not known"
    if hardware:
        count = number(hardware.units) if hardware.units else "?"
        described = (
            f"{count} × {hardware.name}" if hardware.unit == "accelerator" else f"{hardware.name}, {count} cores"
        )
    row = ["this run", described, run.status.lower(), f"{number(value)} {unit}", *per_unit(value, unit, hardware), "1"]
    columns = ["System", "Hardware", "Entry", "Result", *["Per unit"][: len(row) - 5], "Ratio"]
    rows = {caption: [table_row(result, value) for result in shown] for caption, shown in tables.items()}
    return Tables(list(sentences(run, hardware, bool(similar))), columns, row, rows)


def table_row(result: Published, value: float) -> list[str]:
    """Return the cells of a published result; `value` is the run's own."""
    cells = [f"{result.system} ({result.submitter})", result.description, result.entry]
    cells += [f"{number(result.value)} {result.unit}", *per_unit(result.value, result.unit, result.hardware)]
    return [*cells, f"{number(result.value / value, 3)} × this run"]


def sentences(run: Run, hardware: Hardware | None, similar: bool) -> Iterator[str]:
    """Yield what a reader must know before comparing the run with published results."""
    yield (
        "The published results are audited results of MLPerf's BERT benchmark, of the round that the table names (v3.0 "
        "or v4.1). The result of this run is not one: MLCommons has not audited it."
    )
    if run.status == "TRIAL":
        yield "This run is a trial, shorter than MLPerf requires."
    elif run.status == "INVALID":
        yield "LoadGen calls this run invalid."
    count = run.log.get("qsl_reported_total_count")
    if count is not None and count != SAMPLES:
        yield f"Its data set has {number(count, 9)} samples, MLPerf's {SAMPLES:,}, so the task is not the same."
    if model := run.record.get("model"):
        yield f"Its model is {model}; the benchmark's is BERT-Large."
    if hardware is None:
        yield "The hardware of this run is not known, so only the nearest results are shown."
    elif not similar:
        yield f"None of the published {run.scenario} results is of a system {KINDS[hardware.unit]}."
    yield (
        "Systems are described as their submitters did: some count threads as cores. The cores of a run of this "
        "project are the logical processors that it may use. The open division allows other models than BERT-Large."
    )


def draw_published(run: Run, out: str, prefix: str) -> Iterator[Chart]:
    """Draw the run among the published results into the folder `out`; `prefix` begins the charts' names."""
    own = own_result(run)
    if not own or not (results := read_published(run.scenario)):
        return
    name, value, unit = own
    # Each kind of hardware has a lane, if it has results.
    axes = new_axes(f"Published {run.scenario} results", f"{name} ({unit}), log scale", "")
    lanes = {"processors\nonly": "core", "accelerators": "accelerator"}
    groups = {lane: [one for one in results if one.hardware.unit == kind] for lane, kind in lanes.items()}
    groups = {lane: group for lane, group in groups.items() if group}
    draw_strip(axes, groups, lambda result: result.value, value, unit)
    low, high = (number(pick(result.value for result in results)) for pick in (min, max))
    summary = f"{len(results)} published results, {low} to {high} {unit}; this run: {number(value)} {unit}."
    yield save_chart(axes, out, f"{prefix}published", f"Each dot is a result. {summary}", bottom=None)

    hardware = own_hardware(run)
    if unit == "ms" or not hardware or not hardware.units:
        return
    same = [one for one in results if one.hardware.unit == hardware.unit and one.hardware.units]
    axes = new_axes(f"Published results per {hardware.unit}", f"{name} ({unit}) per {hardware.unit}, log scale", "")
    groups = {lane: [one for one in same if one.round == lane] for lane in sorted({one.round for one in same})}
    own_value, each = value / hardware.units, [one.value / (one.hardware.units or 1) for one in same]
    draw_strip(axes, groups, lambda one: one.value / (one.hardware.units or 1), own_value, unit)
    summary = f"{len(same)} published results of systems {KINDS[hardware.unit]}: {number(min(each))} to "
    summary += f"{number(max(each))} {unit} per {hardware.unit}; this run: {number(own_value)}."
    yield save_chart(axes, out, f"{prefix}published-per-{hardware.unit}", summary, bottom=None)


def draw_strip(
    axes: Axes, groups: dict[str, list[Published]], value_of: Callable[[Published], float], own: float, unit: str
) -> None:
    """Draw a lane of dots for each group {label: results} over a log scale, and mark the run's own value."""
    axes.set_xscale("log")
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    shown = set()
    for lane, results in enumerate(groups.values()):
        ranked = sorted(results, key=value_of)
        spread = np.arange(len(ranked)) * 0.618034 % 1 - 0.5  # the golden ratio spreads neighbors evenly over the lane
        for (benchmark, is_open), (color, marker) in MARKS.items():
            chosen = [(one.benchmark, one.open) == (benchmark, is_open) for one in ranked]
            label = benchmark + (" (open division)" if is_open else "")
            style: dict[str, Any] = {"color": color, "linestyle": "none", "markersize": 4, "alpha": 0.7}
            if is_open:
                style["markerfacecolor"] = "none"
            if any(chosen) and label not in shown:
                style["label"] = label
                shown.add(label)
            axes.plot(np.array([value_of(one) for one in ranked])[chosen], lane + 0.6 * spread[chosen], marker, **style)
    axes.axvline(own, color=COLORS["ink"], linestyle="--", linewidth=1)
    mark: dict[str, Any] = {"color": COLORS["ink"], "markersize": 9, "linestyle": "none"}
    axes.plot(own, (len(groups) - 1) / 2, "D", label=f"this run: {number(own)} {unit}", **mark)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(-0.6, len(groups) - 0.4)
    low, high = axes.dataLim.intervalx
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
