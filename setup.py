"""Maps the top-level folders to subpackages of `tritale`; everything else is in pyproject.toml.

setuptools finds the packages inside each folder, so that a new one cannot be forgotten in the wheel.
"""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "common", "stories", "data", "model", "inference", "training", "evaluation", "serve", "cli", "configs")

setup(
    packages=["tritale", *(f"tritale.{name}" for top in FOLDERS for name in (top, *(f"{top}.{sub}" for sub in find_packages(top))))],
    package_dir={f"tritale.{name}": name for name in FOLDERS},
    package_data={"": ["*.c", "*.html", "*.yaml"]},
)
