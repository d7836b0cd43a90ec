"""Each example runs from start to end and prints what it promises."""

import os
import re
import subprocess
import sys

import pytest
from runs import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def output_of(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_alone():
    found = re.fullmatch(r"loss (\d+\.\d+), gradient norms( \d+\.\d+){5}\n", output_of("kernels_alone.py"))
    assert found and 5 < float(found[1]) < 9


def test_patch_hugging_face():
    pytest.importorskip("transformers")
    text = output_of("patch_hugging_face.py")
    found = re.fullmatch(r"loss of transformers (\d+\.\d+), with the kernels (\d+\.\d+)\n", text)
    assert found and float(found[1]) == pytest.approx(float(found[2]), abs=1e-3)


def test_own_text(tmp_path):
    pytest.importorskip("fastokens")  # of the extra `data`
    story = output_of("own_text.py", str(tmp_path)).strip().splitlines()[-1]
    assert "好朋友" in story
    assert (tmp_path / "run/step-00000060/model.safetensors").is_file()


def test_every_example_is_tested():
    assert all(f"test_{path.stem}" in globals() for path in EXAMPLES.glob("*.py"))
