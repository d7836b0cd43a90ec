"""Every format gives the same documents, and whatever is wrong is named with file and line."""

import bz2
import csv
import gzip
import importlib
import json
import lzma
import os
import random
import re
import sys
import types
from collections import Counter

import pytest

from tritale.cli.main import main
from tritale.common.errors import UserError
from tritale.data.prepare import inputs, readers
from tritale.data.prepare.checks import BadInput
from tritale.data.prepare.documents import Fields, Reader
from tritale.data.prepare.inputs import ZSTD, find_files

TEXT = Fields("text")


def draw_texts(seed: int, n: int = 40) -> list[str]:
    draw = random.Random(seed)
    alphabet = "一二三，。“”\"'\\é😀ab,\t{}[]"
    return ["甲" + "".join(draw.choices(alphabet, k=draw.randrange(1, 60))) + ("\n下一段" if draw.random() < 0.3 else "") for _ in range(n)]


def texts_of(*files, fields: Fields = TEXT, **options) -> list[str]:
    return [document.text for _, document in Reader([str(f) for f in files], fields, **options).read()]


def write(folder, name: str, texts: list[str]):
    path = folder / name
    kind = name.split(".")[1]
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if kind in ("jsonl", "ndjson"):
        data = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    elif kind == "json":
        data = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    elif kind in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            table.writerow(["id", " text"])
            table.writerows([row["id"], row["text"]] for row in rows)
        data = path.read_bytes()
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return path
    else:
        data = "\n \n\n".join(texts).encode() + b"\n"
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        zstd = importlib.import_module(ZSTD)
        data = zstd.compress(data[: len(data) // 2]) + zstd.compress(data[len(data) // 2 :])  # two frames
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.json", "a.json.zst", "a.csv", "a.tsv.gz", "a.parquet", "a.txt", "a.txt.zst"])
def test_every_format_gives_the_same_documents(tmp_path, name, seed, monkeypatch):
    if name.endswith("zst"):
        pytest.importorskip(ZSTD)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(readers, "CHUNK", 37)  # chunks end inside characters and values
    texts = draw_texts(seed)
    path = write(tmp_path, name, texts)
    assert texts_of(path) == texts
    skip = seed % len(texts)
    assert [d.text for _, d in Reader([str(path)], TEXT).read(0, skip)] == texts[skip:]


def test_json_lines_under_the_name_json_are_read(tmp_path, seed):
    texts = draw_texts(seed)
    path = write(tmp_path, "a.jsonl", texts).rename(tmp_path / "b.json")
    assert texts_of(path) == texts


def test_json_arrays_after_one_another_are_read(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 37)
    texts = draw_texts(seed)
    data = b"\n".join(write(tmp_path, "a.json", part).read_bytes() for part in (texts[:9], [], texts[9:]))
    (tmp_path / "a.json").write_bytes(data + b"\n")
    assert texts_of(tmp_path / "a.json") == texts


def test_a_byte_order_mark_is_no_text(tmp_path):
    files = ("a.jsonl", '{"text": "一"}'), ("a.json", '[{"text": "一"}]'), ("a.csv", "text\n一\n"), ("a.txt", "一")
    for name, data in (*files, ("b.csv", '"text","id"\n一,0\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data.encode())
        assert texts_of(tmp_path / name) == ["一"]


def test_a_txt_file_can_be_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("一\n\n二\n", encoding="utf-8")
    assert texts_of(tmp_path / "a.txt", fields=Fields(txt_documents="file")) == ["一\n\n二"]


STORIES = [f"从前有个孩子叫{i}号。\n\n他说：“你好！”\n" for i in range(30)]


@pytest.mark.parametrize("between", ["<|endoftext|>\n", "\n<|endoftext|>\r\n\r\n", "<|endoftext|>"])
def test_documents_between_endoftext_marks_are_recognised(tmp_path, between):
    (tmp_path / "a.txt").write_bytes(between.join(STORIES).encode() + between.encode())
    assert texts_of(tmp_path / "a.txt") == [story.rstrip() for story in STORIES]
    with pytest.raises(BadInput, match=r"a\.txt:\d+: a line with <\|endoftext\|>; --txt-documents endoftext"):
        texts_of(tmp_path / "a.txt", fields=Fields(txt_documents="blank-line"))


def test_an_endoftext_mark_far_into_a_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "BUFFER", 64)
    (tmp_path / "a.txt").write_text("一\n\n二\n\n" * 40 + "三<|endoftext|>四", encoding="utf-8")
    check_bad(tmp_path / "a.txt", r"a\.txt:161: a line with <\|endoftext\|>", kept=("一", "二") * 40, rest=161)


@pytest.mark.parametrize("data", ["一\n二\n三\n", "一\n" * 100 + "\n二\n", "一\r二", "一\n" * 100 + " \n二\n\n三"])
def test_a_txt_file_of_unclear_layout_asks(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data.encode())
    for skip_errors in (False, True):
        with pytest.raises(ValueError, match=r"a\.txt: is a document a line, .* choose --txt-documents line, blank-line or file"):
            texts_of(tmp_path / "a.txt", skip_errors=skip_errors)
    assert texts_of(tmp_path / "a.txt", fields=Fields(txt_documents="line")) == data.split()
    assert len(texts_of(tmp_path / "a.txt", fields=Fields(txt_documents="file"))) == 1


@pytest.mark.parametrize("mark", ["---", "*" * 10, "* * *", "————", "</s>", "<|end_of_text|>", "[SEP]", "====="])
@pytest.mark.parametrize("between", ["{}\n", "\n{}\n\n"])
def test_lines_that_may_separate_documents_are_asked_about(tmp_path, mark, between):
    (tmp_path / "a.txt").write_text(between.format(mark).join(STORIES), encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"29 lines of its start are {re.escape(mark)}; if .* replace them by <\|endoftext\|>; else choose"
    ):
        texts_of(tmp_path / "a.txt")
    assert len(texts_of(tmp_path / "a.txt", fields=Fields(txt_documents="blank-line"))) in (31, 89)
    (tmp_path / "b.txt").write_text("……\n\n".join(STORIES) + f"\n{mark}\n\n完", encoding="utf-8")  # a scene, an ellipsis
    assert len(texts_of(tmp_path / "b.txt")) > 60


@pytest.mark.parametrize("character, name", [("\f", "form feeds"), ("\u2028", "line separators"), ("\x85", "next lines")])
def test_other_characters_that_may_separate_documents_are_asked_about(tmp_path, character, name):
    (tmp_path / "a.txt").write_text(character.join(["从前有一只小兔。"] * 30), encoding="utf-8")
    with pytest.raises(UserError, match=rf"its start has 29 {name}.* and 1 lines; if documents are separated there, replace"):
        texts_of(tmp_path / "a.txt")


@pytest.mark.parametrize("blank", ["\u3000", "\xa0 "])
def test_a_line_of_chinese_spaces_is_blank(tmp_path, blank):
    (tmp_path / "a.txt").write_text(f"\n{blank}\n".join("一二三"), encoding="utf-8")
    assert texts_of(tmp_path / "a.txt") == list("一二三")


def test_few_endoftext_marks_among_many_blocks_are_asked_about(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(STORIES) + "<|endoftext|>完", encoding="utf-8")
    with pytest.raises(UserError, match=r"61 blocks .* and 1 of the marks; choose --txt-documents endoftext, or remove the marks"):
        texts_of(tmp_path / "a.txt")
    assert len(texts_of(tmp_path / "a.txt", fields=Fields(txt_documents="endoftext"))) == 2


@pytest.mark.parametrize("data", ['{"text": "一"}\n{"text": "二"}\n', '[{"text": "一"}, {"text": "二"}]', '[\n {\n  "text": "一"\n }\n]'])
def test_json_in_a_txt_file_is_named(tmp_path, data):
    (tmp_path / "a.txt").write_text(data, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt contains JSON; rename it to \.jsonl or \.json, or choose"):
        texts_of(tmp_path / "a.txt")
    assert texts_of(tmp_path / "a.txt", fields=Fields(txt_documents="file")) == [data.rstrip()]


@pytest.mark.parametrize("data", ['{"text": "一"}{"text": "二"}', '{\n "text": "一"\n}\n{\n "text": "二"\n}\n'])
def test_objects_over_several_lines_or_in_one_are_read_under_the_name_jsonl(tmp_path, data):
    (tmp_path / "a.jsonl").write_text(data, encoding="utf-8")
    assert texts_of(tmp_path / "a.jsonl") == ["一", "二"]


@pytest.mark.parametrize(
    "separator, advice", [(";", "if ; separates the columns, save the file with commas"), ("\t", "name the file .tsv")]
)
def test_another_separator_of_a_csv_file_is_named(tmp_path, separator, advice):
    (tmp_path / "a.csv").write_text(f"text{separator}id\n一{separator}1\n", encoding="utf-8")
    with pytest.raises(BadInput, match=rf"a\.csv:2: no key 'text'; keys there: .*{advice}"):
        texts_of(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_carriage_returns_end_lines(tmp_path, name):
    data = {"a.txt": "一\r\r二\r", "a.csv": "text\r一\r二\r", "a.jsonl": '{"text": "一"}\r{"text": "二"}\r'}[name]
    (tmp_path / name).write_bytes(data.encode())
    assert texts_of(tmp_path / name) == ["一", "二"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_under_the_name_jsonl_is_read(tmp_path, seed, name, indent):
    texts = draw_texts(seed)
    data = json.dumps([{"text": text} for text in texts], indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert texts_of(tmp_path / name) == texts


def test_upper_case_endings_are_unpacked(tmp_path, seed):
    pytest.importorskip(ZSTD)
    texts = draw_texts(seed)
    for name in ("a.jsonl.gz", "b.json.zst"):
        write(tmp_path, name, texts).rename(tmp_path / name.upper())
        assert texts_of(*find_files([str(tmp_path / name.upper())])) == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.zst", "a.csv.gz"])
def test_the_content_and_not_the_name_says_how_a_file_is_compressed(tmp_path, seed, name):
    zstd, texts = pytest.importorskip(ZSTD), draw_texts(seed)
    plain = write(tmp_path, name.removesuffix(".gz").removesuffix(".zst"), texts).read_bytes()
    for data in (plain, gzip.compress(plain), zstd.compress(plain)):
        (tmp_path / name).write_bytes(data)
        assert texts_of(tmp_path / name) == texts
    for kind, data in {"bz2": bz2.compress(plain), "xz": lzma.compress(plain), "zip": b"PK\3\4\x14\0\0\0" + plain}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} is a {kind} file under another name; unpack it"):
            texts_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "A.TXT.XZ", "a.csv.zip", "a.json.gzip"])
def test_a_file_of_another_compression_in_a_folder_is_named(tmp_path, name):
    for file in ("b.txt", "picture.zip", "notes.md.xz", name):
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name} is compressed in another way than \.gz and \.zst; unpack it"):
        find_files([str(tmp_path)])
    (tmp_path / name).unlink()
    assert find_files([str(tmp_path)]) == [str(tmp_path / "b.txt")]


def test_links_and_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_bytes(b"x")
    try:
        (tmp_path / "c.txt").symlink_to(tmp_path / "gone.txt")
    except OSError:
        pytest.skip("links are not allowed")
    with pytest.raises(FileNotFoundError, match=r"c\.txt is a link to a file that does not exist"):
        find_files([str(tmp_path)])
    (tmp_path / "c.txt").unlink()
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):  # root may read any folder
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        find_files([str(tmp_path)])


def test_zst_files_of_long_windows_are_read(tmp_path, seed):
    zstd, texts = pytest.importorskip(ZSTD), draw_texts(seed)
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(write(tmp_path, "a.jsonl", texts).read_bytes(), options=options))
    assert texts_of(tmp_path / "a.jsonl.zst") == texts


def test_a_template_builds_the_text_of_several_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"genre": "童话", "story": "从前", "n": 3}\n', encoding="utf-8")
    assert texts_of(tmp_path / "a.jsonl", fields=Fields(None, "{genre}：{story}{{{n}}}")) == ["童话：从前{3}"]
    for template in ("{story.__class__}", "{0[a]}", "{story!r}", "{story:>9}", "{", "plain"):
        if "." in template or "[" in template:  # names like any other: there is no such field
            with pytest.raises(BadInput, match="no key"):
                texts_of(tmp_path / "a.jsonl", fields=Fields(None, template))
        else:
            with pytest.raises(ValueError, match="--template"):
                Fields(None, template)


