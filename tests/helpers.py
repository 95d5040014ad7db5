"""What the tests share: paths, commands, small models and batches, fake backends, and how a command ends."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from backends import Backend, RunOptions
from config import UserError
from squad_QSL import Batch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DEMO_ENV = {
    "ML_MODEL_FILE_WITH_PATH": str(ROOT / "demo/model"),
    "VOCAB_FILE": str(ROOT / "demo/model/vocab.txt"),
    "DATASET_FILE": str(ROOT / "demo/dev.json"),
}
# Commands compute in one thread, because ONNX Runtime's threads spin, and the tests' other processes need the cores:
# SingleStream on the demo's data took 5.4 s of processor time with two, and 3.0 s with one.
ONE_THREAD = {"MLC_MAX_NUM_THREADS": "1"}
DEMO_SCORE = {"exact_match": 86.82634730538922, "f1": 90.56021988656722}  # in fp32
DEMO_ONNX = str(ROOT / "demo/model/model.onnx")
# Every backend answers in a test within seconds, on a busy machine in a minute; a command that hangs fails here.
LIMIT_S = 300
# What the submission's example plan leaves open, and the demo's files.
PLAN_VALUES = {
    "submitter": "Someone",
    "system_name": "demo-machine",
    "model": DEMO_ENV["ML_MODEL_FILE_WITH_PATH"],
    "dataset": DEMO_ENV["DATASET_FILE"],
    "vocab": DEMO_ENV["VOCAB_FILE"],
    "host_memory_configuration": "N/A",
    "host_storage_type": "SSD",
    "host_networking": "Ethernet",
    "host_networking_topology": "N/A",
    "cooling": "air",
}
# How far logits of a form of the fixture `tiny` may be from its own, which are up to 2.5.
EXACT, FP16, INT8 = 1e-4, 0.02, 0.5
# LoadGen settings of short runs.
SHORT_RUNS = """
*.*.min_duration = 300
*.*.max_duration = 20000
*.*.min_query_count = 20
*.Offline.target_qps = 100
*.Server.target_qps = 200
*.Server.target_latency = 500
*.SingleStream.target_latency = 5
*.MultiStream.target_latency = 20
"""


def command_of(name, *args, **variables):
    """Return (command, environment) of a script ("run.py") or module ("tools.report") of the project.

    It runs on the demo's files, in one thread. `variables` are environment variables; one given as None is unset.
    """
    model = (
        {"ML_MODEL_FILE_WITH_PATH": DEMO_ONNX}
        if {"--backend=onnxruntime", "--backend=ray:onnxruntime"} & {*args}
        else {}
    )
    env = {**os.environ, **DEMO_ENV, **ONE_THREAD, **model, **variables}
    script = [ROOT / name]
    if not str(name).endswith(".py"):
        script = ["-m", name]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(env.get("PYTHONPATH") or "")]))
    env = {key: str(value) for key, value in env.items() if value is not None}
    return list(map(str, [sys.executable, *script, *args])), env


class Lazy:
    """Stand for a module that is imported at its first use; skip the test module if its package is absent.

    Every process of pytest collects all tests. With this, only the one that runs TensorFlow's imports it, for 5 s.
    """

    def __init__(self, name, package="tensorflow"):
        import pytest  # not at the top: it takes a third of the time of a process with a fake backend

        if not importlib.util.find_spec(package):
            pytest.skip(f"the package {package} is absent", allow_module_level=True)
        self.__name__ = name

    def __getattr__(self, name):
        if name.startswith("_"):  # pytest asks for such names
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def main_of(name):
    """Return the `main` of a script ("run.py") or module ("tools.report") of the project."""
    if not name.endswith(".py"):
        return importlib.import_module(f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name).main
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py").replace("-", "_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run_script(name, *args, cwd, **variables):
    """Run a command of the project in the folder `cwd`; see `command_of`. Returns the CompletedProcess with text."""
    command, env = command_of(name, *args, **variables)
    return subprocess.run(command, cwd=cwd, env=env, timeout=LIMIT_S, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def running(name, *args, cwd, wait="running", **variables):
    """Start a command of the project and yield its process when its standard error has a line with `wait`."""
    command, env = command_of(name, *args, **variables)
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert any(wait in line for line in process.stderr)
        yield process
    finally:
        process.kill()
        process.communicate()


def random_bert(folder, **changes):
    """Write a BERT of random weights as a Hugging Face folder.

    `changes` are values of its configuration. Returns (configuration, {name: array}).
    """
    from safetensors.numpy import save_file

    from models.model_files import weight_shapes

    bert_config = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "vocab_size": 60,
        "max_position_embeddings": 384,
        "type_vocab_size": 2,
        **changes,
    }
    generator = np.random.default_rng(0)
    weights = {
        name: generator.normal(name.endswith("LayerNorm.weight"), 0.1, shape).astype(np.float32)
        for name, shape in weight_shapes(bert_config).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(bert_config))
    save_file(weights, folder / "model.safetensors")
    return bert_config, weights


def random_batch(*lengths, vocab_size=60):
    """Return a `Batch` of samples of random tokens."""
    generator = np.random.default_rng(sum(lengths))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    ids, segments = (generator.integers(below, size=mask.shape, dtype=np.int32) * mask for below in (vocab_size, 2))
    return Batch(ids, mask, segments, np.array(lengths, np.int32))


def samples(batch):
    """Return the samples of a `Batch`, each as a separate batch without padding."""
    arrays = (batch.input_ids, batch.input_mask, batch.segment_ids)
    return [
        Batch(*(array[row : row + 1, :length] for array in arrays), batch.lengths[row : row + 1])
        for row, length in enumerate(batch.lengths)
    ]


def predict(backend, batch):
    """Return the logits of `batch`, computed in batches that the backend takes."""
    parts = [batch] if backend.batch_policy == "mixed" else samples(batch)
    return np.concatenate([backend.predict(part) for part in parts])


class NullBackend(Backend):
    """Answer every sample with zeros at once."""

    name = "null"

    def __init__(self, options=None, concurrency=1):
        self.options, self.concurrency = options or RunOptions(), concurrency

    def predict(self, batch):
        return np.zeros((batch.lengths.sum(), 2), np.float32)


BACKEND_SCRIPT = """\
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
import backends, config, run
from helpers import NullBackend

