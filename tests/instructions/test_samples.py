"""Samples are a function of the seed, fit into the context, meet their own requirements, and share no story between the splits."""

import json
from pathlib import Path
from random import Random

import pytest

from tritale.cli.main import main
from tritale.common.errors import UserError
from tritale.data.built_in import write_built_in
from tritale.data.chat import encode_chats, mark
from tritale.data.shards import write_split
from tritale.data.tokenizer import Tokenizer
from tritale.instructions.copies import COPIES
from tritale.instructions.derive import split_sentences
from tritale.instructions.requirements import FEATURES, FIELDS
from tritale.instructions.samples import HELD_OUT, TRAIN, Sample, fitting, make_samples, make_summaries, open_stories, read_samples
from tritale.stories.generator import story


@pytest.fixture(scope="module")
def built_in(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built-in") / "data"
    write_built_in(folder, seed=7, stories=300, validation_stories=20, vocab_size=1500)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A data folder without a recipe: its stories are texts of unknown origin."""
    folder = tmp_path_factory.mktemp("plain")
    texts = [story(11, i).text for i in range(230)]
    tokenizer = Tokenizer.train(texts, 1500)
    tokenizer.save(folder / "tokenizer")
    write_split(folder / "train", texts[:200], tokenizer)
    write_split(folder / "validation", texts[200:], tokenizer)
    return folder


@pytest.mark.parametrize("kind", ["built_in", "plain"])
def test_every_story_meets_what_it_was_asked_for_and_no_story_is_in_both_splits(kind, request, seed):
    folder = request.getfixturevalue(kind)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    train, held_out = (list(make_samples(s, 150, seed=seed, tokenizer=tokenizer, context=250)) for s in open_stories(folder))
    assert not {s.story for s in train} & {s.story for s in held_out}
    for sample in train + held_out:
        assert 1 <= len(sample.requirements) <= 3 and len({r.kind for r in sample.requirements}) == len(sample.requirements)
        assert all(verdict == (True, 1) for verdict in sample.judge(sample.story)), sample
        assert sample.is_built_in == (kind == "built_in")
        assert len(encode_chats(tokenizer, [sample.messages])[0][0]) <= 250
    kinds = {r.kind for s in train for r in s.requirements}
    assert kinds == (set(FIELDS) if kind == "built_in" else {"words", "feature", "sentence", "length", "beginning"})
    orders = {tuple(r.kind for r in s.requirements) for s in train if len(s.requirements) == 2}
    assert any(order[::-1] in orders for order in orders)


def test_a_place_has_the_same_tokens_in_the_instruction_and_in_the_story(built_in, seed):
    """A small model copies tokens; 公园 and 公园里 have none in common."""
    tokenizer = Tokenizer.load(built_in / "tokenizer")
    found = []
    for sample in make_samples(open_stories(built_in)[0], 400, seed=seed):
        ids = tokenizer.encode(sample.story)
        places = [tokenizer.encode(r.text) for r in sample.requirements if r.kind == "place"]
        found += [any(ids[i : i + len(place)] == place for i in range(len(ids))) for place in places]
    assert len(found) > 40 and sum(found) > 0.9 * len(found)


def test_a_required_word_has_its_own_tokens_in_the_story(built_in, seed):
    """高兴 in the instruction and 高兴得 in the story may have no token in common."""
    tokenizer, found, found_without = Tokenizer.load(built_in / "tokenizer"), [], []
    for sample in make_samples(open_stories(built_in)[0], 300, seed=seed):
        answer = {"role": "assistant", "content": mark(sample.story, borders=sample.borders)}
        ((ids, _), (plain, _)) = encode_chats(tokenizer, [[answer], [sample.messages[-1]]])
        for word in (tokenizer.encode(word) for r in sample.requirements if r.kind == "words" for word in r.words):
            for ids_of, where in ((ids, found), (plain, found_without)):
                where.append(any(ids_of[i : i + len(word)] == word for i in range(len(ids_of))))
    assert len(found) > 80 and all(found) and sum(found_without) < 0.95 * len(found)


def test_emphasis_is_what_was_asked_for_and_where_the_plot_shows(built_in, plain, seed):
    for folder in (built_in, plain):
        for sample in make_samples(open_stories(folder)[0], 100, seed=seed):
            parts = [sample.story[begin:end] for begin, end in sample.emphasis]
            for r in sample.requirements:
                assert set(r.words or (r.text,)) <= {*parts, *FEATURES, ""} or r.kind == "summary", sample
            assert ("summary" in {r.kind for r in sample.requirements}) <= bool(parts)
            n_asked = sum(len(r.words) or (r.kind in ("place", "sentence", "beginning")) for r in sample.requirements)
            assert n_asked + 5 <= len(parts) < n_asked + 20 if folder == built_in else len(parts) == n_asked
            assert "emphasis" not in json.dumps(sample.to_json()["messages"]) and Sample.from_json(sample.to_json()) == sample


def test_a_summary_is_asked_for_with_what_tells_the_plot(built_in, plain, seed):
    train = open_stories(built_in)[0]
    samples = list(make_summaries(train, 400, seed=seed))
    assert samples == list(make_summaries(train, 400, seed=seed)) and len(samples) == 400
    n_alone = 0
    for i, sample in enumerate(samples):
        (text, found_by), asked = train.get(i % train.n), sample.prompt[0]["content"]
        assert sample.story == found_by(Random(0))["summary"].text
        assert "大意" in asked and sample.emphasis == [(0, len(sample.story))]
        sentences = [s for s in split_sentences(text) if s in asked]
        n_alone += len(sentences) == 1 and len(asked) < len(sentences[0]) + 20
    assert n_alone > 150
    assert list(make_summaries(open_stories(plain)[0], 10, seed=seed)) == []  # no summary is known of other texts


def test_held_out_built_in_stories_are_new_to_a_model_trained_on_the_folder(built_in):
    known = {story(7, i).text for i in range(300)}
    train, held_out = open_stories(built_in)
    assert not known & {held_out.get(i)[0] for i in range(100)}
    assert {train.get(i)[0] for i in range(300)} == known


def test_the_same_seed_gives_the_same_samples_and_another_one_others(plain):
    make = lambda seed, **more: list(make_samples(open_stories(plain)[0], 30, seed=seed, **more))
    assert make(1) == make(1) and make(1) != make(2)
    assert make(1)[:10] == list(make_samples(open_stories(plain)[0], 10, seed=1))
    index = list(FIELDS).index
    in_order = [[index(r.kind) for r in s.requirements] for s in make(1, in_order=True)]
    assert all(order == sorted(order) for order in in_order) and max(map(len, in_order)) == 3


def test_fewer_stories_than_samples_are_used_again_with_other_requirements(plain):
    samples = list(make_samples(open_stories(plain)[1], 120, seed=0))
    assert len(samples) == 120 and len({s.story for s in samples}) == 30
    assert len({s.messages[0]["content"] for s in samples}) > 100


def test_a_context_that_no_sample_fits_into_is_said(plain):
    tokenizer = Tokenizer.load(plain / "tokenizer")
    with pytest.raises(UserError, match="longer than the context of 64 tokens"):
        list(make_samples(open_stories(plain)[0], 10, seed=0, tokenizer=tokenizer, context=64))


def test_the_command_writes_samples_that_are_read_as_they_were(built_in, tmp_path, capsys):
    main(["instruct", str(built_in), "--out", str(tmp_path), "--samples", "40", "--held-out", "20", "--seed", "3"])
    train, held_out = open_stories(built_in)
    assert read_samples(tmp_path / TRAIN) == list(make_samples(train, 40, seed=3))
    assert read_samples(tmp_path / HELD_OUT) == list(make_samples(held_out, 20, seed=3))
    first = json.loads((tmp_path / TRAIN).read_text(encoding="utf-8").splitlines()[0])
    assert [m["role"] for m in first["messages"]] == ["user", "assistant"] and first["is_built_in"] is True
    assert "40 samples" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="must be at least 1"):
        main(["instruct", str(built_in), "--out", str(tmp_path), "--samples", "0"])
    with pytest.raises(SystemExit, match="is not a data folder"):
        main(["instruct", str(tmp_path), "--out", str(tmp_path)])


GOOD = {"messages": [{"role": "user", "content": "写一个故事。"}, {"role": "assistant", "content": "从前。"}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: Expecting property name"),
        ("[]", ":2: it is not an object with messages"),
        ("{}", ":2: messages is not a list"),
        (json.dumps(GOOD | {"messages": GOOD["messages"][:1]}), ":2: the last message is not an answer"),
        (json.dumps(GOOD | {"messages": [*GOOD["messages"][:1], {"role": "assistant", "content": " "}]}), ":2: the last message is not"),
        (json.dumps(GOOD | {"messages": [{"role": "robot", "content": "x"}]}), ":2: message 1 has the role 'robot'"),
        (json.dumps(GOOD | {"requirements": 3}), ":2: requirements is not a list"),
        (json.dumps(GOOD | {"requirements": [{"kind": "colour"}]}), ":2: kind is 'colour'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_samples(path)


def test_files_without_samples_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(FileNotFoundError, match="is not a file; make one with tritale instruct"):
        read_samples(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="has no samples"):
        read_samples(path)
    path.write_bytes("写一个故事".encode("gb18030"))
    with pytest.raises(UserError, match=":1: 'utf-8' codec"):
        read_samples(path)
    path.write_text(json.dumps(GOOD) + "\n\n", encoding="utf-8")
    assert read_samples(path) == [Sample(tuple(GOOD["messages"]))]


def test_exercises_fit_into_the_context(built_in, tmp_path, monkeypatch):
    """An altered sentence may have more tokens than before."""
    short, long = (Sample(({"role": "user", "content": "写。"}, {"role": "assistant", "content": "好" * n})) for n in (9, 400))
    tokenizer = Tokenizer.load(built_in / "tokenizer")
    ((ids, _),) = encode_chats(tokenizer, [long.messages])
    assert fitting([long, short], tokenizer, len(ids)) == [long, short] and fitting([long, short], tokenizer, len(ids) - 1) == [short]
    monkeypatch.setattr("tritale.instructions.copies.make_copies", lambda tokenizer, samples, seed: [short, long, short])
    sizes = ["--samples", "10", "--held-out", "5", "--copies", "3", "--context", "300"]
    main(["instruct", str(built_in), "--out", str(tmp_path), *sizes])
    assert read_samples(tmp_path / COPIES) == [short, short]
