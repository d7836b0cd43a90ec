"""Uncompiled training steps of ours, the reference and transformers, over the batch, the context and the vocabulary."""

from dataclasses import replace

import torch

from bench import trainers
from bench.conftest import selected
from bench.measure import device, half_precision, spread
from bench.trainers import MISTRAL, OURS, REFERENCE, Job, missing, status
from tritale.model.gpt import GPTConfig

# On a CPU the quick start's shape without QK-norm (0.8 M parameters without the embedding), on a GPU microstories-44m.
SHAPES = {
    "cpu": GPTConfig.preset("quickstart", qk_norm=False, vocab_size=4096),
    "cuda": GPTConfig.preset("microstories-44m"),
    "tiny": GPTConfig.preset("tiny"),
}
# {axis: [(value, batch, context, vocabulary), …]}; None: the vocabulary of the shape.
POINTS = {
    "cpu": {
        "batch": [(b, b, 256, None) for b in (1, 4, 16)],
        "context": [(t, 4096 // t, t, None) for t in (256, 512, 1024, 2048, 4096)],
        "vocabulary": [(v, 2, 256, v) for v in (4096, 16_384, 65_536, 262_144)],
    },
    "cuda": {
        "batch": [(b, b, 512, None) for b in (1, 4, 16, 64)],
        "context": [(t, 16_384 // t, t, None) for t in (256, 512, 1024, 2048, 4096)],
        "vocabulary": [(v, 16, 512, v) for v in (4096, 16_384, 65_536, 262_144)],
    },
    "tiny": {"batch": [(2, 2, 32, None)]},
}
TRAINERS = (REFERENCE, OURS, MISTRAL)
ROUNDS = {"cuda": 20, "cpu": 3}


def pytest_generate_tests(metafunc):
    size = device().type if metafunc.config.getoption("--benchmark") else "tiny"
    names = TRAINERS if size != "tiny" else TRAINERS[:2]
    keys = [(size, axis, point, name) for axis, points in POINTS[size].items() for point in points for name in names]
    ids = [f"{axis}-{point[0]}-{name}" for _, axis, point, name in keys]
    metafunc.parametrize(("size", "axis", "point", "contender"), keys, ids=ids)


def test_scaling(size, axis, point, contender, request, benchmarking, progress, measured, report):
    value, batch, context, vocab = point
    config = replace(SHAPES[size], context=max(context, SHAPES[size].context))
    config = replace(config, vocab_size=vocab or config.vocab_size)
    row = {"suite": "scaling", "case": axis, "value": value, "contender": contender, "dtype": half_precision() or "fp32"}
    row |= {"tokens": batch * context, "batch": batch, "context": context, "vocabulary": config.vocab_size}
    if reason := missing(contender):
        return report(row | {"status": "cannot run", "note": reason})
    if (axis, value) not in measured:
        names = dict.fromkeys([REFERENCE, *(n for n in selected(request, axis=axis, point=point) if missing(n) is None)])
        jobs = [Job(name, config, batch, context, False, torch.get_num_threads(), name) for name in names]
        rounds = ROUNDS[device().type] if benchmarking else 1
        with progress(f"{axis} {value:,}", len(jobs) * (rounds + 1)) as tick:
            measured[axis, value] = trainers.measure(jobs, rounds, tick)
    found, base = measured[axis, value][contender], measured[axis, value][REFERENCE]
    row |= status(found, base)
    if row["status"] in ("cannot run", "failed"):
        return report(row)
    report(row | {"seconds": spread(found["seconds"]), "bytes": found["bytes"]}, found["seconds"])
