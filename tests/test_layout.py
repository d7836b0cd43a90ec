"""The layout: imports between the packages point one way, and the wheel contains every package, with and without symbolic links."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# A package may import those after it.
ORDER = ("cli", "serve", "evaluation", "training", "inference", "model", "instructions", "data", "stories", "common", "kernels")
ONLY = {  # the only packages that may import these
    "stories": {"instructions", "data", "evaluation"},
    "kernels": {"model", "inference", "training"},
}


def imported_packages(path: Path) -> set[str]:
    """The project's packages that a file imports, including its own."""
    package = ("tritale", *path.relative_to(REPOSITORY).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            found |= {f"{module}.{name.name}" for name in node.names}
    return {parts[1] for name in found if len(parts := name.split(".")) > 1 and parts[0] == "tritale"}


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_down_the_list(package):
    files = list((REPOSITORY / package).rglob("*.py"))
    assert files
    for path in files:
        for other in imported_packages(path) - {package}:
            where = f"{path.relative_to(REPOSITORY)} imports {other}"
            assert other in ORDER[ORDER.index(package) + 1 :], where
            assert package in ONLY.get(other, {package}), where
            assert package != "common", where


def copy_of_the_tree(folder: Path, has_links: bool) -> Path:
    """A copy of what is installed. Without links, each one is a text file with its target, as in git's checkout on Windows."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "train.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    for name in (*ORDER, "configs", "tritale"):
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for link in [path for path in (folder / "tritale").iterdir() if path.is_symlink() and not has_links]:
        target = os.readlink(link)
        link.unlink()
        link.write_text(target, encoding="utf-8")
    return folder


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of_wheel(source: Path, target: Path) -> set[str]:
    """The files of the wheel that pip builds, without its metadata."""
    run("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", target, cwd=source)
    (wheel,) = target.glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.mark.parametrize("kind", ["links", "no links", "sdist"])
def test_wheel_contains_every_file_of_every_package(kind, tmp_path):
    source = copy_of_the_tree(tmp_path / "tree", has_links=kind != "no links")
    expected = {"tritale/__init__.py", "tritale/__main__.py", "tritale/train.py"}
    for name in (*ORDER, "configs"):
        files = [path for path in (source / name).rglob("*") if path.is_file()]
        assert files
        expected |= {f"tritale/{path.relative_to(source).as_posix()}" for path in files}
    if kind == "sdist":
        run("setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=source)
        (archive,) = tmp_path.glob("*.tar.gz")
        shutil.unpack_archive(archive, tmp_path / "sdist")
        (source,) = (tmp_path / "sdist").iterdir()
    assert files_of_wheel(source, tmp_path / "wheel") == expected


def test_checkout_without_links_is_importable(tmp_path):
    source = copy_of_the_tree(tmp_path / "tree", has_links=False)
    code = "import tritale.kernels, tritale.data.prepare; print(tritale.kernels.__file__, tritale.data.prepare.__file__)"
    found = run("-c", code, cwd=source).split()
    assert found == [str(source / "kernels/__init__.py"), str(source / "data/prepare/__init__.py")]


def test_every_package_has_a_link():
    assert {path.name for path in (REPOSITORY / "tritale").iterdir()} - {"__init__.py", "__main__.py", "__pycache__"} == {*ORDER, "configs"}
    for name in (*ORDER, "configs"):
        link = REPOSITORY / "tritale" / name
        assert link.is_file() or link.resolve() == REPOSITORY / name  # a file in a checkout without links
