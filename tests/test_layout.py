"""Imports between the packages point one way only."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ORDER = ("cli", "serve", "evaluation", "training", "inference", "model", "data", "stories", "common", "kernels")  # a package imports later ones
ONLY = {"stories": {"data", "evaluation"}, "kernels": {"model", "inference", "training"}}  # the only packages that may import these


def imported_packages(path: Path) -> set[str]:
    """The project's packages that a file of a package imports, its own included."""
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


def test_every_package_is_linked_and_installed():
    namespace: dict = {}
    source = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    exec(source[: source.index("setup(\n")].replace("from setuptools import find_packages, setup", ""), namespace)
    assert set(namespace["FOLDERS"]) == {*ORDER, "configs"}
    for name in namespace["FOLDERS"]:
        assert (REPOSITORY / "tritale" / name).resolve() == REPOSITORY / name