class Fake(NullBackend):
    calls = 0

    def __init__(self, options):
        super().__init__(options, {concurrency})

    def predict(self, batch):
        self.calls += 1
        if self.calls > 3:
            {body}
        return super().predict(batch)

backends.BACKENDS["pytorch"] = backends.Entry("__main__", "Fake", ("fp32",))
{setup}
config.run_command(run.main)
"""


def backend_script(folder, body="pass", concurrency=2, setup=""):
    """Write a script that is run.py with a fake backend as --backend=pytorch, and return its path.

    From the fourth call on (after the warm-up) the backend's `predict(self, batch)` executes the statements `body`
    before it returns zeros. `setup` are statements that are executed before run.py's main; the class is `Fake`.
    """
    path = folder / "run.py"
    body = textwrap.indent(textwrap.dedent(body), 12 * " ").strip()
    root, tests = str(ROOT), str(ROOT / "tests")
    path.write_text(BACKEND_SCRIPT.format(root=root, tests=tests, concurrency=concurrency, body=body, setup=setup))
    return path


def run_loadgen(settings, log_settings, audit_conf, samples=20):
    """Run LoadGen's test with a system that answers at once; the arguments are what `loadgen_settings` returns."""
    import mlperf_loadgen as lg

    def issue(queries):
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, 0, 0) for query in queries])

    system = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(samples, samples, lambda indices: None, lambda indices: None)
    settings.performance_sample_count_override = samples
    lg.StartTestWithLogSettings(system, library, settings, log_settings, audit_conf)
    lg.DestroyQSL(library)
    lg.DestroySUT(system)


@contextlib.contextmanager
def refused(*words):
    """Assert that the block raises a UserError of one line that holds `words`; yield pytest's ExceptionInfo of it."""
    import pytest

    with pytest.raises(UserError) as error:
        yield error
    for word in (*words, ""):
        assert word in str(error.value) and "\n" not in str(error.value), f"{word!r} is not in {str(error.value)!r}"


def fails(result, *words):
    """Assert that a command ended as a user's mistake should: status not 0, one line with `words`, no traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"
