"""Maps the top-level folders to subpackages of `tritale`, and train.py to a module of it. Everything else is in pyproject.toml.

setuptools finds the packages inside each folder, so that a new one cannot be forgotten in the wheel.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = (
    "kernels", "common", "stories", "data", "instructions", "model", "inference", "training", "evaluation", "serve", "cli", "configs",
)  # fmt: skip


class BuildWithTrainer(build_py):
    """Adds train.py, for `tritale train`."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [*modules, (package, "train", "train.py")] if package == "tritale" else modules


setup(
    packages=["tritale", *(f"tritale.{name}" for top in FOLDERS for name in (top, *(f"{top}.{sub}" for sub in find_packages(top))))],
    package_dir={f"tritale.{name}": name for name in FOLDERS},
    package_data={"": ["*.c", "*.html", "*.yaml"]},
    cmdclass={"build_py": BuildWithTrainer},
)
