"""What the tests of the report share: the content of its page, and log folders that a test writes itself."""

import json
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """A report's page: .text, .tags [(name, attributes)], .tables {caption: [[cell]]}, .badges."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.tables, self.badges, self.cell, self.skip = "", [], {}, [], None, 0
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.skip += tag in ("style", "svg")
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th", "caption") or "badge" in attributes.get("class", ""):
            self.cell = ""

    def handle_endtag(self, tag):
        self.text += " "
        self.skip -= tag in ("style", "svg")
        if tag == "caption":
            self.tables[self.cell.strip()] = self.rows
        elif tag in ("td", "th"):
            self.rows[-1].append(" ".join(self.cell.split()))
        elif tag == "span" and self.cell is not None:
            self.badges.append(self.cell)
        else:
            return
        self.cell = None

    def handle_data(self, data):
        if not self.skip:
            self.text += data
        if self.cell is not None:
            self.cell += data

    def table(self, words):
        return next(rows for caption, rows in self.tables.items() if words in caption)

    @property
    def charts(self):
        """The texts that describe the charts to a screen reader."""
        return [attributes["aria-label"] for _, attributes in self.tags if attributes.get("role") == "img"]


RESULTS = {
    "Offline": {"result_samples_per_second": 50.5},
    "Server": {"result_completed_samples_per_sec": 50.5, "effective_target_latency_ns": 130_000_000},
    "SingleStream": {"result_90.00_percentile_latency_ns": 20_000_000},
    "MultiStream": {"result_99.00_percentile_per_query_latency_ns": 160_000_000},
}
RECORD = {
    "backend": "PyTorch 2, cpu, fp32",
    "model": "model.safetensors",
    "processor": "Intel(R) Xeon(R) Platinum 8480+",
    "cores": 8,
    "memory_bytes": 2**34,
    "command": ["run.py", "--backend=pytorch"],
    "libraries": {"numpy": "2"},
}
SAMPLE = '"ts":{},"args":{{"sample_seq":{},"query_seq":{},"sample_idx":{},"issue_start_ns":0,"complete_ns":{}}}'


def sample(start, query, index, latency, **_):
    """Return a sample of LoadGen's trace: scheduled time in us, query, index in the data set, latency in ns."""
    event = SAMPLE.format(start, query, query, index, latency)
    return f'{{"name":"Sample","cat":"default","ph":"b","pid":1,"id":{query},{event}}},\n'


def write_run(folder, scenario="Server", log=(), record=RECORD, samples=None):
    """Write the logs of a valid performance run as LoadGen does, and return the folder.

    `log` are values of the detail log beside or instead of the usual ones, `samples` lines of the trace (default: 30;
    no trace if empty).
    """
    folder.mkdir(parents=True, exist_ok=True)
    usual = {
        "effective_scenario": scenario,
        "effective_test_mode": "PerformanceOnly",
        "effective_samples_per_query": 30 if scenario == "Offline" else 1,
        "effective_min_duration_ms": 600_000,
        "qsl_reported_total_count": 334,
        "result_validity": "VALID",
        "result_query_count": 1 if scenario == "Offline" else 30,
        "result_mean_latency_ns": 20_000_000,
    }
    values = {**usual, **RESULTS[scenario], **dict(log)}
    lines = (json.dumps({"key": key, "value": value, "metadata": {}}) for key, value in values.items())
    (folder / "mlperf_log_detail.txt").write_text("".join(f":::MLLOG {line}\n" for line in lines))
    if record is not None:
        (folder / "record.json").write_text(json.dumps(record))
    if samples is None:
        samples = [sample(1e5 * place, place, place % 7, 20_000_000 + 1000 * place) for place in range(30)]
    if samples:
        (folder / "mlperf_log_trace.json").write_text('{"traceEvents":[\n' + "".join(samples) + "]}\n")
    return folder
