"""Make one page of a run's logs: verdict, figures, pictures, settings, and the worst answers of an accuracy run.

    python3 report.py build/logs                 writes build/logs/report.html, and its pictures as PNG files
    python3 report.py logs-fp32 logs-int8        compares runs: build/report/report.html

A log folder is one that run.py wrote, or any other harness under LoadGen. The figures that count are LoadGen's own, of
its detail log; the pictures come from each sample's latency in LoadGen's trace. What else run.py knows is in
record.json. report_template.html is the page.
"""

import argparse
import io
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

try:
    import jinja2
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter
except ModuleNotFoundError as missing:
    raise SystemExit(f"report.py: error: the package {missing.name} is not installed; `make venv BACKEND=report` "
                     "installs it") from None

import config
import record
from config import UserError
from create_squad_data import Features, Squad, load_features, read_vocab
from run import RESULTS, TRACE, detail_entries, figure
from squad_eval import DTYPES, read_log, score_log, score_question

HERE = os.path.dirname(os.path.abspath(__file__))
OFFICIAL_MS = 600_000  # MLPerf's least duration of a performance run
WORST = 20  # answers shown

# The pictures' colours on paper; on the page each becomes the template's variable of that name, light or dark.
COLORS = {"ink": "#1f2329", "muted": "#59636f", "grid": "#d8dee5", "limit": "#c4132b", "s1": "#0b62c5", "s2": "#b3470c",
          "s3": "#1a7f38", "s4": "#8250e0", "s5": "#8a5d01", "s6": "#b5307f"}
SERIES = [COLORS[f"s{number}"] for number in range(1, 7)]
DOTS = "#6d8fbb"  # readable on white and on black, since dots are drawn as an image
LINES = ("-", "--", "-.", ":")
STYLE = {"svg.fonttype": "none", "font.size": 10.5, "font.family": "sans-serif", "axes.spines.top": False,
         "axes.spines.right": False, "text.color": COLORS["ink"], "axes.labelcolor": COLORS["ink"],
         "axes.edgecolor": COLORS["muted"], "xtick.color": COLORS["muted"], "ytick.color": COLORS["muted"],
         "axes.grid": True, "grid.color": COLORS["grid"], "grid.linewidth": 0.8, "axes.axisbelow": True,
         "legend.frameon": False, "lines.linewidth": 1.8, "axes.titlesize": 11, "axes.titlelocation": "left"}

# A sample in LoadGen's trace: when it was scheduled (microseconds), which it is, nanoseconds from then to its answer.
SAMPLE = re.compile(rb'"ts":([\d.]+),"args":\{"sample_seq":\d+,"query_seq":(\d+),"sample_idx":(\d+),'
                    rb'"issue_start_ns":-?\d+,"complete_ns":(\d+)')


@dataclass
class Samples:
    """The N answered samples of a run in the order in which they were scheduled."""

    start: np.ndarray  # float64 (N,), seconds from the first one's schedule
    latency: np.ndarray  # float64 (N,), seconds from its schedule to its answer
    query: np.ndarray  # int64 (N,), the query it belongs to
    index: np.ndarray  # int64 (N,), which sample of the library it is

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        """(start, latency) of each query in seconds; it is answered when its last sample is."""
        first = np.flatnonzero(np.diff(self.query, prepend=-1))
        return self.start[first], np.maximum.reduceat(self.latency, first)