def test_files_folders_and_globs_are_found_in_order_and_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt", "sub/d.jpg", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = lambda *inputs: [path.removeprefix(f"{tmp_path}/") for path in find_files([f"{tmp_path}/{i}" for i in inputs])]
    assert names("") == ["a.jsonl.gz", "b.jsonl", "sub/c.txt"]
    assert names("b.jsonl", "*.jsonl*") == ["b.jsonl", "a.jsonl.gz"]
    assert names("**/*.txt") == ["sub/c.txt"]
    assert names("b.jsonl", "./sub/../b.jsonl") == ["b.jsonl"]
    hidden = tmp_path / "sub" / ".ipynb_checkpoints" / "c-checkpoint.txt"
    hidden.parent.mkdir()
    hidden.write_bytes(b"x")
    assert names("") == ["a.jsonl.gz", "b.jsonl", "sub/c.txt"]
    for missing in ("none.jsonl", "*.csv"):
        with pytest.raises(FileNotFoundError, match=missing.replace("*", r"\*")):
            names(missing)
    with pytest.raises(ValueError, match=r"d\.jpg has an unknown format"):
        names("sub/d.jpg")
    name = os.fsdecode("故事.txt".encode("gbk"))
    try:
        (tmp_path / name).write_bytes(b"x")
    except OSError:
        return  # a file system that takes UTF-8 alone
    for argument in ("", name):
        with pytest.raises(ValueError, match=r"the name of the file .* is not UTF-8; rename it"):
            names(argument)


