"""What is shipped: wheel, sdist, entry points, and an import that needs no compiled extension."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lowering", "cuda_runtime", "benchmarks")
SHIPPED = (".py", ".typed", ".json", ".cuh", ".cu", ".h")


def sources() -> set[str]:
    """Files that belong into a wheel, by their path inside it."""
    found = set()
    for top in ("dak_inductor", *FOLDERS):
        for folder, folders, files in os.walk(ROOT / top):  # does not follow the links
            folders[:] = [name for name in folders if name not in ("__pycache__", "results", "src")]
            place = Path(folder).relative_to(ROOT)
            place = place if top == "dak_inductor" else Path("dak_inductor") / place
            found |= {str(place / name) for name in files if name.endswith(SHIPPED)}
    return found


@pytest.fixture(scope="module")
def in_root() -> Iterator[None]:
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory, in_root: None) -> Path:
    build = pytest.importorskip("scikit_build_core.build", reason="needs scikit-build-core")
    folder = tmp_path_factory.mktemp("sdist")
    return folder / build.build_sdist(str(folder))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, in_root: None) -> Path:
    """A wheel without the extension, which takes no compiler."""
    build = pytest.importorskip("scikit_build_core.build", reason="needs scikit-build-core")
    folder = tmp_path_factory.mktemp("wheel")
    return folder / build.build_wheel(str(folder), {"wheel.cmake": "false"})


def in_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return [member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()]


def test_sources_are_found() -> None:
    found = sources()
    assert "dak_inductor/errors.py" in found
    assert "dak_inductor/lowering/__init__.py" in found
    assert any(name.startswith("dak_inductor/profiles/") for name in found)
    assert any(name.endswith(".cuh") for name in found)


def test_wheel_has_each_source_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name, count in Counter(names).items() if count > 1] == []
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert inside == sources()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_has_each_source_once(sdist: Path) -> None:
    names = in_sdist(sdist)
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert sources() <= set(names)
    assert not [name for name in names if name.split("/")[0] in FOLDERS]
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"} <= set(names)
    assert any(name.endswith(".cpp") for name in names)
    assert not [
        name for name in names if name.endswith((".so", ".pyc")) or name.startswith("build/")
    ]


def test_sdist_builds_the_extension(sdist: Path, tmp_path: Path) -> None:
    """The layout of the sdist is not that of the repository: what would be compiled."""
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
    cmake = pytest.importorskip("cmake", reason="needs cmake")
    ninja = pytest.importorskip("ninja", reason="needs ninja")
    with tarfile.open(sdist) as archive:
        # early patch releases of Python 3.11 know no filters; the archive is our own
        archive.extractall(
            tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    (source,) = tmp_path.glob("dak_inductor-*")
    build = tmp_path / "build"
    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-S", source, "-B", build, "-G", "Ninja"]
    command += [
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(command, check=True, capture_output=True)
    listing = [Path(ninja.BIN_DIR) / "ninja", "-C", build, "-t", "commands"]
    planned = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    units = sorted(path.name for path in (ROOT / "cuda_runtime" / "src").glob("*.cpp"))
    assert units
    assert [unit for unit in units if f"/{unit}.o" not in planned] == []


def test_entry_points_are_registered() -> None:
    (backend,) = [
        point
        for point in importlib.metadata.entry_points(group="torch_dynamo_backends")
        if point.name == "dak"
    ]
    assert backend.value == "dak_inductor.backend:dak"
    assert callable(backend.load())
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="dak")
    assert callable(script.load())


def test_version_has_one_source() -> None:
    import dak_inductor

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert dak_inductor.__version__ == importlib.metadata.version("dak-inductor") == declared
    assert f"## {declared}" in (ROOT / "CHANGELOG.md").read_text()


NO_EXTENSION = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[-1] == "_driver":
            raise ImportError("no extension in this test")

sys.meta_path.insert(0, Refuse())
"""


def run_without_extension(code: str, folder: Path) -> str:
    command = [sys.executable, "-c", NO_EXTENSION + code]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_import_needs_no_extension(tmp_path: Path) -> None:
    code = (
        "import dak_inductor, dak_inductor.cuda_runtime, dak_inductor.lowering\n"
        "print([name for name in sys.modules if name.endswith('_driver')], dak_inductor.__file__)\n"
    )
    assert run_without_extension(code, tmp_path).startswith("[] ")


def test_submodules_do_not_hide_functions_of_their_name(tmp_path: Path) -> None:
    """`dak_inductor.offload` is a module and a function; users must get the function."""
    code = (
        "import importlib, dak_inductor\n"
        "for name in ('loading', 'offload', 'restore', 'explain', 'stats'):\n"
        "    importlib.import_module(f'dak_inductor.{name}')\n"
        "hidden = [name for name in dak_inductor.__all__\n"
        "          if name != 'errors' and not callable(getattr(dak_inductor, name))]\n"
        "print(hidden)\n"
    )
    assert run_without_extension(code, tmp_path).strip() == "[]"


def test_tiers_say_that_the_extension_is_missing(tmp_path: Path) -> None:
    code = (
        "from dak_inductor.cuda_runtime.tiers import open_tier\n"
        "from dak_inductor.errors import DakError\n"
        "try:\n"
        "    open_tier('cpu')\n"
        "except DakError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    assert "Error" in run_without_extension(code, tmp_path)


def test_source_folders_are_not_packages_of_their_own(tmp_path: Path) -> None:
    """`import lowering` from the root must not register the operators a second time."""
    code = "import lowering"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "dak_inductor.lowering" in ended.stderr


def test_hooks_run_what_the_checks_run() -> None:
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lines = (ROOT / "tests" / "check.sh").read_text().splitlines()
    assert [hook["entry"] for hook in hooks] == [
        line for line in lines if line.startswith(("ruff", "mypy"))
    ]
