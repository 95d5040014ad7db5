"""What the tests share: where things are, and how to run one of the project's scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DEMO_ENV = {
    "ML_MODEL_FILE_WITH_PATH": str(ROOT / "demo/model"),
    "VOCAB_FILE": str(ROOT / "demo/model/vocab.txt"),
    "DATASET_FILE": str(ROOT / "demo/dev.json"),
}
# Every backend answers in a test within seconds; a run that hangs fails here instead of stopping the suite.
LIMIT_S = 120

sys.path.insert(0, str(ROOT))


@pytest.fixture
def script(tmp_path):
    """Runs a script of the project in an empty folder, on the demo's model and data: script("run.py", …, NAME=value).

    Returns the CompletedProcess with its text output. A variable given as None is unset.
    """
    def call(name, *args, **variables):
        env = {**os.environ, **DEMO_ENV, **variables}
        env = {key: str(value) for key, value in env.items() if value is not None}
        return subprocess.run([sys.executable, ROOT / name, *map(str, args)], cwd=tmp_path, env=env, timeout=LIMIT_S,
                              capture_output=True, text=True, check=False)
    call.root, call.demo_dataset, call.demo_vocab = ROOT, DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"]
    return call


@pytest.fixture
def shared():
    """The folder with SQuAD's validation set and a real small BERT, where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} (SQuAD's validation set, a BERT trained on SQuAD) is absent")
    return SHARED


def fails(result, *words):
    """Assert that a script ended as a user's mistake should: status not 0, one line that holds `words`, no traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"