@pytest.mark.parametrize("fields", [{"text_key": "story"}, {"template": "{genre}：{story}"}, {"group_key": "theme"}])
def test_an_option_about_fields_is_refused_for_txt(fields):
    fields = Fields(**fields)
    fields.check(["a.csv", "someone/stories"])
    Fields().check(["a.csv", "b.txt"])
    with pytest.raises(ValueError, match=r"--(text-key|template|group-key) '.*' names a field, but b\.txt\.gz is plain text"):
        fields.check(["a.csv", "b.txt.gz"])


def test_prepare_refuses_a_group_key_for_txt_and_writes_nothing(tmp_path):
    write(tmp_path, "a.txt", ["一", "二"])
    with pytest.raises(SystemExit, match=r"tritale prepare: --group-key 'theme' names a field, but .*a\.txt is plain text"):
        main(["prepare", "--input", str(tmp_path), "--group-key", "theme", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_name_of_a_data_set_is_read_as_a_stream(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    write(tmp_path, "a.jsonl", ["一", "二"])
    load, asked = datasets.load_dataset, []

    def load_local(name, **options):  # no network: the same library, from a file
        asked.append(name)
        return load("json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    assert find_files(["someone/stories"]) == ["someone/stories"]
    assert texts_of("someone/stories") == ["一", "二"] and asked == ["someone/stories"]


# ---- bad input ------------------------------------------------------------------------------------------------------------------------


def check_bad(path, message: str, fields: Fields = TEXT, kept: tuple = (), rest: int | None = None, n_errors: int = 1) -> None:
    """It stops with `message`; with skip_errors it is counted and `kept` remains, and `rest` is named where all from there is lost."""
    with pytest.raises(BadInput, match=message):
        texts_of(path, fields=fields)
    reader = Reader([str(path)], fields, skip_errors=True)
    assert tuple(document.text for _, document in reader.read()) == kept
    assert sum(reader.errors.values()) == n_errors, reader.errors
    assert str(path) in reader.first_errors[0]
    assert rest is None or f": the rest of the file from {path}:{rest} on" in next(iter(reader.errors)), reader.errors


def test_broken_json_names_its_line(tmp_path, seed):
    line = random.Random(seed).randrange(1, 3000)
    lines = ['{"text": "一"}'] * 3000
    lines[line - 1] = '{"text": "一'
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    check_bad(tmp_path / "a.jsonl", rf"a\.jsonl:{line}: broken JSON", kept=("一",) * 2999)


@pytest.mark.parametrize("chunk", [37, 1 << 20])
def test_after_a_broken_line_under_the_name_json_the_next_is_read(tmp_path, seed, monkeypatch, chunk):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    texts = draw_texts(seed)
    place = random.Random(seed).randrange(len(texts))
    lines = write(tmp_path, "a.jsonl", texts).read_text(encoding="utf-8").splitlines()
    for broken in ('{"text": "一', '{"text": 一}', "no JSON", '{"text": "一"', '{"text": NaN}', '{"text": ' + "[" * 200_000):
        (tmp_path / "a.json").write_text("\n".join([*lines[:place], broken, *lines[place:]]), encoding="utf-8")
        check_bad(tmp_path / "a.json", rf"a\.json:({place + 1}|{place + 2}): broken JSON", kept=tuple(texts))
    (tmp_path / "b.json").write_text("\n".join([*lines[:place], "no JSON"] + [f" {line}" for line in lines[place:]]), encoding="utf-8")
    check_bad(tmp_path / "b.json", r"b\.json:\d+: broken JSON", kept=tuple(texts))


@pytest.mark.parametrize(
    "data, line, problem",
    [
        ('[\n{"text": "一"},\n{"text": 二},\n{"text": "三"}]', 3, "broken JSON"),
        ('[\n{"text": "一"},\n', 3, "the JSON array has no end"),
        ('[{"text": "一"}]\n{"text": "二"}\n', 2, r"broken JSON \(only another array may follow"),
        ('[{"text": "一"}] no JSON', 1, r"broken JSON \(only another array may follow"),
        ('[{"text": "一"}\n{"text": "二"}]', 2, r"broken JSON \(no comma before"),
        ('[{"text": "一"},\n,{"text": "二"}]', 2, "broken JSON"),
        ('[{"text": "一"},\n]', 2, "broken JSON"),
        ('[{"text": "一"},\n' + "[" * 200_000, 2, "broken JSON"),
    ],
)
def test_a_broken_json_array_names_its_line_and_what_is_lost(tmp_path, data, line, problem):
    (tmp_path / "a.json").write_text(data, encoding="utf-8")
    check_bad(tmp_path / "a.json", rf"a\.json:{line}: {problem}", kept=("一",), rest=line)


def test_a_quote_amiss_in_a_csv_names_its_line_and_what_is_lost(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text('text\n一\n"二"三\n四\n', encoding="utf-8")
    check_bad(tmp_path / "a.csv", r"a\.csv:3: broken csv", kept=("一",), rest=3)
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    (tmp_path / "b.csv").write_text('text\n一\n"二\n' + "三\n" * 2000, encoding="utf-8")
    check_bad(tmp_path / "b.csv", r"b\.csv:3: a row longer than .*; a quote may be missing", kept=("一",), rest=3)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_wrong_key_lists_the_keys_present(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path, name, ["一"])
    check_bad(path, r"no key 'story_zh'; keys there: id, text", fields=Fields("story_zh"))
    check_bad(path, r"no key 'theme'; keys there: id, text", fields=Fields("text", group_key="theme"))


@pytest.mark.parametrize("value, kind", [("3", "a number"), ("[]", "a list"), ("true", "true or false"), ("{}", "an object")])
def test_a_value_that_is_no_text_is_named(tmp_path, value, kind):
    (tmp_path / "a.jsonl").write_text(f'{{"text": {value}}}\n{{"text": "一"}}\n', encoding="utf-8")
    check_bad(tmp_path / "a.jsonl", rf"a\.jsonl:1: {kind} under 'text'", kept=("一",))
    both = Fields(None, "{text}", "text")
    if value == "3":
        assert texts_of(tmp_path / "a.jsonl", fields=both) == ["3", "一"]
    else:
        check_bad(tmp_path / "a.jsonl", rf"a\.jsonl:1: {kind} under 'text', not a string or a number", fields=both, kept=("一",))
        check_bad(tmp_path / "a.jsonl", rf"a\.jsonl:1: {kind} under 'text'", fields=Fields(group_key="text"), kept=("一",))
    value, kind = ("null", "null") if value == "{}" else (value, kind)
    (tmp_path / "b.jsonl").write_text(f'{value}\n{{"text": "一"}}\n', encoding="utf-8")
    check_bad(tmp_path / "b.jsonl", rf"b\.jsonl:1: {kind}", kept=("一",))


def test_a_parquet_column_that_is_no_text_is_named_by_its_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array(["一".encode(), "二".encode("gbk"), "三".encode()])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a\.parquet:1: bytes under 'text', not a string"):
        texts_of(tmp_path / "a.parquet")
    damaged = pyarrow.Array.from_buffers(pyarrow.string(), 3, column.buffers())
    parquet.write_table(pyarrow.table({"text": damaged}), tmp_path / "b.parquet")
    check_bad(tmp_path / "b.parquet", r"b\.parquet:2: not UTF-8 \(byte 0xB6\)", kept=("一", "三"))


def test_parquet_values_that_python_cannot_hold_are_named_by_their_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    times = pyarrow.array([None, 2**60, None], pyarrow.timestamp("ms"))
    parquet.write_table(pyarrow.table({"text": ["一", "二", "三"], "time": times}), tmp_path / "a.parquet")
    check_bad(
        tmp_path / "a.parquet", r"a\.parquet:(1: null under 'time'|2: a value that Python)", fields=Fields(None, "{time}{text}"), n_errors=3
    )
    assert texts_of(tmp_path / "a.parquet") == ["一", "二", "三"]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="there is no file whose reading fails")
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.gz", "a.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises((OSError, BadInput), match=str(tmp_path / name)):
        texts_of(tmp_path / name)


def test_an_error_of_a_data_set_names_its_row(monkeypatch):
    def load(name, **options):
        yield {"text": "一"}
        raise ConnectionError("the hub is gone")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    for skip_errors in (False, True):  # the rest is not left out in silence
        with pytest.raises(UserError, match=r"someone/stories:2: the data set cannot be read \(ConnectionError: the hub is gone\)"):
            texts_of("someone/stories", skip_errors=skip_errors)


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    for name in ("disk/a.txt", "disk/deep/b.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "raw").mkdir()
    try:
        (tmp_path / "raw" / "more").symlink_to(tmp_path / "disk")
        (tmp_path / "disk" / "deep" / "loop").symlink_to(tmp_path / "disk")
        (tmp_path / "raw" / "again").symlink_to(tmp_path / "disk" / "deep")
    except OSError:
        pytest.skip("links are not allowed")
    found = find_files([str(tmp_path / "raw")])
    assert sorted(os.path.basename(f) for f in found) == ["a.txt", "b.txt"]


STORY = "從前，有一個小女孩住在森林旁邊，她最喜歡和爺爺一起散步。有一天，她在路上看見一隻受傷的小鳥，就把牠帶回家。"


@pytest.mark.parametrize(
    "encoding, name", [("gb18030", "gb18030|gbk|gb2312|hz"), ("big5", "big5"), ("utf-16", "utf-16(le)?"), ("utf-32", "utf-32")]
)
def test_a_file_that_is_not_utf8_says_what_it_may_be(tmp_path, encoding, name):
    pytest.importorskip("charset_normalizer")
    simple = STORY.translate(str.maketrans("從個邊歡爺隻傷鳥帶見書", "从个边欢爷只伤鸟带见书"))
    text = simple if encoding == "gb18030" else STORY
    (tmp_path / "a.txt").write_bytes((text * 20).encode(encoding))
    check_bad(tmp_path / "a.txt", rf"a\.txt:1: not UTF-8 .*it may be ({name}): iconv -f ({name}) -t utf-8")
    (tmp_path / "a.json").write_bytes(f'[{{"text": "{text * 20}"}}]'.encode(encoding))
    check_bad(tmp_path / "a.json", rf"a\.json:1: not UTF-8 .*it may be ({name})")
    (tmp_path / "a.csv").write_bytes(f"id,text\n0,{text * 20}\n".encode(encoding))
    with pytest.raises(BadInput, match=rf"a\.csv:[12]: not UTF-8 .*it may be ({name})"):
        texts_of(tmp_path / "a.csv")
    if encoding not in ("utf-16", "utf-32"):
        (tmp_path / "a.jsonl").write_bytes(f'{{"text": "{text * 20}"}}\n'.encode(encoding) + '{"text": "一"}\n'.encode())
        check_bad(tmp_path / "a.jsonl", rf"a\.jsonl:1: not UTF-8 .*it may be ({name})", kept=("一",))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_byte_order_mark_is_named(tmp_path, encoding):
    stories = [f"从前有一只小兔子，编号{i}。它很高兴。" for i in range(30)]
    files = {
        "a.txt": "\n\n".join(stories),
        "a.csv": "\n".join(["text", *stories]),
        "a.json": json.dumps([{"text": s} for s in stories], ensure_ascii=False),
        "a.jsonl": "".join(json.dumps({"text": s}) + "\n" for s in stories),
        "b.txt": "once upon a time\n\nthere was a hare",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data.encode(encoding))
        bare = encoding.replace("-le", "le").replace("-be", "be")
        check_bad(tmp_path / name, rf"{name}:1: not UTF-8 .*it may be {bare}: iconv -f {bare} -t utf-8", rest=1)
    for data in ("一\0二\n\n三", "one\0two", "\0" * 5000, "一"):
        (tmp_path / "c.txt").write_bytes(data.encode())
        assert "".join(texts_of(tmp_path / "c.txt")) == data.replace("\n\n", "")


def test_half_a_surrogate_pair_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d"}\n{"text": "一"}\n', encoding="utf-8")
    check_bad(tmp_path / "a.jsonl", r"a\.jsonl:1: half of a surrogate pair", kept=("一",))
    (tmp_path / "b.jsonl").write_text('{"text": "\\udce4\\udcb8\\udc80"}\n{"text": "一"}\n', encoding="utf-8")  # looks like escaped bytes
    check_bad(tmp_path / "b.jsonl", r"b\.jsonl:1: half of a surrogate pair", kept=("一",))
    halves = [{"text": f"{i}\ud83d"} for i in range(30)] + [{f"{i}\ud83d": "一"} for i in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(halves), encoding="utf-8")
    reader = Reader([str(tmp_path / "a.json")], TEXT, skip_errors=True)
    assert not list(reader.read())
    assert sorted(reader.errors.values()) == [30, 30], reader.errors  # one kind each, whatever the text
    "\n".join([*reader.errors, *reader.first_errors]).encode()  # what the report holds


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_a_group_that_is_not_utf8_is_named(tmp_path, name):
    rows = [["二", "主题".encode("gb18030")], ["一", "主题".encode()]]
    form = {"a.csv": b"%b,%b\n", "a.json": b'{"text": "%b", "theme": "%b"}\n', "a.jsonl": b'{"text": "%b", "theme": "%b"}\n'}[name]
    lines = [form % (text.encode(), theme) for text, theme in rows]
    (tmp_path / name).write_bytes(b"text,theme\n" * (name == "a.csv") + b"".join(lines))
    check_bad(tmp_path / name, rf"{name}:\d: not UTF-8", fields=Fields(group_key="theme"), kept=("一",))
    (tmp_path / "b.json").write_text('{"text": "二", "theme": "\\ud800"}\n{"text": "一", "theme": ""}', encoding="utf-8")
    check_bad(tmp_path / "b.json", r"b\.json:1: half of a surrogate pair", fields=Fields(group_key="theme"), kept=("一",))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    check_bad(tmp_path / name, "the file is empty")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_document_longer_than_10_mb_is_named(tmp_path, name):
    longest = "一" * (10_000_000 // 3)
    path = write(tmp_path, name, ["零", longest + "\n二三四", "五"])
    check_bad(path, rf"{name}:\d+: a document longer than 10 MB", kept=("零", "五"))
    assert len(texts_of(write(tmp_path, f"b{name[1:]}", [longest]))) == 1


def test_a_line_without_end_is_not_held_in_memory(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 45_000_000)
    check_bad(tmp_path / "a.jsonl", r"a\.jsonl:1: a document longer than 10 MB")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named(tmp_path, name, seed):
    pytest.importorskip({"gz": "gzip", "zst": ZSTD, "parquet": "pyarrow"}[name.rsplit(".", 1)[-1]])
    texts = [f"{i} {random.Random(seed + i).random()}" for i in range(5000)]
    path = write(tmp_path, name, texts)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadInput, match=rf"{name}:\d+: .*(damaged|not a complete parquet)"):
        texts_of(path)
    kept = texts_of(path, skip_errors=True)
    assert kept == texts[: len(kept)] and len(kept) < len(texts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz", "a.json.zst"])
def test_random_damage_gives_documents_or_an_error_with_a_line(tmp_path, name, seed):
    pytest.importorskip({"zst": ZSTD, "parquet": "pyarrow"}.get(name.rsplit(".", 1)[-1], "csv"))
    draw, original = random.Random(seed), write(tmp_path, name, draw_texts(seed)).read_bytes()
    inserted = [
        b"\0",
        b"\r",
        b"\xef\xbb\xbf",
        b"[",
        b'"',
        b"\n\n",
        b"\xff\xfe",
        b"NaN",
        b"\\udce4\\udcb8\\udc80",
        b"<|endoftext|>",
        b"9" * 5000,
    ]
    for _ in range(60):
        data = bytearray(original)
        for _ in range(draw.choice([1, 3, 20])):
            place = draw.randrange(len(data) + 1)
            end = place + draw.choice([0, 0, 1, draw.randrange(30), len(data) if draw.random() < 0.05 else 0])
            data[place:end] = draw.choice([*inserted, b"", bytes([draw.randrange(256)])])
        (tmp_path / name).write_bytes(data)
        try:
            "".join(texts_of(tmp_path / name)).encode()
        except ValueError as error:
            assert re.match(rf"{re.escape(str(tmp_path / name))}:(\d+)?", str(error)), error
        try:
            "".join(texts_of(tmp_path / name, skip_errors=True)).encode()
        except ValueError as error:
            assert "--txt-documents" in str(error)


def test_a_csv_row_of_another_width_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"一\n二"\n2,三,四\n3,五\n', encoding="utf-8")
    check_bad(tmp_path / "a.csv", r"a\.csv:4: 3 fields, but 2 in the header \(id, text\)", kept=("一\n二", "五"))


def test_errors_of_skipped_documents_are_counted_once(tmp_path, seed):
    lines = [random.Random(seed + i).choice(['{"text": "一"}', "{", '{"story": 1}']) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    whole = Reader([str(tmp_path / "a.jsonl")], TEXT, skip_errors=True)
    n, so_far = 0, Counter()
    for n, _ in enumerate(whole.read(), 1):
        if n == 30:
            so_far = Counter(whole.errors)
    again = Reader([str(tmp_path / "a.jsonl")], TEXT, skip_errors=True, errors=so_far)
    assert sum(1 for _ in again.read(0, 30)) == n - 30
    assert again.errors == whole.errors and sum(whole.errors.values()) == 200 - n


@pytest.mark.parametrize("module, name", [("pyarrow.parquet", "a.parquet"), (ZSTD, "a.txt.zst"), ("datasets", "someone/stories")])
def test_a_package_that_is_missing_is_named_with_its_command(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    if "/" not in name:
        (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")  # a zst file
        name = tmp_path / name
    with pytest.raises(ValueError, match=r"needs the package (.*), which is not installed: pip install \1$"):
        texts_of(name)
