"""Training on conversations and on pairs of answers: exact masks, exact resuming, and the preference loss against its definition."""

import json
import math
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import losses, metrics, run_here
from safetensors.torch import load_file

from tritale.common.errors import UserError
from tritale.data.batches import IGNORED, Batches
from tritale.data.built_in import open_data
from tritale.data.prepare.conversations import ChatFields
from tritale.data.prepare.pipeline import Options, prepare
from tritale.inference import LLM
from tritale.kernels import linear_cross_entropy, token_log_probs
from tritale.model import gpt
from tritale.model.checkpoint import load_model
from tritale.stories.generator import story
from tritale.training import processes
from tritale.training.config import DPOConfig
from tritale.training.preference import STATISTICS, dpo_loss
from tritale.training.step import TrainingStep

CONTEXT = 64  # of the tiny model


def rows(n: int, task: str) -> list[dict]:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    piece = lambda: story(2, rng.randrange(10**6)).text[: rng.randint(3, 9)]
    prompts = [[{"role": "user", "content": piece()}] for _ in range(n)]
    if task == "dpo":
        return [{"prompt": prompt, "chosen": f"好{piece()}", "rejected": f"坏{piece()}"} for prompt in prompts]
    return [{"messages": [*prompt, {"role": "assistant", "content": piece()}], "emphasis": [[0, rng.randint(1, 2)]]} for prompt in prompts]


@pytest.fixture(scope="module")
def instructions(tiny_run, tmp_path_factory):
    """{task: data folder} for the tiny run's model."""
    folders = {}
    for task in ("sft", "dpo"):
        folder = tmp_path_factory.mktemp(task)
        source, checkpoint = folder / "rows.jsonl", str(tiny_run / "step-00000006")
        source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(60, task)), encoding="utf-8")
        fields = ChatFields(tokenizer=checkpoint, context=CONTEXT, task=task)
        prepare([str(source)], folder / "data", Options(fields=fields, tokenizer=checkpoint, skip_errors=True), workers=1)
        folders[task] = folder / "data"
    return folders


def teach(out_dir, tiny_run, data, **options):
    options = {"init_from": tiny_run, "data__source": data, "optim__warmup_steps": 1, "log__prompts": '["写一个故事"]'} | options
    run_here(out_dir, model__preset="quickstart", **options)


def weights(out_dir, step):
    return load_file(out_dir / f"step-{step:08d}" / "model.safetensors")


def test_training_on_answers_begins_with_the_checkpoint_and_resumes_bit_for_bit(tiny_run, instructions, tmp_path):
    options = {"data__replay": tiny_run / "data", "train__max_steps": 4, "train__checkpoint_every": 2, "train__validate_every": 2}
    teach(tmp_path / "whole", tiny_run, instructions["sft"], **options)
    teach(tmp_path / "short", tiny_run, instructions["sft"], **options | {"optim__lr": 1e-9, "optim__embedding_lr": 1e-9})
    for name, tensor in weights(tmp_path / "short", 2).items():
        torch.testing.assert_close(tensor, weights(tiny_run, 6)[name], atol=1e-6, rtol=1e-5)
    for path in (tmp_path / "whole" / "step-00000004").iterdir():
        path.unlink() if path.is_file() else [p.unlink() for p in path.iterdir()]  # the run was killed before its last checkpoint
    (tmp_path / "whole" / "step-00000004" / "trainer").rmdir()
    (tmp_path / "whole" / "step-00000004").rmdir()
    before = losses(tmp_path / "whole")
    teach(tmp_path / "again", tiny_run, instructions["sft"], **options)
    expected = weights(tmp_path / "again", 4)
    teach(tmp_path / "whole", tiny_run, instructions["sft"], **options)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "whole", 4).items())
    assert losses(tmp_path / "whole") == before == losses(tmp_path / "again")
    folder = tmp_path / "whole" / "step-00000004"
    llm = LLM.load(folder)
    assert llm.tokenizer.is_chat
    llm.chat([{"role": "user", "content": "写一个故事"}], seed=1, max_new_tokens=5)  # may be empty: the model is nearly untrained
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    with pytest.raises(UserError, match="not trained on instructions"):
        LLM.load(tiny_run).chat([{"role": "user", "content": "写一个故事"}])


