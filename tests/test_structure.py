"""The structure that the project promises: short files, one direction of imports, no private names, plain English."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT

SCRIPTS = sorted(
    path
    for pattern in ("*.py", "convert/*.py", "models/*.py", "tools/**/*.py", "demo/*.py", "tests/*.py")
    for path in ROOT.glob(pattern)
)
# Phrases that stop a reader; CONTRIBUTING.md says how the project writes.
PHRASES = re.compile(
    r"where (it|there) (cannot|is none|is no|has no|can be)|stands? twice|the plain way|goes? on\b|gives? way|yardstick"
    r"|is its (duty|business|own business)|without a word|deaf to|took turns|bare product"
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Return [(module, name or None)] of all imports in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module, alias.name) for alias in node.names]
    return found


def test_the_root_is_small_and_no_file_is_long():
    assert len(list(ROOT.glob("*.py"))) <= 22
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SCRIPTS}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert lines["run.py"] <= 250
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_imports_go_in_one_direction():
    modules = {module_name(path): path for path in SCRIPTS if "tests" not in path.parts}
    graph = {}
    for name, path in modules.items():
        targets = {module for module, _ in imports(path)} | {f"{module}.{item}" for module, item in imports(path)}
        graph[name] = targets & modules.keys() - {name}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)  # raises CycleError


@pytest.mark.parametrize("path", SCRIPTS, ids=module_name)
def test_no_module_imports_a_private_name_of_another(path):
    ours = {module_name(other) for other in SCRIPTS}
    private = [name for module, name in imports(path) if module in ours and re.match("_[^_]", name or "")]
    assert private == []


def test_the_texts_are_plain_english():
    texts = [path for path in SCRIPTS if path.name != "test_structure.py"]
    texts += [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile", ROOT / "Dockerfile", ROOT / "user.conf"]
    texts += ROOT.glob("tools/**/*.html")
    found = []
    for path in texts:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := PHRASES.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []
