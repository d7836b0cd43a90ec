"""A sweep measures what each checkpoint's own weights do; its sentences say what its figures say; what cannot work is named."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import threading

import pytest
import torch
from rich.console import Console
from runs import metrics
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tritale.cli.main import main
from tritale.cli.options import read_prompts
from tritale.cli.sweep import table
from tritale.common.run_folder import step_folders
from tritale.data.shards import Split
from tritale.evaluation.sweep import REPEATS, Sweep, every_nth, findings, first_step_that_lasts
from tritale.evaluation.trained_run import TrainedRun
from tritale.evaluation.validation import part, validate
from tritale.inference import LLM, Sampling
from tritale.model.checkpoint import read_json, write_checksums
from tritale.training import state

SHORT = ["--samples", "2", "--max-new-tokens", "12"]


@pytest.fixture
def run_dir(tiny_run, tmp_path):
    """A copy of the tiny run, whose checkpoints are of steps 3 and 6. It has no checksums, since tests change its files."""
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("checksums.json"))


def report_of(folder) -> dict:
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))


def test_each_checkpoint_is_measured_with_its_own_weights(run_dir, seed, capsys):
    main(["sweep", str(run_dir), *SHORT, "--seed", str(seed)])
    report = report_of(run_dir)
    told = {line["step"]: line["val_bits_per_char"] for line in metrics(run_dir) if "val_bits_per_char" in line}
    assert [row["step"] for row in report["checkpoints"]] == [3, 6]
    for row in report["checkpoints"]:
        assert row["val_bits_per_char"] == pytest.approx(told[row["step"]], rel=1e-4)  # the trainer's own figure
        llm = LLM.load(run_dir / f"step-{row['step']:08d}", device="cpu")
        prompts = [story["prompt"] for story in row["stories"]]
        assert prompts == [prompt for prompt in report["prompts"] for _ in range(2)]
        alone = [llm.generate(p, max_new_tokens=12, seed=seed + i) for i, p in enumerate(prompts)]  # sweep's defaults are generate's
        assert [story["text"] for story in row["stories"]] == alone
    first, last = report["checkpoints"]
    assert [s["text"] for s in first["stories"]] != [s["text"] for s in last["stories"]]
    printed = capsys.readouterr().out
    assert "bits" in printed and all(finding in printed for finding in report["findings"])


def test_a_second_sweep_says_the_same_and_replaces_the_first(run_dir):
    main(["sweep", str(run_dir), *SHORT])
    first, inode = (run_dir / "sweep.json").read_bytes(), (run_dir / "sweep.json").stat().st_ino
    with pytest.raises(SystemExit, match=r"an earlier sweep wrote .*; give --overwrite"):
        main(["sweep", str(run_dir), *SHORT])
    assert (run_dir / "sweep.json").stat().st_ino == inode
    main(["sweep", str(run_dir), *SHORT, "--overwrite"])
    assert (run_dir / "sweep.json").read_bytes() == first and (run_dir / "sweep.json").stat().st_ino != inode
    assert not list(run_dir.glob(".sweep*"))


@pytest.mark.parametrize(("answer", "is_replaced"), [("y\n", True), ("\n", False), ("", False)])
def test_at_a_terminal_it_asks_before_it_replaces_an_earlier_sweep(run_dir, monkeypatch, capsys, answer, is_replaced):
    (run_dir / "sweep.json").write_text('{"format": "tritale-sweep"', encoding="utf-8")  # cut off
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with contextlib.nullcontext() if is_replaced else pytest.raises(SystemExit, match="nothing was measured"):
        main(["sweep", str(run_dir), *SHORT, "--every", "2"])
    assert (run_dir / "sweep.html").exists() == is_replaced
    assert "of an earlier sweep? [y/N]" in " ".join(capsys.readouterr().err.split())


def test_print_shows_every_story_and_prompts_come_from_standard_input(run_dir, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("小[b]\n[/x]\n".encode())))
    main(["sweep", str(run_dir), "--prompts", "-", "--samples", "1", "--max-new-tokens", "5", "--print"])
    printed = capsys.readouterr().out
    report = report_of(run_dir)
    assert report["prompts"] == ["小[b]", "[/x]"]
    stories = [(row["step"], story) for row in report["checkpoints"] for story in row["stories"]]
    assert len(stories) == 4
    for step, story in stories:
        assert f"step {step}\n{story['prompt']}{story['text']}\n" in printed
    assert "sample 1 of 1" not in printed and "sample single" in (run_dir / "sweep.html").read_text(encoding="utf-8")


def test_the_table_fits_into_80_columns_without_cut_words(tmp_path):
    rows = [row(1_000_000, 0.3, 0.1), row(2_000_000, 0.9999, 1.0)]
    more = {
        "longest_loop": 444,
        "distinct_1": 0.1,
        "distinct_2": 0.2,
        "distinct_3": 0.3,
        "length": 1000,
        "ends_properly": 1,
        "consistent": 1,
    }
    rows = [r | more for r in rows]
    reference = {k: v for k, v in rows[0].items() if k not in ("step", "val_bits_per_char")}
    console = Console(width=80, file=(output := io.StringIO()))
    console.print(table({"checkpoints": rows, "reference": reference, "checks_cast": True}))
    printed = output.getvalue()
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in printed and "-\n" not in printed
    assert all(word in printed for word in ("repeated", "distinct", "coherent", "copied", "held-out", "2,000,000", "0.10 0.20 0.30"))


def test_each_nth_checkpoint_and_the_last_are_taken(tmp_path):
    checkpoints = {1000 * i: tmp_path / f"step-{1000 * i:08d}" for i in range(1, 210)}
    assert list(every_nth(checkpoints, 20)) == [*range(20_000, 210_000, 20_000), 209_000]
    assert list(every_nth(checkpoints, 1)) == list(checkpoints)
    assert list(every_nth(checkpoints, 500)) == [209_000]
    with pytest.raises(ValueError, match="at least 1"):
        every_nth(checkpoints, 0)


def test_part_of_a_split_is_judged_like_the_split(tiny_run):
    llm, split = LLM.load(tiny_run / "step-00000006", device="cpu"), Split.open(tiny_run / "data" / "validation")
    sizes = {"context": 64, "micro_batch": 2, "document_mask": True}
    assert part(split, llm.tokenizer, split.n_documents) is split
    some = part(split, llm.tokenizer, 3)
    texts = [llm.tokenizer.decode(split.document(i).tolist()) for i in (0, 3, 7)]  # first, last and one between of 8
    assert some.n_documents == 3 and some.characters == sum(map(len, texts))
    documents = [split.document(i).tolist() for i in (0, 3, 7)]
    nats = 0.0
    with torch.no_grad():
        for ids in documents:
            ids = torch.tensor([*ids, llm.tokenizer.eot_id])
            for piece in range(0, len(ids) - 1, 64):
                window = ids[piece : piece + 65]
                nats += llm.model(window[None, :-1], window[None, 1:], reduction="sum").item()
    loss, bits = validate(llm.model, some, **sizes)
    assert loss == pytest.approx(nats / sum(map(len, documents)), rel=1e-4)
    assert bits == pytest.approx(nats / 0.6931471805599453 / some.characters, rel=1e-4)


def row(step: int, repeated: float, coherent: float, n: int = 16) -> dict:
    return {
        "step": step,
        "repeated_4grams": repeated,
        "coherent": coherent,
        "val_bits_per_char": 1 / step,
        "overlap": 20,
        "stories": [{}] * n,
    }


ABOUT = {"validation": {"entropy_bits_per_char": None}, "checks_cast": True, "shortest_coherent": 112}
REAL = {"repeated_4grams": 0.016, "overlap": 31.4}


def test_the_sentence_names_the_step_from_which_repetition_stays_low():
    rows = [row(20_000, 0.3, 0.1), row(40_000, 0.04, 0.3), row(60_000, 0.09, 0.6), row(80_000, 0.049, 0.4), row(100_000, 0.01, 0.8)]
    said = "\n".join(findings(rows, REAL, ABOUT))
    assert "Repetition falls below 5% of all 4-grams from step 80,000 on" in said  # 40,000 was an accident
    assert "Coherent from step 100,000 on: at least 75%" in said
    still = "\n".join(findings(rows[:3], REAL, ABOUT))
    assert "Repetition is still 9.0%" in still and "Coherent from step 60,000 on: at least 50%" in still
    always = "\n".join(findings([row(1, 0.01, 0.8), *rows[-1:]], REAL, ABOUT))
    assert "at every measured checkpoint" in always and "has at least 112 characters" in always
    assert "Not coherent yet: 30%" in "\n".join(findings(rows[:2], REAL, ABOUT))
    assert (
        first_step_that_lasts(rows, lambda r: r["repeated_4grams"] < REPEATS) == 80_000
        and first_step_that_lasts(rows[:1], lambda r: False) is None
    )


def test_a_looping_model_is_told_from_one_that_writes_stories(tiny_run):
    sweep = Sweep(TrainedRun.open(tiny_run), prompts=["小兔"], samples=1, sampling=Sampling(max_new_tokens=4))
    real = sweep.run.split("train", sweep.llm.tokenizer)
    text = sweep.llm.tokenizer.decode(real.document(5).tolist())
    loop = sweep._story("", 0, "他们有了新朋友。" * 20, 100, is_complete=True)
    assert loop["repeated_4grams"] > 0.9 and loop["loop"] == [0, 160, "他们有了新朋友。"] and not loop["is_coherent"]
    told = sweep._story("", 0, text, 100, is_complete=True)
    assert told["is_coherent"] and told["overlap"] == [0, len(text)]  # a story of the training text is found to be copied whole
    assert not sweep._story("", 0, text, 100, is_complete=False)["ends_properly"]  # cut off by the context
    assert sweep.reference["consistent"] == 1 and sweep.reference["repeated_4grams"] < 0.1


def test_a_few_characters_or_people_of_the_prompt_alone_are_no_coherent_story(tiny_run):
    sweep = Sweep(TrainedRun.open(tiny_run), prompts=["小兔"], samples=1, sampling=Sampling(max_new_tokens=4))
    assert 100 < sweep.about["shortest_coherent"] < 175  # the generator's stories have 220 to 350 characters
    short = sweep._story("", 0, "从前，豆豆爱画画。", 9, is_complete=True)
    assert short["is_consistent"] and short["ends_properly"] and not short["is_coherent"]
    unnamed = sweep._story("小兔和小熊是好朋友，", 0, "天黑了。", 9, is_complete=True)
    assert unnamed["cast"]["heroes"] and not unnamed["is_consistent"]
    nobody = sweep._story("", 0, "喜欢挖土。", 9, is_complete=True)
    assert not nobody["is_consistent"] and not nobody["is_coherent"]


def spoil(checkpoint) -> None:
    """Multiply all weights of a checkpoint by NaN."""
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: w * math.nan for name, w in weights.items()}, checkpoint / "model.safetensors", {"format": "pt"})
    write_checksums(checkpoint)


@pytest.mark.parametrize("step", [3, 6])
def test_a_checkpoint_that_is_not_finite_is_left_out_and_named(run_dir, capsys, step):
    spoil(run_dir / f"step-{step:08d}")
    main(["sweep", str(run_dir), *SHORT])
    report = report_of(run_dir)
    assert [r["step"] for r in report["checkpoints"]] == [9 - step]
    assert list(report["left_out"]) == [f"step-{step:08d}"] and "validation is nan" in report["left_out"][f"step-{step:08d}"]
    assert f"step-{step:08d} is left out" in capsys.readouterr().out
    assert "validation is nan" in (run_dir / "sweep.html").read_text(encoding="utf-8")


def test_a_run_without_one_finite_checkpoint_is_said_and_leaves_no_file(run_dir):
    for step in (3, 6):
        spoil(run_dir / f"step-{step:08d}")
    with pytest.raises(SystemExit, match=r"could be measured.*step-00000003: its validation is nan"):
        main(["sweep", str(run_dir), *SHORT])
    assert not list(run_dir.glob("sweep.*"))


@pytest.mark.parametrize("command", [["sweep"], ["average", "--last", "2"]])
def test_a_run_whose_config_is_not_there_is_said(run_dir, command):
    file = run_dir / "step-00000006" / "trainer" / "trainer.json"
    trainer = json.loads(file.read_text(encoding="utf-8"))
    whole = trainer.pop("config")
    for content in (trainer, trainer | {"config": {k: v for k, v in whole.items() if k != "data.source"}}):
        file.write_text(json.dumps(content), encoding="utf-8")
        write_checksums(file.parent)
        with pytest.raises(SystemExit, match=r"lacks the run's config .*data.source is missing.*move step-00000006 away"):
            main([command[0], str(run_dir), *command[1:]])


def test_a_context_beyond_the_models_is_said(run_dir):
    file = run_dir / "step-00000006" / "trainer" / "trainer.json"
    trainer = json.loads(file.read_text(encoding="utf-8"))
    trainer["config"]["train.context"] = 10**9
    file.write_text(json.dumps(trainer), encoding="utf-8")
    write_checksums(file.parent)
    with pytest.raises(SystemExit, match=r"trainer.json has a train.context of 1000000000, longer than the model's \(\d+\)"):
        main(["sweep", str(run_dir), *SHORT])


def test_a_damaged_checkpoint_is_left_out_and_named(run_dir, capsys):
    weights = run_dir / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (run_dir / ".step-00000009.0123abcd.tmp").mkdir()
    main(["sweep", str(run_dir), *SHORT])
    report = report_of(run_dir)
    assert [r["step"] for r in report["checkpoints"]] == [6] and list(report["left_out"]) == ["step-00000003"]
    printed = capsys.readouterr().out
    assert "step-00000003 is left out" in printed and "step-00000009 is incomplete" in printed


@pytest.mark.parametrize("command", [["sweep"], ["average", "--last", "2"]])
def test_what_is_not_a_run_is_said(tiny_run, tmp_path, command):
    def message(folder) -> str:
        with pytest.raises(SystemExit) as error:
            main([command[0], str(folder), *command[1:]])
        return str(error.value)

    assert "is not a folder" in message(tmp_path / "nowhere")
    assert "is a checkpoint, not a run" in message(tiny_run / "step-00000006")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no checkpoints" in message(empty)
    (empty / ".step-00000003.0123abcd.tmp").mkdir()
    assert "step-00000003 is being written" in message(empty)
    assert "is being written or was left" in message(empty / ".step-00000003.0123abcd.tmp")


def test_prompts_that_cannot_be_used_are_said(tiny_run, tmp_path):
    def message(content: bytes | None) -> str:
        file = tmp_path / "prompts.txt"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(SystemExit) as error:
            main(["sweep", str(tiny_run), "--prompts", str(file)])
        return str(error.value)

    assert "is not a file" in message(None)
    assert "has no prompts" in message(b"") and "has no prompts" in message(b" \n\n")
    assert "is not UTF-8" in message("小兔".encode("gb18030"))
    assert "context" in message(("小兔" * 300).encode())
    good = tmp_path / "good.txt"
    good.write_text("﻿小兔\r\n\r\n汤姆和杰瑞是好朋友，\n小兔\n", encoding="utf-8")
    assert read_prompts(str(good)) == ["小兔", "汤姆和杰瑞是好朋友，"]
    good.write_bytes("小\u2028兔\r大\n".encode())  # a prompt may contain other line separators
    assert read_prompts(str(good)) == ["小\u2028兔", "大"]


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_prompts_come_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("小兔\n",), kwargs={"encoding": "utf-8"})
    writer.start()
    assert read_prompts(str(tmp_path / "pipe")) == ["小兔"]  # as bash's <(…)
    writer.join()


def test_settings_and_files_that_cannot_work_are_said_before_the_work(run_dir):
    for options, said in (
        (["--every", "0"], "at least 1"),
        (["--samples", "0"], "at least 1"),
        (["--top-p", "2"], "top_p is 2.0"),
        (["--data", str(run_dir / "none")], "give --data"),
    ):
        with pytest.raises(SystemExit, match=re.escape(said)):
            main(["sweep", str(run_dir), *options])
    (run_dir / "sweep.html").write_text("my own notes", encoding="utf-8")
    with pytest.raises(SystemExit, match="not the result of tritale sweep"):
        main(["sweep", str(run_dir)])
    assert (run_dir / "sweep.html").read_text(encoding="utf-8") == "my own notes" and not (run_dir / "sweep.json").exists()


def test_a_run_of_litgpt_is_swept_after_its_import(tiny_run, tmp_path):
    for step in (3, 6):
        folder = f"step-{step:08d}"
        main(["export", str(tiny_run / folder), "--to", "litgpt", "--out", str(tmp_path / "lit" / folder)])
    with pytest.raises(SystemExit, match=r"is a litgpt checkpoint; convert it first: tritale import .* --from litgpt"):
        main(["sweep", str(tmp_path / "lit")])
    imported = tmp_path / "imported"
    main(["import", str(tmp_path / "lit"), "--from", "litgpt", "--out", str(imported)])
    with pytest.raises(SystemExit, match=r"was imported without its data; .* --data"):
        main(["sweep", str(imported)])
    main(["sweep", str(imported), "--data", str(tiny_run / "data"), *SHORT])
    report, llm = report_of(imported), LLM.load(tiny_run / "step-00000006", device="cpu")
    last, split = report["checkpoints"][-1], Split.open(tiny_run / "data" / "validation")
    assert [row["step"] for row in report["checkpoints"]] == [3, 6] and report["checks_cast"] is False
    texts = [llm.tokenizer.decode(split.document(i).tolist()) for i in range(split.n_documents)]
    bits = sum(len(text) * llm.bits_per_char(text) for text in texts) / sum(map(len, texts))
    assert last["val_bits_per_char"] == pytest.approx(bits, rel=1e-5)
    assert [story["text"] for story in last["stories"]] == [llm.generate("", max_new_tokens=12, seed=i) for i in range(2)]
    with pytest.raises(SystemExit, match="was imported; an average needs"):
        main(["average", str(imported), "--last", "2"])


# ---- average ------------------------------------------------------------------------------------------------------------------------


def test_the_average_is_the_mean_of_the_weights_and_a_whole_checkpoint(run_dir, capsys):
    main(["average", str(run_dir), "--last", "2"])
    out = run_dir / "average-00000006-last2"
    ours, first, last = (LLM.load(folder, device="cpu") for folder in (out, run_dir / "step-00000003", run_dir / "step-00000006"))
    for name, p in ours.model.named_parameters():
        a, b = first.model.get_parameter(name), last.model.get_parameter(name)
        torch.testing.assert_close(p, (a.double() + b.double()).div(2).float(), atol=1e-7, rtol=1e-6)
        assert not torch.equal(a, b)
    theirs, ids = AutoModelForCausalLM.from_pretrained(out), torch.randint(4, 500, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids), atol=1e-4, rtol=1e-4)

    about, split = read_json(out, "average.json"), Split.open(run_dir / "data" / "validation")
    sizes = {"context": 64, "micro_batch": 2, "document_mask": True}
    assert about["steps"] == [3, 6] and about["last"]["step"] == 6
    assert about["val_bits_per_char"] == pytest.approx(validate(ours.model, split, **sizes)[1], rel=1e-5)
    assert about["last"]["val_bits_per_char"] == pytest.approx(validate(last.model, split, **sizes)[1], rel=1e-5)
    printed = capsys.readouterr().out
    assert f"{about['val_bits_per_char']:.4f}" in printed and f"{about['last']['val_bits_per_char']:.4f}" in printed


def test_an_average_is_no_checkpoint_to_resume_from(tiny_run, tmp_path):
    run_dir = shutil.copytree(tiny_run, tmp_path / "run")
    before = step_folders(run_dir), state.newest_complete(run_dir, warn=pytest.fail)
    main(["average", str(run_dir), "--last", "2"])
    state.remove_leftovers(run_dir)
    state.remove_old(run_dir, newest=10**8, keep_last=2, best_step=None)
    assert (step_folders(run_dir), state.newest_complete(run_dir, warn=pytest.fail)) == before
    assert list(TrainedRun.open(run_dir).checkpoints) == [3, 6] and (run_dir / "average-00000006-last2").is_dir()
    with pytest.raises(SystemExit, match="exists and is not overwritten"):
        main(["average", str(run_dir), "--last", "2"])


@pytest.mark.parametrize(("last", "said"), [("5", "has 2 checkpoints"), ("1", "at least 2")])
def test_an_average_of_too_few_is_refused(run_dir, last, said):
    with pytest.raises(SystemExit, match=said):
        main(["average", str(run_dir), "--last", last])
    assert not list(run_dir.glob("*average*"))


def test_weights_that_are_not_finite_are_not_averaged(run_dir):
    spoil(run_dir / "step-00000003")
    with pytest.raises(SystemExit, match="step-00000003 has weights that are not finite"):
        main(["average", str(run_dir), "--last", "2"])
    assert not list(run_dir.glob("*average*"))


def test_checkpoints_of_another_shape_are_not_averaged(run_dir):
    config = run_dir / "step-00000003" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"rope_theta": 10000.0', '"rope_theta": 500.0'), encoding="utf-8")
    write_checksums(config.parent)
    with pytest.raises(SystemExit, match="another shape"):
        main(["average", str(run_dir), "--last", "2"])
    assert not list(run_dir.glob("*average*"))
