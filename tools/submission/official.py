"""Run MLPerf's own submission checker, from a checkout of github.com/mlcommons/inference, on a tree of results."""

import os
import re
import subprocess
import sys
import tempfile

from config import UserError, last_line, log_progress, printable

FOLDER = "tools/submission"  # in the checkout
# The checker's module and its file there: a package, before v6.0 one file.
MODULES = {"submission_checker.main": "submission_checker/main.py", "submission_checker": "submission_checker.py"}
PACKAGES = {"yaml": "pyyaml"}  # what pip calls a module, if by another name


def checker_module(checkout: str) -> str:
    """Return the name of the checker's module in the folder `checkout`. Raises UserError if it has none."""
    for name, file in MODULES.items():
        if os.path.isfile(os.path.join(checkout, FOLDER, file)):
            return name
    remedy = "give a checkout of github.com/mlcommons/inference"
    raise UserError(printable(f"{checkout}: no {FOLDER}/submission_checker in it; {remedy}"))


def run_official(checkout: str, tree: str, version: str) -> bool:
    """Run the checker of the folder `checkout` on `tree`, print what it says, and return whether it accepts the tree.

    Raises UserError if the folder has no checker, a package is missing, or the checker does not know `version`.
    """
    module, folder = checker_module(checkout), os.path.join(os.path.abspath(checkout), FOLDER)
    log_progress(printable(f"{tree}: running the checker of {checkout}, version {version}"))
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as scratch:  # for the summary.csv that it writes
        arguments = ["--input", os.path.abspath(tree), "--version", version, "--csv", f"{scratch}/summary.csv"]
        result = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=scratch,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    lines = [printable(line) for line in result.stdout.decode(errors="replace").splitlines()]
    print(*lines, sep="\n", flush=True)
    status = result.returncode
    said = last_line("\n".join(lines)) if lines else "nothing"
    if missing := re.search(r"^ModuleNotFoundError: No module named '(\w+)", said):
        package = PACKAGES.get(missing[1], missing[1])
        remedy = f"`{sys.executable} -m pip install {package}` installs it"
        raise UserError(printable(f"{checkout}: MLPerf's checker needs the package {package}; {remedy}"))
    if status not in (0, 1):  # argparse's 2: not a version that it knows
        remedy = f"give a checkout that knows {version}"
        raise UserError(printable(f"{checkout}: MLPerf's checker ended with status {status}: {said}; {remedy}"))
    verdict = "accepts it" if status == 0 else "does not accept it"
    print(printable(f"{tree}: MLPerf's checker ({checkout}) {verdict}: {said}"), flush=True)
    return status == 0
