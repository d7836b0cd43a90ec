"""Training steps (forward, backward, clipping, AdamW) of ours, the reference, transformers' Mistral and litgpt.

`test_training_step` has the shape microstories-44m, with its own vocabulary of 65,024 and with one of 6,000, and the ablation.
`test_scaling` varies the batch, the context and the vocabulary, without torch.compile.
"""

from dataclasses import replace

import torch

from bench import trainers
from bench.conftest import selected
from bench.measure import device, half_precision, spread
from bench.trainers import ABLATIONS, EAGER, LITGPT, MISTRAL, OURS, REFERENCE, Job, ablation, missing, status
from tritale.model.gpt import GPTConfig

MODELS = {
    "microstories-44m": GPTConfig.preset("microstories-44m"),
    "microstories-44m, 6 k vocabulary": GPTConfig.preset("microstories-44m", vocab_size=6000),
    "tiny": GPTConfig.preset("tiny"),
}
TRAINERS = (REFERENCE + EAGER, REFERENCE, OURS, MISTRAL + EAGER, MISTRAL, LITGPT, *map(ablation, ABLATIONS))
BATCH = {"cuda": 32, "cpu": 2}  # sequences of 512 tokens
ROUNDS = {"cuda": 30, "cpu": 5}

# On a CPU the quick start's shape without QK-norm (0.8 M parameters without the embedding), on a GPU microstories-44m.
SCALED_SHAPES = {
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
SCALED_TRAINERS = (REFERENCE, OURS, MISTRAL)
SCALED_ROUNDS = {"cuda": 20, "cpu": 3}


def pytest_generate_tests(metafunc):
    benchmarking = metafunc.config.getoption("--benchmark")
    if metafunc.definition.name == "test_training_step":
        models, names = (list(MODELS)[:2], TRAINERS) if benchmarking else (["tiny"], (REFERENCE + EAGER, OURS + EAGER))
        keys = [(model, name) for model in models for name in names]
        metafunc.parametrize(("model", "contender"), keys, ids=["-".join(key) for key in keys])
    else:
        size, names = (device().type, SCALED_TRAINERS) if benchmarking else ("tiny", SCALED_TRAINERS[:2])
        keys = [(size, axis, point, name) for axis, points in POINTS[size].items() for point in points for name in names]
        ids = [f"{axis}-{point[0]}-{name}" for _, axis, point, name in keys]
        metafunc.parametrize(("size", "axis", "point", "contender"), keys, ids=ids)


def cannot_run(model: str, name: str) -> str | None:
    """Why a trainer is not measured here, or None."""
    if device().type == "cpu" and name.startswith("ours without") and model != "microstories-44m" and not missing(name):
        return "left out on a CPU, to save time; see the full vocabulary"
    return missing(name.removesuffix(EAGER))


def in_turns(title: str, names: list[str], config: GPTConfig, batch: int, context: int, rounds: int, progress) -> dict[str, dict]:
    jobs = [Job(name, config, batch, context, torch.get_num_threads()) for name in names]
    with progress(f"{title}: {len(jobs)} trainers", len(jobs) * (rounds + 1)) as tick:
        return trainers.measure(jobs, rounds, tick)


def finished(row: dict, found: dict, base: dict, report) -> None:
    row = row | status(found, base) | {"dtype": half_precision() or "fp32"}
    if row["status"] in ("cannot run", "failed"):
        return report(row)
    report(row | {"seconds": spread(found["seconds"]), "bytes": found["bytes"]}, found["seconds"])


def test_training_step(model, contender, request, benchmarking, progress, measured, report):
    config, batch = MODELS[model], BATCH[device().type]
    context = min(512, config.context)
    row = {"suite": "training step", "case": "training step", "model": model, "contender": contender, "tokens": batch * context}
    if reason := cannot_run(model, contender):
        return report(row | {"status": "cannot run", "note": reason})
    if model not in measured:
        names = [n for n in selected(request, model=model) if cannot_run(model, n) is None]
        ablations = [n for n in names if n.startswith("ours without")]
        main = dict.fromkeys([REFERENCE + EAGER, *(n for n in names if n not in ablations)])  # the base of the comparison comes first
        rounds = ROUNDS[device().type] if benchmarking else 1
        found = in_turns(model, list(main), config, batch, context, rounds, progress)
        if ablations:
            beside = in_turns(model, [OURS, *ablations], config, batch, context, rounds, progress)
            found |= {name: {**beside[name], "ours": beside[OURS]} for name in ablations}
        measured[model] = found
    found, base = measured[model][contender], measured[model][REFERENCE + EAGER]
    if "failed" not in found:
        row |= {"parameters": found["parameters"], "loss": found["fp32"][0]}
        if "ours" in found and "failed" not in found["ours"]:
            row["ours_beside_it"] = spread(found["ours"]["seconds"])  # in turns with the ablations
    finished(row, found, base, report)


def test_scaling(size, axis, point, contender, request, benchmarking, progress, measured, report):
    value, batch, context, vocab = point
    shape = SCALED_SHAPES[size]
    config = replace(shape, context=max(context, shape.context), vocab_size=vocab or shape.vocab_size)
    row = {"suite": "scaling", "case": axis, "value": value, "contender": contender}
    row |= {"tokens": batch * context, "batch": batch, "context": context, "vocabulary": config.vocab_size}
    if reason := missing(contender):
        return report(row | {"status": "cannot run", "note": reason})
    if (axis, value) not in measured:
        names = dict.fromkeys([REFERENCE, *(n for n in selected(request, axis=axis, point=point) if missing(n) is None)])
        rounds = SCALED_ROUNDS[device().type] if benchmarking else 1
        results = in_turns(f"{axis} {value:,}", [name + EAGER for name in names], config, batch, context, rounds, progress)
        measured[axis, value] = {name.removesuffix(EAGER): found for name, found in results.items()}
    finished(row, measured[axis, value][contender], measured[axis, value][REFERENCE], report)
