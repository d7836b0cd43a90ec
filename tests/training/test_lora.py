"""Runs with lora.rank: what is trained, exact resuming, what each command makes of their checkpoints, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from runs import losses, metrics, train
from safetensors.torch import load_file

from tests.training.test_instructions import instructions, teach  # noqa: F401  (a fixture)
from tests.training.test_plan import CPU, DATA, HERE, allocated_peak
from tritale.cli.main import main
from tritale.common.errors import UserError
from tritale.common.files import sha256_of
from tritale.evaluation.average import average
from tritale.evaluation.trained_run import TrainedRun
from tritale.inference import LLM
from tritale.inference.engine import Engine
from tritale.model import GPT, GPTConfig, load_model
from tritale.model.checkpoint import save_model
from tritale.model.lora import TARGETS
from tritale.serve.app import model_object
from tritale.training.config import DataConfig, LoRAConfig, OptimConfig, RunConfig, TrainConfig, parse
from tritale.training.plan import plan
from tritale.training.step import TrainingStep, random_batch

BASE = "step-00000006"
SHORT = {"lora__rank": 4, "optim__matrices": "adamw", "train__max_steps": 4, "train__checkpoint_every": 2, "train__validate_every": 2}


@pytest.fixture(scope="module")
def lora_run(tiny_run, instructions, tmp_path_factory):  # noqa: F811
    """A run of four steps on answers and replayed stories, beside a copy of its base, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(tiny_run, folder / "base")
    teach(folder / "run", folder / "base", instructions["sft"], data__replay=folder / "base" / "data", **SHORT)
    return folder / "run"


def files(run, step: int) -> dict:
    folder = run / f"step-{step:08d}"
    state = {key: value for key, value in load_file(folder / "trainer" / "state.safetensors").items() if not key.startswith("rng")}
    return load_file(folder / "adapter_model.safetensors") | state


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_has_the_same_bits_even_if_its_base_has_gone_on(lora_run, instructions, tmp_path, capsys):  # noqa: F811
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(lora_run.parent / "base", base)
    options = {"data__replay": base / "data", **SHORT}
    teach(run, base, instructions["sft"], **options)
    assert_same(files(run, 4), files(lora_run, 4))
    shutil.rmtree(run / "step-00000004")
    shutil.copytree(base / "step-00000003", base / "step-00000007")  # init_from is another checkpoint now
    teach(run, base, instructions["sft"], **options)
    assert_same(files(run, 4), files(lora_run, 4))
    assert losses(run) == losses(lora_run)
    shutil.rmtree(run / "step-00000004")
    shutil.rmtree(base / BASE)
    with pytest.raises(FileNotFoundError, match=f"step-00000002 is an adapter of .*{BASE}, which is missing; move that checkpoint back"):
        teach(run, base, instructions["sft"], **options)
    with pytest.raises(SystemExit, match="1 of 1 are damaged"):
        main(["verify", str(run)])
    assert f"{BASE}, which is missing; move that checkpoint back" in capsys.readouterr().out