@dataclass
class Run:
    """What a log folder holds."""

    folder: str
    name: str  # short, unlike the other runs'
    log: dict[str, Any]  # LoadGen's detail log, {key: value}
    problems: list[str]  # LoadGen's errors and warnings
    record: dict[str, Any]  # run.py's, {} where another harness ran
    samples: Samples | None  # None without a trace
    lengths: np.ndarray | None = None  # int (N,), tokens of each of `samples`, where the data set is known
    notes: list[str] = field(default_factory=list)  # what is missing, and why
    score: dict[str, Any] | None = None  # of an accuracy run: exact_match, f1, questions and more

    @property
    def scenario(self) -> str:
        scenario: str = self.log["effective_scenario"]
        return scenario

    @property
    def accuracy(self) -> bool:
        mode: str = self.log["effective_test_mode"]
        return mode == "AccuracyOnly"

    @property
    def finished(self) -> bool:
        if not self.accuracy:
            return "result_validity" in self.log
        try:
            with open(os.path.join(self.folder, config.ACCURACY_LOG), "rb") as file:
                return file.read().rstrip().endswith(b"]")
        except OSError:
            return False

    @property
    def trial(self) -> bool:
        return not self.accuracy and self.log.get("effective_min_duration_ms", 0) < OFFICIAL_MS

    @property
    def status(self) -> tuple[str, str]:
        """(in one word, what that means)."""
        if not self.finished:
            return "INCOMPLETE", "The run did not finish: nothing here is a result."
        if self.accuracy:
            return "ACCURACY", "An accuracy run: it shows how right the answers are, its speed does not count."
        verdict, log = self.log["result_validity"], self.log
        reason = "" if verdict == "VALID" else " ".join(
            f"{log.get('result_invalid_reason', '')} {log.get('early_stopping_result', '')}".replace("*", " ").split())
        if self.trial:
            seconds = self.log.get("effective_min_duration_ms", 0) / 1000
            return "TRIAL", (f"A short trial, no official result: at least {number(seconds)} s were asked for, MLPerf "
                             f"asks for {OFFICIAL_MS // 1000} s. Under these settings LoadGen's verdict is {verdict}"
                             + (f": {reason}" if reason else "."))
        if verdict == "VALID":
            return verdict, "LoadGen calls this run valid under its settings below."
        return verdict, reason or "LoadGen calls this run invalid."


def number(value: float, digits: int = 4) -> str:
    """A figure for people: 4 significant digits, thousands apart."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def read_trace(folder: str) -> Samples | None:
    """The `Samples` of LoadGen's trace in `folder`, None where it holds none."""
    path = os.path.join(folder, TRACE)
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                rows = np.fromiter((float(value) for match in SAMPLE.finditer(content) for value in match.groups()),
                                   float)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot read LoadGen's trace ({error.strerror}); remove it to do without") from None
    if not len(rows):
        return None
    rows = rows.reshape(-1, 4)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    start, query, index, latency = rows.T
    return Samples((start - start[0]) / 1e6, latency / 1e9, query.astype(int), index.astype(int))


def read_run(folder: str, name: str) -> Run:
    """The `Run` in `folder`. Raises UserError where that is none, or damaged."""
    entries = detail_entries(folder)
    log = {entry["key"]: entry["value"] for entry in entries}
    scenario, mode = log.get("effective_scenario"), log.get("effective_test_mode")
    if scenario not in RESULTS or mode not in ("PerformanceOnly", "AccuracyOnly"):
        raise UserError(f"{folder}: LoadGen's detail log names no scenario and mode that this reports on ({scenario}, "
                        f"{mode}); give the log folder of a performance or accuracy run")
    problems = [f"{kind}: {entry['value']}" for entry in entries for kind in ("error", "warning")
                if isinstance(entry.get("metadata"), dict) and entry["metadata"].get(f"is_{kind}")]
    run = Run(folder, name, log, list(dict.fromkeys(problems)), record.read(folder), read_trace(folder))
    if not run.record:
        run.notes.append("There is no record.json in this folder, so system, model and versions are not known.")
    if not run.accuracy and run.samples is None:
        run.notes.append("LoadGen's trace holds no samples, so there are no pictures; run.py turns the trace on.")
    return run


Data = tuple[Squad, Features, dict[str, int]]


