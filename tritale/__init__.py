"""tritale: train small language models from scratch, with fused Triton kernels.

The packages lie at the top of the repository; this folder links to them, so that `import tritale` works in a checkout that is not
installed, and editors and type checkers find them.
"""

from pathlib import Path

__version__ = "0.2.0"

if not (Path(__file__).parent / "kernels").is_dir():  # a checkout without symbolic links (Windows' default), not installed
    __path__.append(str(Path(__file__).parents[1]))

from .common import environment as environment  # sets the environment, so it must come before torch
