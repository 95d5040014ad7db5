"""Other platforms: what exists only on Linux or on x86-64 is hidden, and the demo gives the same score.

This shows that no import and no system call lacks a fallback; it does not show that the packages work on a Mac.
"""

import json
import subprocess
import sys

import pytest
from helpers import DEMO_SCORE, LIMIT_S, ROOT, command_of

# fcntl is hidden since a file system or a platform may have no locks; macOS has no affinity, no /proc and no lscpu.
HIDE = """
import builtins, os, platform, sys
sys.modules["fcntl"] = None
for name in ("sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
def hide(open_file):
    def opened(path, *args, **kwargs):
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return open_file(path, *args, **kwargs)
    return opened
builtins.open, os.open = hide(builtins.open), hide(os.open)
platform.machine = lambda: "arm64"
os.environ["PATH"] = "/nowhere"
"""
HIDE_ONEDNN = """
try:
    import torch
    torch.backends.mkldnn.is_available = lambda: False
except ModuleNotFoundError:
    pass
"""
RUN = """
import runpy
sys.argv[0] = {script!r}
sys.path.insert(0, {root!r})
runpy.run_path({script!r}, run_name="__main__")
"""
IMPORT = """
import importlib, pathlib
sys.path.insert(0, {root!r})
root = pathlib.Path({root!r})
patterns = ("*.py", "convert/*.py", "models/*.py", "tools/**/*.py")
for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
    if path.name not in ("accuracy-squad.py", "__main__.py"):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        importlib.import_module(name)
"""


def run_hidden(code, tmp_path, *args, **variables):
    """Run Python code in a process from which the features of Linux on x86-64 are hidden."""
    env = command_of("run.py", **variables)[1]
    command = [sys.executable, "-c", HIDE + code, *args]
    result = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, model, before",
    [("onnxruntime", ROOT / "demo/model/model.onnx", ""), ("pytorch", ROOT / "demo/model", HIDE_ONEDNN + IMPORT)],
)
def test_the_demo_runs_without_what_only_linux_on_x86_has(tmp_path, backend, model, before):
    """The run on PyTorch imports all modules first."""
    (tmp_path / "user.conf").write_text("")
    code = (before + RUN).format(script=str(ROOT / "run.py"), root=str(ROOT))
    args = (f"--backend={backend}", "--accuracy")
    result = run_hidden(code, tmp_path, *args, ML_MODEL_FILE_WITH_PATH=model)
    assert json.loads(result.stdout.splitlines()[-1]) == DEMO_SCORE
    assert "this platform has no locks" in result.stderr
