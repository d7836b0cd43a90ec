"""tritale teach on a tiny model: ordinary folders, answers that do what they were asked for, and a second call that repeats nothing."""

import json
from random import Random

import pytest
from runs import TINY

from tritale.cli.main import main
from tritale.common.files import read_json_object
from tritale.data.chat import encode_chats
from tritale.data.shards import write_split
from tritale.data.tokenizer import Tokenizer
from tritale.evaluation.story_measures import StoryMeasures
from tritale.inference import LLM
from tritale.inference.detokenizer import Completion
from tritale.instructions.samples import read_samples

NAMES, PLACES = "小兔 小狗 小猫 小熊 小鸟 小羊".split(), "公园 河边 山上 学校 森林 田里".split()
THINGS = "苹果 气球 帽子 雨伞 铃铛 风筝".split()


def short_story(rng: Random) -> str:
    name, place, thing = rng.choice(NAMES), rng.choice(PLACES), rng.choice(THINGS)
    end = rng.choice((f"{name}说：“真好！”", f"{name}很高兴。", f"{name}把{thing}带回家。"))
    return f"{name}去{place}玩。{name}看见了{thing}。{end}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the tiny model on stories of three sentences, and its flags for another training."""
    folder = tmp_path_factory.mktemp("teach")
    rng = Random(5)
    texts = sorted({short_story(rng) for _ in range(3000)})
    rng.shuffle(texts)
    tokenizer = Tokenizer.train(texts, 400)
    tokenizer.save(folder / "stories" / "tokenizer")
    write_split(folder / "stories" / "train", texts[:-80], tokenizer)
    write_split(folder / "stories" / "validation", texts[-80:], tokenizer)
    keys = {k: v for k, v in TINY.items() if not k.startswith(("data.", "train.max", "train.ch", "train.val"))}
    keys |= {"train.global_batch": 8, "train.micro_batch": 8, "optim.lr": 0.01, "optim.embedding_lr": 0.03, "train.validate_every": 1000}
    keys |= {"log.every": 50, "log.prompts": "['写一个故事。']"}
    flags = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    source = ["--data.source", str(folder / "stories"), "--out_dir", str(folder / "run"), "--train.max_steps", "120"]
    main(["train", *flags, *source, "--model.context", "128"])
    flags = [part for pair in zip(flags[::2], flags[1::2], strict=True) if not pair[0].startswith("--model") for part in pair]
    return folder / "run", flags


def test_each_stage_is_an_ordinary_folder_and_a_second_call_repeats_nothing(run, tmp_path, capsys):
    base, flags = run
    out = tmp_path / "taught"
    sizes = "--copies 300 --conversations 2000 --steps 15 160 --held-out 40"
    command = ["teach", str(base), "--out", str(out), *sizes.split()]
    main([*command, *flags])
    printed = capsys.readouterr().out
    assert printed.count("\n$ tritale ") == 6 and "minutes." in printed
    report = json.loads((out / "evaluation" / "evaluate.json").read_text(encoding="utf-8"))
    assert [row["is_asked"] for row in report["models"]] == [False, True]
    before, after = (row["together"]["1"]["rate"] for row in report["models"])
    assert before < after

    copied = read_json_object(out / "copying" / "step-00000015" / "trainer" / "trainer.json", remedy="")["config"]
    assert copied["data.source"] == str(out / "copies") and copied["data.replay"] == str(base.parent / "stories")

    html = (out / "teach.html").read_text(encoding="utf-8")
    assert "tritale teach" in html and "copying" in html and "--steps" not in html

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name not in ("teach.json", "teach.html")}
    capsys.readouterr()
    main([*command, *flags])
    printed = capsys.readouterr().out
    assert printed.count("is finished") == 6 and "$ tritale" not in printed
    (out / "evaluation" / "evaluate.json").unlink()
    main([*command, *flags])
    assert capsys.readouterr().out.count("\n$ tritale ") == 1
    later = {path: path.stat().st_mtime_ns for path in times}
    assert {path.parent.name for path in times if later[path] != times[path]} == {"evaluation"}
    with pytest.raises(SystemExit, match="is that of other options"):
        main([*command, *flags, "--optim.lr", "0.1"])
    with pytest.raises(SystemExit, match="was not made by tritale teach"):
        main(["teach", str(base), "--out", str(out / "sft"), *flags])

    answers = tmp_path / "answers"
    model = str(out / "sft" / "step-00000160")
    main(["pairs", model, "--data", str(base.parent / "stories"), "--out", str(answers), "--asked", "60"])
    best = read_samples(answers / "best.jsonl")
    assert best and len({sample.story for sample in best}) > 1
    for sample in best:
        assert all(verdict.is_met for verdict in sample.judge(sample.story)) and sample.story.endswith(("。", "”"))
    pairs = [json.loads(line) for line in (answers / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    by_prompt = {json.dumps(list(sample.prompt)): sample.story for sample in best}
    assert pairs and all(by_prompt[json.dumps(pair["prompt"])] == pair["chosen"] != pair["rejected"] for pair in pairs)
    main(["prepare", "--task", "dpo", "--input", str(answers / "pairs.jsonl"), "--tokenizer", model, "--out", str(tmp_path / "dpo")])


def test_pairs_leaves_out_conversations_longer_than_the_context(run, tmp_path, monkeypatch):
    """Of three instructions the best answer fits exactly, is one token too long, and fits beside a lowest one that is too long."""
    base, _ = run
    tokenizer = Tokenizer.load(base / "step-00000120")
    lines = read_samples_of("小兔", "小狗", "小猫")
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    def answer(i: int, n_tokens: int, text: str) -> str:
        for length in range(1, 200):
            messages = [lines[i]["messages"][0], {"role": "assistant", "content": text + "玩" * length}]
            if len(encode_chats(tokenizer, [messages])[0][0]) == n_tokens:
                return messages[1]["content"]
        raise AssertionError(n_tokens)

    long = [answer(0, 128, "小兔"), answer(1, 129, "小狗"), answer(2, 129, "天黑了")]
    texts = [long[0], "天黑了。", long[1], "天黑了。", "小猫在河边。", long[2]]
    done = lambda text: Completion(text, [], "end")
    monkeypatch.setattr(LLM, "write", lambda self, asked, samplings: ((i, "", done(text)) for i, text in enumerate(texts)))
    monkeypatch.setattr(StoryMeasures, "story", lambda self, prompt, text, is_complete: {"is_coherent": True})
    data = str(base.parent / "stories")
    main(["pairs", str(base), "--data", data, "--instructions", str(tmp_path / "asked.jsonl"), "--samples", "2", "--out", str(tmp_path)])
    assert [sample.story for sample in read_samples(tmp_path / "best.jsonl")] == [long[0], "小猫在河边。"]
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [(long[0], "天黑了。")]


def read_samples_of(*names: str) -> list[dict]:
    """An instruction for each name, which the story must contain."""
    asked = lambda name: [{"role": "user", "content": f"写一个{name}的故事。"}, {"role": "assistant", "content": name}]
    return [{"messages": asked(name), "requirements": [{"kind": "words", "words": [name]}]} for name in names]
