"""The best and the worst of several answers to an instruction: for another round of training on answers, and for preference training."""

from collections.abc import Sequence
from typing import NamedTuple

from .samples import Sample


class Answer(NamedTuple):
    """A story that a model wrote. `is_sound`: the story is coherent, whatever was asked for."""

    text: str
    is_sound: bool


def rank(sample: Sample, answer: Answer) -> tuple[bool, float, float]:
    """Sorts answers to the instruction: sound ones first, then by the share of the requirements that are met, then by the mean share to
    which they are. Requirements that cannot be judged are left out."""
    judged = [verdict for verdict in sample.judge(answer.text) if verdict.share is not None] or [None]
    return (
        answer.is_sound,
        sum(v is None or bool(v.is_met) for v in judged) / len(judged),
        sum(1.0 if v is None or v.share is None else v.share for v in judged) / len(judged),
    )


def best_and_worst(sample: Sample, answers: Sequence[Answer]) -> tuple[str | None, str | None]:
    """The texts of the first answer that is sound and meets every requirement, and of the lowest one by `rank`.

    The best is None if there is no such answer, the worst if all answers are such ones."""
    ranks = [rank(sample, answer) for answer in answers]
    best, worst = max(ranks), min(ranks)
    return (
        answers[ranks.index(best)].text if best == (True, 1, 1) else None,
        answers[ranks.index(worst)].text if worst < (True, 1, 1) else None,
    )
