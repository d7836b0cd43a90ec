"""Average the weights of several checkpoints, which often replaces training on with a lower rate (arXiv 1803.05407, 2209.14981)."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..common.errors import UserError
from ..common.files import atomic_folder, write_json
from ..inference.llm import LLM
from ..model.checkpoint import load_weights, read_shape, save_model, write_checksums
from .trained_run import TrainedRun
from .validation import part, validate


@torch.no_grad()
def average(
    run: TrainedRun, *, last: int, validation_documents: int, data: Path | None, advance: Callable[[int], None]
) -> tuple[Path, dict]:
    """Write run.folder/average-<step>-last<n>, a complete checkpoint with the fp32 mean of the newest `last` ones. The trainer ignores it.

    Returns the folder and the content of its average.json. `advance` is called with the number of parts after each of them. Raises
    UserError if there are too few checkpoints, the folder exists, or a checkpoint is damaged or of another shape."""
    if run.is_imported:
        raise UserError(f"{run.folder} was imported; an average needs a run of train.py, with its config and data")
    if last < 2:
        raise UserError(f"--last is {last}; an average needs at least 2 checkpoints")
    if last > len(run.checkpoints):
        found = f"{len(run.checkpoints)} checkpoint{'s' * (len(run.checkpoints) > 1)}"
        raise UserError(f"--last is {last}, and {run.folder} has {found}; lower it, or train with a smaller --train.checkpoint_every")
    chosen = dict(list(run.checkpoints.items())[-last:])
    steps = list(chosen)
    out = run.folder / f"average-{steps[-1]:08d}-last{last}"
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; remove it, or give another --last")
    llm = LLM.load(run.newest)
    model, tokenizer, n_parts = llm.model, llm.tokenizer, last + 2
    validation = run.split("validation", tokenizer, data)
    documents = part(validation, tokenizer, validation_documents)
    settings = run.validation_settings(model)
    _, last_bits = validate(model, documents, **settings)
    advance(n_parts)

    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    for folder in chosen.values():
        if read_shape(folder) != model.config:
            raise UserError(f"{folder} has another shape than {run.newest}; average checkpoints of one run")
        load_weights(model, folder)
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"{folder} has weights that are not finite numbers; move it away, or take fewer checkpoints with --last")
        for name, p in model.named_parameters():
            total[name] += p
        advance(n_parts)
    for name, p in model.named_parameters():
        p.copy_(total[name] / last)
    _, bits = validate(model, documents, **settings)
    advance(n_parts)

    about = {
        "steps": steps,
        "val_bits_per_char": bits,
        "last": {"step": steps[-1], "val_bits_per_char": last_bits},
        "validation": {"documents": documents.n_documents, "of_documents": validation.n_documents, "characters": documents.characters},
    }
    with atomic_folder(out) as temporary:
        save_model(temporary, model, state=None, base=None, **tokenizer.special_ids)
        tokenizer.save(temporary, context=model.config.context)
        write_json(temporary / "average.json", about)
        write_checksums(temporary)
    return out, about
