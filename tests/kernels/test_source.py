"""What the interpreter hides, read from the syntax trees: masked loads state `other`, products their precision, nothing is atomic."""

import ast
from pathlib import Path

import pytest

import tritale.kernels

FILES = sorted(Path(tritale.kernels.__path__[0]).glob("*.py"))


def calls(tree: ast.AST):
    """(name, call) of each tl.name(…) in the kernels."""
    for function in ast.walk(tree):
        decorators = [ast.unparse(d).split("(")[0] for d in getattr(function, "decorator_list", ())]
        if isinstance(function, ast.FunctionDef) and {"jit", "triton.jit"} & {*decorators}:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("tl."):
                    yield ast.unparse(node.func)[3:], node


def problems(source: str) -> list[str]:
    found = []
    for name, call in calls(ast.parse(source)):
        given = {k.arg for k in call.keywords}
        if name == "load" and ("mask" in given or len(call.args) > 1) and "other" not in given and len(call.args) < 3:
            found.append(f"line {call.lineno}: a masked tl.load without other= returns anything on a GPU")
        if name == "dot" and "input_precision" not in given:
            found.append(f"line {call.lineno}: tl.dot without input_precision= rounds fp32 to TF32 on a GPU")
        if name.startswith("atomic"):
            found.append(f"line {call.lineno}: an atomic makes results depend on timing")
    return found


def launches_on_another_device(source: str) -> list[str]:
    """Launches, `_kernel[grid](…)`, outside `with torch.cuda.device_of(…)`: Triton launches on the current device, not on the tensors'."""
    tree = ast.parse(source)
    kernels = {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and "jit" in map(ast.unparse, f.decorator_list)}
    found, guarded = [], set()
    for block in ast.walk(tree):
        if isinstance(block, ast.With) and ast.unparse(block.items[0]).startswith("torch.cuda.device_of("):
            guarded |= {id(node) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Subscript) or id(node) in guarded:
            continue
        if ast.unparse(node.func.value) in kernels:
            found.append(f"line {node.lineno}: {ast.unparse(node.func.value)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_kernels_are_launched_on_the_device_of_their_tensors(path):
    assert not launches_on_another_device(path.read_text(encoding="utf-8"))


def test_the_check_sees_a_launch_on_another_device():
    bad = "@jit\ndef k(p):\n    pass\ndef run(x):\n    k[1,](x)\n"
    assert launches_on_another_device(bad) == ["line 5: k"]
    assert not launches_on_another_device(bad.replace("    k[1", "    with torch.cuda.device_of(x):\n        k[1"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_kernels_state_what_a_gpu_would_guess(path):
    assert not problems(path.read_text())


def test_the_check_sees_what_it_looks_for():
    bad = "@jit\ndef k(p, m):\n    a = tl.load(p, mask=m)\n    b = tl.dot(a, a)\n    tl.atomic_add(p, b)\n    tl.load(p)\n"
    assert [p.split(":")[0] for p in problems(bad)] == ["line 3", "line 4", "line 5"]
    good = bad.replace("mask=m)", "mask=m, other=0.0)").replace("a, a)", 'a, a, input_precision="ieee")').replace("atomic_add", "store")
    assert not problems(good)