def test_the_reported_losses_are_those_of_the_answers(tiny_run, instructions, tmp_path):
    """The first loss of training, in which emphasised tokens weigh more, and the validation, in which they do not, compared with the
    checkpoint's, one conversation at a time."""
    teach(
        tmp_path / "run",
        tiny_run,
        instructions["sft"],
        train__max_steps=2,
        train__validate_every=2,
        optim__lr=1e-9,
        optim__embedding_lr=1e-9,
        data__emphasis=7.0,
    )
    model, (_, train, validation) = load_model(tiny_run / "step-00000006"), open_data(instructions["sft"])

    def nats(tokens, targets, weights: torch.Tensor | float = 1.0) -> float:
        logits = model(torch.tensor(tokens)[None])[0]
        return (weights * F.cross_entropy(logits, torch.tensor(targets), ignore_index=IGNORED, reduction="none")).sum().item()

    total = 0.0
    for begin, end in zip(validation.starts, validation.starts[1:], strict=False):
        at = np.arange(begin, end - 1)
        total += nats(validation.take(at).tolist(), np.where(validation.is_learnt(at + 1), validation.take(at + 1), IGNORED).tolist())
    reported = [line for line in metrics(tmp_path / "run") if "val_loss" in line][-1]["val_bits_per_char"]
    assert total / 0.6931471805599453 / validation.characters == pytest.approx(reported, rel=1e-5)
    batches = Batches(train, context=CONTEXT, micro_batch=2, global_batch=4, seed=42, emphasis=7.0)
    total = 0.0
    for batch in batches.step(0):
        assert batch.cu_seqlens is not None and batch.weights is not None and batch.weights.max() == 7
        for begin, end in pairwise(batch.cu_seqlens.tolist()):
            if end > begin:
                total += nats(batch.tokens[0, begin:end].tolist(), batch.targets[0, begin:end].tolist(), batch.weights[0, begin:end])
    assert total / batches.n_targets(0) == pytest.approx(losses(tmp_path / "run")[1], rel=1e-5)


def test_gradients_of_prompts_are_exactly_zero(tiny_run, instructions, monkeypatch):
    """The loss has no gradient at a token whose successor is not of an answer, and the model sees none through the other documents."""
    held = []

    def recorded(h, head, targets, **options):
        h.retain_grad()
        held.append((h, targets))
        return linear_cross_entropy(h, head, targets, **options)

    monkeypatch.setattr(gpt, "linear_cross_entropy", recorded)
    model, (_, train, _) = load_model(tiny_run / "step-00000006"), open_data(instructions["sft"])
    (batch, *_) = Batches(train, context=CONTEXT, micro_batch=4, global_batch=4, seed=5).step(0)
    model(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens).backward()
    ((h, targets),) = held
    is_ignored = targets[0] == IGNORED
    assert is_ignored.any() and not is_ignored.all()
    assert (h.grad[0][is_ignored] == 0).all() and (h.grad[0][~is_ignored] != 0).any(-1).all()


def test_another_model_or_tokenizer_is_refused(tiny_run, instructions, tmp_path):
    with pytest.raises(SystemExit, match="leave out the keys of model"):
        run_here(tmp_path / "a", init_from=tiny_run, data__source=instructions["sft"])
    with pytest.raises(UserError, match=r"another tokenizer than .*step-00000006; make it with --tokenizer"):
        teach(tmp_path / "c", tiny_run, "built-in", data__stories=300, seed=7)
    with pytest.raises(SystemExit, match="set init_from"):
        run_here(tmp_path / "d", objective="dpo")
    with pytest.raises(UserError, match="set objective dpo"):
        teach(tmp_path / "e", tiny_run, instructions["dpo"])


# --- log-probabilities and preference training -------------------------------------------------------------------------------------------


