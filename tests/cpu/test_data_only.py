"""Plans, profiles, caches and checkpoints are data: nothing that is read can become code."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from dak_inductor.private_files import private_folder, publish

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("dak_inductor", "lowering", "cuda_runtime")
    for path in (ROOT / folder).rglob("*.py")
    if not (path.is_symlink() or any(part.is_symlink() for part in path.parents))
)
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    ("torch", "load"), ("np", "load"), ("numpy", "load"), ("os", "system"), ("os", "popen"),
    ("sympy", "sympify"), ("sympy", "parse_expr"),
}  # fmt: skip


def _calls(tree: ast.AST) -> list[str]:
    """What the source does that could run what it reads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in BUILTINS else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            pair = (owner.id if isinstance(owner, ast.Name) else "", node.func.attr)
            found += [".".join(pair)] if pair in METHODS else []
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            found.append("shell=")
    return [name for name in found if name]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path: Path) -> None:
    assert _calls(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "eval(x)", "torch.load(p)", "run(c, shell=True)"],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert _calls(ast.parse(source))
    assert len(SOURCES) > 150


def test_files_of_the_cache_are_the_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = private_folder(tmp_path / "cache" / "cubins")
        assert folder is not None and publish(folder / "entry", b"content")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "entry").stat().st_mode & 0o777 == 0o600
