"""Builds the null GPU (nullgpu.cpp) and makes the environment in which a process uses it.

    python -m tests.nullgpu.build train.py --model.preset tiny     # any script or module (-m …) of this checkout, on the null GPU

Needs PyTorch's CUDA build, whose packages contain the headers: docs/gpu.md.
"""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("nullgpu.cpp")
REPOSITORY = SOURCE.parents[2]
HOW = "python3 -m venv .venv-cuda && .venv-cuda/bin/pip install -e '.[dev]' 'torch===2.13.0'"  # ===: PyPI's build, not one with +cpu
# libcu++'s header, which is in no package of PyTorch's; the declarations that nullgpu.cpp uses need these macros only.
NV_TARGET = "#define NV_IF_TARGET(...)\n#define NV_IF_ELSE_TARGET(...)\n#define NV_PROVIDES_SM_53 0\n#define NV_IS_DEVICE 0\n"


def missing() -> str | None:
    """Why the null GPU cannot be built, with the remedy, or None."""
    if torch.version.cuda is None:
        return f"the null GPU needs PyTorch's CUDA build, and this is {torch.__version__}: {HOW}, and run pytest from there (docs/gpu.md)"
    return None


@functools.cache
def library() -> Path:
    """The folder with the compiled library, built if the source or PyTorch has changed."""
    packages = Path(torch.__file__).parents[1]
    version = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    folder = REPOSITORY / "out" / "nullgpu" / version
    target = folder / "libcuda.so.1"
    if not target.exists():
        (folder / "include" / "nv").mkdir(parents=True, exist_ok=True)
        (folder / "include" / "nv" / "target").write_text(NV_TARGET, encoding="utf-8")
        partial = folder / f"{os.getpid()}.so"
        includes = (packages / "nvidia" / "cu13" / "include", packages / "triton" / "backends" / "nvidia" / "include", folder / "include")
        flags = [
            "-std=c++17",
            "-O2",
            "-shared",
            "-fPIC",
            "-Wl,-soname,libcuda.so.1",
            *(f"-I{path}" for path in includes),
            "-ldl",
            "-lpthread",
        ]
        subprocess.run(["g++", str(SOURCE), "-o", str(partial), *flags], check=True)
        partial.rename(target)  # other workers of pytest may build at the same time
    return folder


def environment(**card: object) -> dict[str, str]:
    """The environment of a process on the null GPU; `card`: CC=80, DEVICES=2, … (nullgpu.cpp)."""
    folder = library()
    caches = folder.parent / "cache"
    added = {
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "LD_LIBRARY_PATH": os.pathsep.join((str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")]))),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / f"inductor-{card.get('CC', 90)}"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests"))),
        **{f"NULLGPU_{name}": str(value) for name, value in card.items()},
    }
    hidden = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")  # tests/conftest.py may have set them
    return {name: value for name, value in os.environ.items() if name not in hidden} | added


def run(*arguments: object, check: bool = True, **card: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on the null GPU, in the repository. Asserts success if `check`."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment(**card), cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 or not check, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    os.chdir(REPOSITORY)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