def test_token_log_probs_are_those_of_the_softmax():
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    weight, token_weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((11, 7), (2, 5)))
    targets = torch.randint(11, (2, 5))
    targets[0, 2] = IGNORED
    expected = (x @ weight.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    for strategy in ("chunk", "recompute"):
        torch.testing.assert_close(token_log_probs(x, weight, targets, strategy=strategy), expected)
        found = token_log_probs(x, weight, targets, token_weight=token_weight, strategy=strategy)
        torch.testing.assert_close(found, expected * token_weight)
    function = lambda x, w, t: token_log_probs(x, w, targets, token_weight=t)
    assert torch.autograd.gradcheck(function, (x, weight, token_weight))


def draw_pairs(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return -torch.rand(n, 2) * 90, -torch.rand(n, 2) * 90, torch.randint(5, 60, (n, 2)).float()


@pytest.mark.parametrize("is_normalised", [False, True])
def test_dpo_loss_is_its_formula(is_normalised):
    log_probs, reference, counts = draw_pairs()
    config = DPOConfig(beta=0.2, length_normalised=is_normalised, sft_weight=0.3)
    loss, sums = dpo_loss(log_probs, reference, counts, config)
    p, r, n = (t.double() for t in (log_probs, reference, counts if is_normalised else torch.ones_like(counts)))
    chosen, rejected = (0.2 * (p[:, i] / n[:, i] - r[:, i] / n[:, i]) for i in (0, 1))
    expected = -torch.log(torch.sigmoid(chosen - rejected)) - 0.3 * p[:, 0] / counts[:, 0]
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    assert sums[-1] == 6
    values = dict(zip(STATISTICS, (sums / 6).tolist(), strict=False))
    assert values["reward_accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    assert values["reward_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    padded = [torch.cat([t, torch.zeros(2, 2)]) for t in (log_probs, reference, counts)]  # pairs without answers
    loss_of_padded, sums_of_padded = dpo_loss(padded[0], padded[1], padded[2], config)
    torch.testing.assert_close((loss_of_padded.sum(), sums_of_padded), (loss.sum(), sums))


def test_dpo_loss_is_that_of_trl():
    trainer = pytest.importorskip("trl").DPOTrainer
    if not hasattr(trainer, "dpo_loss"):
        pytest.skip("this version of trl has no function for the loss; install trl 0.19.1")
    log_probs, reference, counts = draw_pairs(50)
    theirs = object.__new__(trainer)
    theirs.beta, theirs.label_smoothing, theirs.reference_free, theirs.f_divergence_type = 0.1, 0.0, False, "reverse_kl"
    theirs.f_divergence_params, theirs.use_weighting, theirs.loss_type = None, False, "sigmoid"
    theirs.accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    expected, chosen, rejected = trainer.dpo_loss(theirs, *log_probs.T, *reference.T)
    loss, sums = dpo_loss(log_probs, reference, counts, DPOConfig(beta=0.1))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(sums[1:3], torch.stack([chosen.sum(), rejected.sum()]), atol=1e-4, rtol=1e-5)


def test_a_bad_step_leaves_the_mean_statistics_finite(tiny_run, instructions, tmp_path, monkeypatch):
    """Steps 2, 5 and 6 have a NaN in a reference. A line for two steps shows the statistics of step 1 then, and none for 5 and 6."""
    options = {"objective": "dpo", "train__max_steps": 6, "train__checkpoint_every": 6, "train__validate_every": 6}
    teach(tmp_path / "good", tiny_run, instructions["dpo"], **options)
    backward, came = TrainingStep.backward, []

    def spoil(self, batch):
        came.append(batch)
        if (len(came) - 1) // 2 in (1, 4, 5):  # two micro-batches a step
            batch = replace(batch, reference=batch.reference * float("nan"))
        backward(self, batch)

    monkeypatch.setattr(TrainingStep, "backward", spoil)
    teach(tmp_path / "bad", tiny_run, instructions["dpo"], log__every=2, **options)
    good, bad = ({line["step"]: line for line in metrics(tmp_path / name) if "tokens" in line} for name in ("good", "bad"))
    assert all(bad[2][name] == pytest.approx(good[1][name], rel=1e-5) for name in STATISTICS)
    assert all(math.isfinite(bad[4][name]) for name in STATISTICS) and bad[6]["bad_steps"] == 3
    assert not bad[6].keys() & {"loss", "grad_norm", *STATISTICS}


def test_a_stop_keeps_the_statistics_of_preference_training(tiny_run, instructions, tmp_path, monkeypatch):
    options = {"objective": "dpo", "train__max_steps": 6, "train__checkpoint_every": 6, "train__validate_every": 6, "log__every": 3}
    teach(tmp_path / "whole", tiny_run, instructions["dpo"], **options)
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(processes.Stop, "is_due", lambda self: next(calls) == 2)  # before the third step
        with pytest.raises(SystemExit):
            teach(tmp_path / "stopped", tiny_run, instructions["dpo"], **options)
    assert (tmp_path / "stopped" / "step-00000002").is_dir() and not metrics(tmp_path / "stopped")
    teach(tmp_path / "stopped", tiny_run, instructions["dpo"], **options)
    whole, stopped = ([line for line in metrics(tmp_path / name) if "dpo_loss" in line] for name in ("whole", "stopped"))
    assert len(whole) == len(stopped) == 2
    assert all(ours[key] == theirs[key] for ours, theirs in zip(stopped, whole, strict=True) for key in STATISTICS)


def test_preference_training_prefers_the_chosen_answers(tiny_run, instructions, tmp_path):
    options = {
        "objective": "dpo",
        "train__max_steps": 12,
        "train__checkpoint_every": 6,
        "train__validate_every": 6,
        "train__global_batch": 8,
    }
    rates = {"optim__lr": 3e-3, "optim__embedding_lr": 3e-3, "dpo__sft_weight": 0.1}
    teach(tmp_path / "run", tiny_run, instructions["dpo"], **options, **rates)
    lines = [line for line in metrics(tmp_path / "run") if "dpo_loss" in line]
    assert lines[0]["dpo_loss"] == pytest.approx(0.693147, abs=1e-4)  # the model is its own reference
    assert abs(lines[0]["reward_margin"]) < 1e-4
    last = {key: sum(line[key] for line in lines[-4:]) / 4 for key in ("reward_accuracy", "reward_margin", "dpo_loss")}  # of 16 pairs
    assert last["reward_accuracy"] > 0.7 and last["reward_margin"] > 0.2 and last["dpo_loss"] < 0.6
    (reference,) = (instructions["dpo"] / "train").glob("reference-*.safetensors")
    written = reference.stat().st_mtime_ns
    folder = tmp_path / "run" / "step-00000012"
    expected = weights(tmp_path / "run", 12)
    for path in (*(folder / "trainer").iterdir(), folder / "trainer", *folder.glob("*.*")):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    teach(tmp_path / "run", tiny_run, instructions["dpo"], **options, **rates)  # resumes from step 6
    assert reference.stat().st_mtime_ns == written
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "run", 12).items())