def test_the_merged_checkpoint_is_what_commands_load(lora_run, tmp_path, capsys):
    folder, base = lora_run / "step-00000004", lora_run.parent / "base" / BASE
    main(["merge", str(lora_run), "--out", str(tmp_path / "merged")])
    assert f"{base} with the adapter of {folder}" in capsys.readouterr().out
    merged, loaded, before = (load_model(path) for path in (tmp_path / "merged", folder, base))
    for (name, a), b, c in zip(merged.named_parameters(), loaded.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) != any(part in name for part in ("qkv", "out", "gate_up")), name
    tokens = torch.randint(merged.config.vocab_size, (1, 40))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(theirs(tokens).logits, loaded(tokens), atol=1e-4, rtol=0)
    for arguments, message in (
        ([lora_run, "--out", tmp_path / "merged"], "merged exists and is not overwritten; give another --out"),
        ([base, "--out", tmp_path / "x"], "has no adapter: its weights are whole, so there is nothing to merge"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["merge", *map(str, arguments)])


def test_the_validation_of_the_run_is_that_of_the_loaded_checkpoint(lora_run, tmp_path):
    """`average` validates the newest checkpoint, loaded, as the run did; the mean of one checkpoint's weights with itself are its own."""
    shutil.copytree(lora_run.parent, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    shutil.rmtree(run / "step-00000002")
    shutil.copytree(run / "step-00000004", run / "step-00000002")
    out, about = average(TrainedRun.open(run), last=2, validation_documents=10**6, data=None, advance=lambda n: None)
    reported = [line["val_bits_per_char"] for line in metrics(run) if "val_bits_per_char" in line]  # of six digits
    assert about["last"]["val_bits_per_char"] == pytest.approx(reported[-1], rel=1e-5) != reported[0]
    for a, b in zip(load_model(out).parameters(), load_model(run / "step-00000004").parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_every_command_takes_a_checkpoint_with_an_adapter(lora_run, tmp_path, capsys):
    shutil.copytree(lora_run.parent, tmp_path / "copy")
    run, data = tmp_path / "copy" / "run", str(tmp_path / "copy" / "base" / "data")
    few = ["--data", data, "--validation-documents", "2"]
    for command in (
        ["verify", run],
        ["status", run],
        ["report", run],
        ["generate", run, "--instruct", "--prompt", "写一个故事", "--max-new-tokens", "4"],
        ["sweep", run, *few, "--samples", "1", "--max-new-tokens", "4"],
        ["average", run, "--last", "2"],
        ["export", run, "--to", "hf", "--out", tmp_path / "hf"],
        ["export", run, "--to", "litgpt", "--out", tmp_path / "litgpt"],
    ):
        main([str(part) for part in command])
        printed = capsys.readouterr().out
        if command[0] == "verify":
            assert "files; an adapter of" in printed and "damaged" not in printed
        if command[0] == "export" and "hf" in command:
            assert "transformers" in printed and "the same logits" in printed
    Engine(run, slots=1, queue=1, device="cpu").stop()  # of the server, which has loaded the newest checkpoint
    assert model_object(run / "step-00000004")["created"] > 0
    assert (tmp_path / "hf" / "model.safetensors").is_file() and not (tmp_path / "hf" / "adapter_config.json").exists()
    model, exported = load_model(run / "step-00000004"), load_model(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), exported.parameters(), strict=True))


def test_several_processes_train_the_same_adapter(lora_run, instructions, tmp_path):  # noqa: F811
    base = lora_run.parent / "base"
    options = {"init_from": base, "data__source": instructions["sft"], "data__replay": base / "data", "optim__warmup_steps": 1, **SHORT}
    train(tmp_path / "two", processes=2, model__preset="quickstart", log__prompts='["写一个故事"]', **options)
    for name, tensor in files(tmp_path / "two", 4).items():
        torch.testing.assert_close(tensor, files(lora_run, 4)[name], atol=2e-4, rtol=1e-2, msg=name)
    assert losses(tmp_path / "two") == pytest.approx(losses(lora_run), rel=1e-4)


def test_the_reference_of_preference_training_is_the_base(tiny_run, instructions, tmp_path):  # noqa: F811
    steps = {"train__max_steps": 12, "train__checkpoint_every": 12, "train__validate_every": 12, "train__global_batch": 8}
    options = {"objective": "dpo", "lora__rank": 8, "optim__matrices": "adamw", "optim__lr": 3e-3, **steps}
    teach(tmp_path / "run", tiny_run, instructions["dpo"], **options)
    name = sha256_of(tiny_run / BASE / "model.safetensors")[:16]
    assert (instructions["dpo"] / "train" / f"reference-{name}.safetensors").is_file()
    lines = [line for line in metrics(tmp_path / "run") if "dpo_loss" in line]
    assert lines[0]["dpo_loss"] == pytest.approx(0.693147, abs=1e-5) and abs(lines[0]["reward_margin"]) < 1e-5
    assert sum(line["reward_margin"] for line in lines[-4:]) / 4 > 0.1


def test_a_run_cannot_resume_with_other_adapters_or_without(lora_run, instructions):  # noqa: F811
    base = lora_run.parent / "base"
    options = {"data__replay": base / "data", **SHORT}
    for change in ({"lora__rank": 8}, {"lora__alpha": 1.0}, {"lora__targets": "[q_proj]"}, {"lora__rank": 0}):
        with pytest.raises(UserError, match=r"cannot resume with lora\.(rank|alpha|targets): .* → .*: choose another --out_dir"):
            teach(lora_run, base, instructions["sft"], resume="force", **options | change)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lora.rank=8"], "lora.rank trains adapters of a model; set init_from to its run"),
        (["--lora.alpha=8"], "the keys of lora have no effect with lora.rank 0; set it"),
        (["--lora.rank=8", "--init_from=x", "--train.ema=0.99"], "train.ema and train.parallel fsdp are for runs that train all weights"),
        (["--lora.rank=8", "--init_from=x", "--train.parallel=fsdp"], "train.ema and train.parallel fsdp are for runs that train all"),
        (["--lora.r=8"], "did you mean 'lora.rank'"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        parse(["--model.preset=quickstart", *arguments])


def test_an_adapter_is_merged_before_another_one_is_trained_on_it(lora_run, instructions, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"step-00000004 is an adapter itself; merge it first.* tritale merge .*step-00000004 --out DIR"):
        teach(tmp_path / "a", lora_run, instructions["sft"], **SHORT)
    with pytest.raises(SystemExit, match="both trainings change all weights"):
        main(["teach", str(lora_run), "--lora.rank", "8"])
    teach(
        tmp_path / "b", lora_run, instructions["sft"], train__max_steps=1, optim__warmup_steps=0, optim__lr=1e-9, optim__embedding_lr=1e-9
    )
    after, before = (
        load_model(tmp_path / "b" / "step-00000001"),
        load_model(lora_run / "step-00000004"),
    )  # all weights, from the merged ones
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(after.parameters(), before.parameters(), strict=True))


# --- the plan ----------------------------------------------------------------------------------------------------------------


def planned(tmp_path, matrices: str = "adamw", vocab_size: int = 900, **changes):
    shape = GPTConfig(vocab_size, n_layer=3, n_head=4, n_kv_head=4, head_dim=64, width=256, mlp_width=512, context=128, qk_norm=True)
    folder = tmp_path / f"base-{vocab_size}"
    if not folder.exists():
        folder.mkdir()
        save_model(folder, GPT(shape), eos_token_id=0, pad_token_id=3)
    config = RunConfig(
        out_dir=str(tmp_path / "run"),
        init_from=str(folder),
        lora=LoRAConfig(**{"rank": 8, **changes}),
        data=DataConfig(source="elsewhere"),
        train=TrainConfig(global_batch=8, micro_batch=8, compile=False, checkpoint_every=1000),
        optim=OptimConfig(matrices=matrices, warmup_steps=2, embedding_lr=0.1),
    )
    return plan(config, dataclasses.replace(DATA, vocab_size=vocab_size), CPU)


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "down_proj")], ids="+".join)
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_the_planned_parameters_and_memory_are_those_of_the_adapters(matrices, targets, tmp_path):
    p = planned(tmp_path, matrices, targets=targets)
    step = TrainingStep(p, HERE)
    step.backward(random_batch(p, 1))
    step.update()
    everything, trained = [*step.model.parameters()], [t for t in step.model.parameters() if t.requires_grad]
    states = [t for o in step.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
    assert p.parameters == sum(t.numel() for t in everything) and p.trained == sum(t.numel() for t in trained) < p.parameters / 10
    assert p.memory.weights == 2 * sum(t.nbytes for t in everything)  # and those of a validation
    assert p.memory.gradients == sum(t.grad.nbytes for t in everything if t.grad is not None)
    assert p.memory.optimizer == sum(t.nbytes for t in states)
    assert f"{p.trained:,} are trained, adapters of rank 8" in p.rows()["model"]
    assert "embedding" not in p.rows()["learning rate"]


@pytest.mark.parametrize("vocab_size", [900, 20_000])
def test_the_peak_of_a_step_is_within_a_tenth_of_the_estimate(vocab_size, tmp_path):
    p = planned(tmp_path, vocab_size=vocab_size)
    step = TrainingStep(p, HERE)
    batch = random_batch(p, 8)

    def work():
        step.backward(batch)
        step.update()

    work()  # the optimizer's state
    expected = p.memory.activations + p.memory.loss
    assert allocated_peak(work) == pytest.approx(expected, rel=0.1)


def test_the_planned_checkpoint_is_what_is_written(lora_run):
    trained = sum(t.numel() for t in load_file(lora_run / "step-00000004" / "adapter_model.safetensors").values())
    written = sum(f.stat().st_size for f in (lora_run / "step-00000004").rglob("*.safetensors"))
    assert 12 * trained <= written < 12 * trained + 50_000


def test_samples_of_the_run_are_those_of_the_checkpoint(lora_run):
    lines = [json.loads(line) for line in (lora_run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["step"] == 4][-1]
    llm = LLM.load(lora_run)
    text = llm.complete([[{"role": "user", "content": last["prompt"]}]], max_new_tokens=20, seed=last["seed"])[0].text
    assert text == last["text"]