class DataSets:
    """The data sets of the runs, each read once."""

    def __init__(self, val_data: str | None = None, vocab_file: str | None = None) -> None:
        """What the user named, None for each run's own, or the environment's."""
        self.given = val_data, vocab_file
        self.known: dict[tuple[str, ...], Data] = {}

    def of(self, run: Run) -> Data | None:
        """(Squad, Features, {token: id}) of a run; None where they are not known, which it notes on the run.

        Raises UserError where a file is damaged, or one that the user named is missing.
        """
        recorded = run.record.get("dataset"), run.record.get("vocab")
        paths = tuple(given or own or default
                      for given, own, default in zip(self.given, recorded, config.dataset_files()))
        for path, given in zip(paths, self.given):
            if not os.path.isfile(path) and not given:
                run.notes.append(f"{path} is absent, so there is {self.lost(run)}; --val_data and --vocab_file name "
                                 "the run's data set and vocabulary.")
                return None
        if paths not in self.known:
            self.known[paths] = *load_features(paths[0], paths[1]), read_vocab(paths[1])
        count, features = run.log.get("qsl_reported_total_count"), self.known[paths][1]
        expected = run.record.get("max_examples") or len(features)
        if count != expected and not all(self.given):
            run.notes.append(f"The run had {count} samples, {paths[0]} makes {expected}: it is not the run's data set, "
                             f"so there is {self.lost(run)}; --val_data and --vocab_file name the right ones.")
            return None
        if run.samples and run.samples.index.max() >= len(features):
            raise UserError(f"{paths[0]}: makes {len(features)} samples, {run.folder} has number "
                            f"{run.samples.index.max()}; give the run's data set with --val_data")
        return self.known[paths]

    def lost(self, run: Run) -> str:
        return "no score" if run.accuracy else "no picture of latency against length"


def score_run(run: Run, data: Data, dtype: str, transposed: bool) -> None:
    """Set the score of an accuracy run; `data` is of `DataSets.of`. Raises UserError where the log is damaged."""
    squad, features, vocab = data
    logits = read_log(os.path.join(run.folder, config.ACCURACY_LOG), len(features), dtype, transposed)
    figures, answers = score_log(squad, features, vocab, logits)
    scored = [(question, answers[question.id], *score_question(question, answers[question.id]))
              for question in squad.questions if question.id in answers]
    wrong = sorted((entry for entry in scored if not entry[2]), key=lambda entry: entry[3])
    worst = [entry for entry in wrong if entry[3] == 0] or wrong
    steps = np.unique(np.linspace(0, len(worst) - 1, WORST).astype(int)) if len(worst) > WORST else range(len(worst))
    run.score = {**figures, "of": len(squad.questions), "questions": len(scored),
                 "exact": sum(entry[2] for entry in scored), "none": sum(entry[3] == 0 for entry in scored),
                 "unanswered": sum(not entry[1] for entry in scored), "candidates": len(worst),
                 "worst": [{"question": question.text, "answer": answer, "f1": 100 * f1,
                            "accepted": list(dict.fromkeys(question.answers))}
                           for question, answer, _, f1 in (worst[step] for step in steps)]}


@dataclass
class Picture:
    name: str
    title: str
    alt: str  # what it shows, in words
    caption: str
    svg: str


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    made = Figure(figsize=(4.8, 3.1), layout="constrained")
    axes = made.add_subplot(title=title, xlabel=x, ylabel=y)
    axes.grid(axis="x", visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    return made, axes


def save(made: Figure, out: str, name: str, title: str, alt: str, caption: str) -> Picture:
    """Write the figure `made` as a PNG file into the folder `out` and return it as a `Picture`."""
    axes = made.axes[0]
    if axes.get_legend_handles_labels()[0]:
        made.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=9)
    made.savefig(os.path.join(out, f"report-{name}.png"), dpi=160)
    text = io.StringIO()
    made.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # every picture has the same ones
    for color, value in COLORS.items():
        svg = svg.replace(value, f"var(--{color})")
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)  # HTML needs no namespaces
    return Picture(name, title, alt, caption, svg)


