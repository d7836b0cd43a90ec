"""A complete training step (forward, backward, clipping, AdamW) of ours, the reference, transformers' Mistral and litgpt, and the ablation.

The shape is microstories-44m, with its own vocabulary of 65,024 and with one of 6,000.
"""

import torch

from bench import trainers
from bench.conftest import selected
from bench.measure import device, half_precision, spread
from bench.trainers import ABLATIONS, LITGPT, MISTRAL, OURS, REFERENCE, Job, ablation, missing, status
from tritale.model.gpt import GPTConfig

MODELS = {
    "microstories-44m": GPTConfig.preset("microstories-44m"),
    "microstories-44m, 6 k vocabulary": GPTConfig.preset("microstories-44m", vocab_size=6000),
    "tiny": GPTConfig.preset("tiny"),
}
EAGER = ", eager"
TRAINERS = (REFERENCE + EAGER, REFERENCE, OURS, MISTRAL + EAGER, MISTRAL, LITGPT, *map(ablation, ABLATIONS))  # compiled where not eager
BATCH = {"cuda": 32, "cpu": 2}  # sequences of 512 tokens
ROUNDS = {"cuda": 30, "cpu": 5}


def pytest_generate_tests(metafunc):
    if metafunc.config.getoption("--benchmark"):
        keys = [(model, trainer) for model in MODELS if model != "tiny" for trainer in TRAINERS]
    else:
        keys = [("tiny", trainer) for trainer in (REFERENCE + EAGER, OURS + EAGER)]
    metafunc.parametrize(("model", "contender"), keys, ids=["-".join(key) for key in keys])


def cannot_run(model: str, name: str) -> str | None:
    """Why a trainer is not measured here, or None."""
    if device().type == "cpu" and name.startswith("ours without") and model != "microstories-44m" and not missing(name):
        return "left out on a CPU, to save time; see the full vocabulary"
    return missing(name.removesuffix(EAGER))


def groups(names: list[str]) -> list[list[str]]:
    """The trainers that take turns with each other: those of the main table, and the ablations with ours."""
    ablations = [n for n in names if n.startswith("ours without")]
    main = [n for n in names if n not in ablations]
    return [main] + ([[OURS, *ablations]] if ablations else [])


def measure(model: str, names: list[str], progress, rounds: int) -> dict[str, dict]:
    config, found = MODELS[model], {}
    batch, context = BATCH[device().type], min(512, config.context)
    for group in groups(names):
        jobs = []
        for name in group:
            trainer, is_compiled = name.removesuffix(EAGER), not name.endswith(EAGER)
            jobs.append(Job(trainer, config, batch, context, is_compiled, torch.get_num_threads(), name))
        with progress(f"{model}: {len(jobs)} trainers", len(jobs) * (rounds + 1)) as tick:
            measured = trainers.measure(jobs, rounds, tick)
        found |= {name: {**value, "base": measured.get(OURS)} for name, value in measured.items() if name not in found}
    return found


def test_training_step(model, contender, request, benchmarking, progress, measured, report):
    row = {"suite": "training step", "case": "training step", "model": model, "contender": contender}
    if reason := cannot_run(model, contender):
        return report(row | {"status": "cannot run", "note": reason})
    if model not in measured:
        names = [n for n in selected(request, model=model) if cannot_run(model, n) is None]
        names = list(dict.fromkeys([REFERENCE + EAGER, *names]))  # the base of the comparison
        measured[model] = measure(model, names, progress, ROUNDS[device().type] if benchmarking else 1)
    found, base = measured[model][contender], measured[model][REFERENCE + EAGER]
    row |= status(found, base)
    if row["status"] in ("cannot run", "failed"):
        return report(row)
    tokens = BATCH[device().type] * min(512, MODELS[model].context)
    row |= {"dtype": half_precision() or "fp32", "tokens": tokens, "parameters": found["parameters"]}
    row |= {"seconds": spread(found["seconds"]), "bytes": found["bytes"], "loss": found["fp32"][0]}
    if contender in map(ablation, ABLATIONS) and "failed" not in found["base"]:
        row["ours_beside_it"] = spread(found["base"]["seconds"])  # ours, in turns with the ablations
    report(row, found["seconds"])