def middle_lines(axes: Axes, x: np.ndarray, y: np.ndarray, bins: int) -> None:
    """Draw median and 99th percentile of `y` over at most `bins` ranges of `x`, of 20 samples and more on average."""
    bins = min(bins, len(x) // 20)
    if bins < 2:
        return
    edges = np.linspace(x.min(), x.max(), bins + 1)
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, bins - 1)
    filled = [row for row in range(bins) if (place == row).any()]
    centers = (edges[filled] + edges[np.array(filled) + 1]) / 2
    for percent, color, label in ((50, SERIES[0], "median"), (99, SERIES[1], "99th percentile")):
        axes.plot(centers, [np.percentile(y[place == row], percent) for row in filled], color=color, label=label,
                  linestyle="-" if percent == 50 else "--")


def dots(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Draw the points as an image: as many shapes as a run has samples would be megabytes."""
    axes.plot(x, y, ".", color=DOTS, markersize=3 if len(x) > 300 else 7, alpha=max(0.1, min(0.8, 1000 / len(x))),
              rasterized=True)


def counted(run: Run) -> tuple[float | None, float | None]:
    """(percentile that counts, limit in ms or None) of the run's scenario; the percentile is None for Offline."""
    if run.scenario == "Offline":
        return None, None
    limit = run.log.get("effective_target_latency_ns") if run.scenario == "Server" else None
    return 100 * run.log.get("effective_target_latency_percentile", {"SingleStream": 0.9}.get(run.scenario, 0.99)), \
        limit and limit / 1e6


def mark_target(axes: Axes, run: Run, line: Callable[..., Any]) -> None:
    """Draw what the scenario's latency is held against with `line` (axes.axvline or axes.axhline)."""
    percentile, limit = counted(run)
    what, value, unit = figure(run.scenario, run.log)
    if limit:
        line(limit, color=COLORS["limit"], label=f"limit for {percentile:g} %: {number(limit)} ms", linewidth=1.4)
    elif percentile and value is not None and not run.trial | (not run.finished):
        line(value, color=COLORS["limit"], linewidth=1.4, label=f"counts: {what} {number(value)} {unit}")


def percentile_curve(axes: Axes, latencies: np.ndarray, color: str, label: str | None, style: str = "-") -> None:
    """Draw latency (ms) over percentile, the tail stretched."""
    share = (np.arange(len(latencies)) + 0.5) / len(latencies)
    keep = np.unique(np.concatenate((np.linspace(0, len(share) - 1, 400).astype(int),
                                     len(share) - 1 - np.geomspace(1, len(share), 200).astype(int) + 1)))
    axes.plot(-np.log10(1 - share[keep]), np.sort(latencies)[keep], color=color, label=label, linestyle=style)
    ticks = [tick for tick in (50, 90, 99, 99.9, 99.99, 99.999) if -np.log10(1 - tick / 100) <= axes.dataLim.x1]
    axes.set_xticks([-np.log10(1 - tick / 100) for tick in ticks], [f"{tick:g} %" for tick in ticks])


def rate_curve(samples: Samples, bins: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, samples/s) over the run, in steps."""
    done = samples.start + samples.latency
    counts, edges = np.histogram(done, bins=max(1, min(bins, len(done) // 10)), range=(0, done.max()))
    return np.repeat(edges, 2)[1:-1], np.repeat(counts / np.diff(edges), 2)


def run_pictures(run: Run, samples: Samples, out: str, prefix: str) -> list[Picture]:
    """The `Picture`s of one performance run and its `samples`; `prefix` stands before their files' names."""
    start, latency = samples.queries()
    if run.scenario == "Offline":
        start, latency = samples.start, samples.latency
    latency = latency * 1e3
    unit = {"Offline": "samples", "MultiStream": "queries of 8 samples"}.get(run.scenario, "queries")
    p50, p90, p99 = np.percentile(latency, (50, 90, 99), method="higher")
    limit = counted(run)[1]
    within = f"{number(100 * (latency <= limit).mean())} % within the limit of {number(limit)} ms. " if limit else ""
    spread = f"{within}Median {number(p50)} ms, 90th percentile {number(p90)} ms, 99th {number(p99)} ms."
    pictures = []

    title = "How latencies are spread"
    made, axes = new_axes(title, "latency, ms", unit)
    axes.hist(latency, bins=50, color=SERIES[0], range=(0, max(np.percentile(latency, 99.9), (limit or 0) * 1.05)))
    mark_target(axes, run, axes.axvline)
    pictures.append(save(made, out, f"{prefix}histogram", title,
                         f"Histogram of the latency of {len(latency):,} {unit}. {spread}", spread))

    title = "Latency by percentile"
    made, axes = new_axes(title, f"share of {unit}", "latency, ms")
    percentile_curve(axes, latency, SERIES[0], None)
    mark_target(axes, run, axes.axhline)
    axes.set_ylim(bottom=0)
    pictures.append(save(made, out, f"{prefix}percentiles", title, f"Curve of latency over percentile. {spread}",
                         f"The tail is stretched: how long the slowest {unit} take."))

    if run.scenario == "Offline":
        title = "Samples answered over time"
        made, axes = new_axes(title, "seconds", "samples")
        done = np.sort(start + latency / 1e3)
        keep = np.linspace(0, len(done) - 1, min(500, len(done))).astype(int)
        axes.plot(done[keep], keep + 1, color=SERIES[0])
        text = f"All {len(done):,} samples arrive at the start; the last is answered after {number(done[-1])} s."
    else:
        title = "Latency over time"
        made, axes = new_axes(title, "seconds", "latency, ms")
        dots(axes, start, latency)
        middle_lines(axes, start, latency, 40)
        halves = [number(np.median(latency[part])) for part in np.array_split(np.arange(len(latency)), 2) if len(part)]
        text = f"Each dot is one of the {unit}. Median of the run's halves: {' and '.join(halves)} ms."
    axes.set_ylim(bottom=0)
    pictures.append(save(made, out, f"{prefix}time", title, f"{title}. {text}", text))

    title = "Throughput over time"
    made, axes = new_axes(title, "seconds", "samples/s")
    seconds, rate = rate_curve(samples)
    axes.plot(seconds, rate, color=SERIES[0])
    axes.fill_between(seconds, rate, color=SERIES[0], alpha=0.15, linewidth=0)
    target = run.log.get("effective_target_qps")
    if run.scenario in ("Offline", "Server") and target:
        axes.axhline(target, color=COLORS["limit"], linewidth=1.4, label=f"target_qps: {number(target)}")
    axes.set_ylim(bottom=0)
    text = f"Between {number(rate.min())} and {number(rate.max())} samples/s, in steps of {number(seconds[1])} s."
    pictures.append(save(made, out, f"{prefix}throughput", title, f"{title}. {text}", text))

    if run.lengths is not None:
        title = "Latency against sequence length"
        made, axes = new_axes(title, "tokens", "latency, ms")
        each = samples.latency * 1e3
        dots(axes, run.lengths, each)
        middle_lines(axes, run.lengths, each, 24)
        axes.set_ylim(bottom=0)
        short, long = (np.median(each[rows]) for rows in np.array_split(np.argsort(run.lengths, kind="stable"), 2))
        text = (f"Sequences of {run.lengths.min()} to {run.lengths.max()} tokens. Median of the shorter half "
                f"{number(short)} ms, of the longer half {number(long)} ms.")
        pictures.append(save(made, out, f"{prefix}length", title, f"{title}. {text}", text))
    return pictures


def comparing_pictures(runs: list[Run], out: str) -> list[Picture]:
    """The `Picture`s that lay the runs of one scenario over each other."""
    pictures = []
    for scenario in dict.fromkeys(run.scenario for run in runs):
        same = [(place, run, run.samples) for place, run in enumerate(runs)
                if run.scenario == scenario and run.samples and not run.accuracy]
        if len(same) < 2:
            continue
        names = ", ".join(run.name for _, run, _ in same)
        for slug, what in (("percentiles", "latency by percentile"), ("throughput", "throughput over time")):
            title = f"{scenario}: {what}"
            made, axes = new_axes(title, "share of queries" if slug == "percentiles" else "seconds",
                                  "latency, ms" if slug == "percentiles" else "samples/s")
            for place, run, samples in same:
                color, style = SERIES[place % len(SERIES)], LINES[place % len(LINES)]
                if slug == "percentiles":
                    latency = samples.latency if scenario == "Offline" else samples.queries()[1]
                    percentile_curve(axes, latency * 1e3, color, run.name, style)
                else:
                    axes.plot(*rate_curve(samples), color=color, label=run.name, linestyle=style)
            axes.set_ylim(bottom=0)
            pictures.append(save(made, out, f"compare-{scenario}-{slug}", title, f"{title} of {names}; the figures "
                                 "are in the table of the runs side by side.", f"Of {names}."))
    return pictures


def headline(run: Run) -> tuple[str, str, str]:
    """(what counts, figure, unit) of a run in words; the figure is "" where there is none."""
    if run.accuracy:
        return ("F1", f"{run.score['f1']:.3f}", "%") if run.score else ("F1", "", "")
    if not run.finished:
        return RESULTS[run.scenario][0], "", ""
    what, value, unit = figure(run.scenario, run.log)
    return what, number(value, 5) if value is not None else "", unit


def latencies(run: Run) -> dict[str, str]:
    """LoadGen's own latency figures: {name: ms}."""
    query = "_query" if run.scenario == "MultiStream" else ""
    per = "_per_query" if query else ""
    keys = {"least": f"result_min{query}_latency_ns", "mean": f"result_mean{query}_latency_ns"}
    keys |= {f"{percent:g} %": f"result_{percent:.2f}_percentile{per}_latency_ns"
             for percent in (50, 90, 95, 97, 99, 99.9)}
    keys["most"] = f"result_max{query}_latency_ns"
    return {name: f"{number(run.log[key] / 1e6)} ms" for name, key in keys.items() if key in run.log}


def settings(run: Run) -> dict[str, Any]:
    """How LoadGen ran it: {name: value in words}."""
    log = run.log
    found = {"scenario": run.scenario, "mode": log["effective_test_mode"], "started": log.get("test_datetime")}
    if not run.accuracy:
        for name, key, scale, unit in (
                ("queries", "result_query_count", 1, ""), ("samples a query", "effective_samples_per_query", 1, ""),
                ("least duration", "effective_min_duration_ms", 1e3, " s"),
                ("least queries", "effective_min_query_count", 1, ""), ("target_qps", "effective_target_qps", 1, " /s"),
                ("target latency", "effective_target_latency_ns", 1e6, " ms"),
                ("queries over the target latency", "result_overlatency_query_count", 1, "")):
            if log.get(key) or (log.get(key) == 0 and name.startswith("queries")):
                found[name] = number(log[key] / scale, 9) + unit
    found["samples in the library"] = log.get("qsl_reported_total_count")
    found["LoadGen"] = log.get("loadgen_version")
    return {name: value for name, value in found.items() if value is not None}


def system(run: Run) -> dict[str, str]:
    """What record.json says: {name: value in words}."""
    known = run.record
    found = {"backend": known.get("backend"), "dtype": known.get("dtype"),
             "tokens a batch at most": known.get("batch_tokens"), "batches at once": known.get("workers"),
             "model": known.get("model"), "model's md5": known.get("model_md5"), "data set": known.get("dataset"),
             "vocabulary": known.get("vocab"), "processor": known.get("processor"), "cores": known.get("cores"),
             "GPU": known.get("gpu"),
             "memory": f"{number(known['memory_bytes'] / 2**30)} GiB" if known.get("memory_bytes") else None,
             "system": known.get("system"), "Python": known.get("python"), **known.get("libraries", {}),
             "git revision": known.get("revision"), "command": " ".join(known.get("command", [])) or None,
             **known.get("variables", {})}
    return {name: str(value) for name, value in found.items() if value is not None}


def side_by_side(runs: list[Run], describe: Callable[[Run], dict[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Rows (name, [value of each run], whether they differ) of what `describe` gives for each run."""
    described = [describe(run) for run in runs]
    names = dict.fromkeys(name for values in described for name in values)
    rows = [(name, [str(values.get(name, "–")) for values in described]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def run_names(folders: list[str]) -> list[str]:
    """A short name for each folder: its last parts, as many as tell all apart."""
    parts = [os.path.abspath(folder).split(os.sep)[1:] for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]}: stands twice among the log folders; name each once")


def write_report(folders: list[str], out: str, data_sets: DataSets | None = None, dtype: str = "float32",
                 transposed: bool = False) -> str:
    """Write report.html and its pictures on the log folders `folders` into the folder `out`; returns the page's path.

    `data_sets` is a `DataSets`; `dtype` and `transposed` are as for `squad_eval.read_log`. Raises UserError where a
    log is missing or damaged, or `out` cannot be written.
    """
    data_sets = data_sets or DataSets()
    runs = [read_run(folder, name) for folder, name in zip(folders, run_names(folders))]
    for run in runs:
        if (run.finished if run.accuracy else run.samples) and (data := data_sets.of(run)):
            if run.accuracy:
                score_run(run, data, dtype, transposed)
            elif run.samples:
                run.lengths = data[1].lengths[run.samples.index]
    page = os.path.join(out, "report.html")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters["number"] = number
    try:
        os.makedirs(out, exist_ok=True)
        with rc_context(STYLE):
            pictures = [run_pictures(run, run.samples, out, f"{place}-" if len(runs) > 1 else "")
                        if run.samples and not run.accuracy else [] for place, run in enumerate(runs, 1)]
            comparing = comparing_pictures(runs, out)
        text = environment.get_template("report_template.html").render(
            runs=runs, pictures=pictures, comparing=comparing, headline=headline, latencies=latencies,
            settings=settings, system=system, side_by_side=side_by_side, made=record.now())
        with open(page, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{out}: cannot write the report there ({error.strerror}); name another folder with --out") \
            from None
    return page


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="LOG_FOLDER",
                        help="where LoadGen's logs are; several are compared")
    parser.add_argument("--out",
                        help=f"folder to write into (default: LOG_FOLDER, for several {config.BUILD_DIR}/report)")
    parser.add_argument("--val_data", help="the runs' SQuAD v1.1 JSON file (default: the one in record.json, else "
                                           f"{config.env('DATASET_FILE', config.DATASET)})")
    parser.add_argument("--vocab_file", help="the runs' vocab.txt (default: the one in record.json, else "
                                             f"{config.env('VOCAB_FILE', config.VOCAB)})")
    parser.add_argument("--output_dtype", default="float32", choices=DTYPES,
                        help="type of the logged responses (default: %(default)s)")
    parser.add_argument("--output_transposed", action="store_true",
                        help="a response holds all start logits, then all end logits, instead of pairs")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = args.out or (args.folders[0] if len(args.folders) == 1 else os.path.join(config.BUILD_DIR, "report"))
    print(write_report(args.folders, out, DataSets(args.val_data, args.vocab_file), args.output_dtype,
                       args.output_transposed))


if __name__ == "__main__":
    config.script(main)
