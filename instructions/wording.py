"""Instructions in words: several phrasings of each requirement, in simplified and traditional Chinese and in English.

An instruction is an opening (请写一个故事) and its requirements, in the form of fields (人物：汤姆，杰瑞), one to a line, or of clauses
(人物有汤姆和杰瑞), in one sentence.
"""

import re
from dataclasses import dataclass
from random import Random

from .requirements import Requirement

SIMPLIFIED, TRADITIONAL, ENGLISH = "zh", "zh-Hant", "en"


@dataclass(frozen=True)
class Wording:
    """The phrases of a language. `{}` stands for the value of a requirement."""

    openings: tuple[str, ...]
    summary_openings: tuple[str, ...]  # of an instruction to write the summary of a story instead
    fields: dict[str, tuple[str, ...]]  # kind → names of the field
    clauses: dict[str, tuple[str, ...]]
    features: dict[str, tuple[str, tuple[str, ...]]]  # feature → its value in a field, and in a clause
    length: str
    marks: tuple[str, str, str]  # after an opening and between clauses; at the end of the sentence; after the name of a field
    separators: tuple[str, ...]  # between words
    last_separators: tuple[str, ...]  # before the last word in a clause
    quotes: tuple[tuple[str, str], ...]  # the first pair whose marks are not in the quoted text


CHINESE = Wording(
    openings=("写一个故事", "请写一个故事", "讲一个故事", "请讲一个小故事", "给我讲个故事", "来一个故事"),
    summary_openings=("写一句大意", "给故事想一个大意", "请写出故事的大意"),
    fields={
        "words": ("词汇", "词语", "要用的词"),
        "feature": ("特点",),
        "people": ("人物", "主角"),
        "place": ("地点", "地方"),
        "summary": ("摘要", "大意"),
        "sentence": ("随机句子", "句子", "要有的一句话"),
        "length": ("字数", "多长"),
        "beginning": ("开头",),
    },
    clauses={
        "words": ("用上{}", "里面要有{}", "要用到{}"),
        "feature": ("{}", "要{}", "里面{}"),
        "people": ("人物有{}", "讲的是{}", "里面要有{}"),
        "place": ("地点在{}", "发生在{}", "地方是{}"),
        "summary": ("大意是{}", "讲的是{}"),
        "sentence": ("里面要有一句{}", "要说到这句话：{}", "用上这句话：{}"),
        "length": ("写{}", "长{}", "字数是{}"),
        "beginning": ("开头是{}", "用{}开头"),
    },
    features={
        "对话": ("对话", ("有对话", "有人说话")),
        "转折": ("转折", ("有转折", "有一个转折")),
        "冲突": ("冲突", ("有冲突", "有一次冲突")),
        "伏笔": ("伏笔", ("有伏笔", "先有一个伏笔")),
        "寓意": ("寓意", ("有寓意", "最后明白一个道理")),
        "坏结局": ("坏结局", ("有坏结局", "结局不好")),
    },
    length="{}到{}个字",
    marks=("，", "。", "："),
    separators=("，", "、"),
    last_separators=("和", "、"),
    quotes=(("“", "”"), ("《", "》")),
)
ENGLISH_WORDING = Wording(
    openings=("Write a story", "Tell me a story", "Please write a short story"),
    summary_openings=("Write the summary of a story", "Sum up a story in one sentence"),
    fields={
        "words": ("Words", "Words to use"),
        "feature": ("Features", "Feature"),
        "people": ("Characters", "People"),
        "place": ("Place", "Setting"),
        "summary": ("Summary",),
        "sentence": ("Random sentence", "Sentence to include"),
        "length": ("Length",),
        "beginning": ("Beginning",),
    },
    clauses={
        "words": ("use {}", "include the words {}"),
        "feature": ("it should have {}", "include {}"),
        "people": ("it is about {}", "the characters are {}"),
        "place": ("it takes place at {}", "the place is {}"),
        "summary": ("in short: {}", "the summary is {}"),
        "sentence": ("include the sentence {}", "use this sentence: {}"),
        "length": ("write {}", "its length is {}"),
        "beginning": ("begin with {}", "the beginning is {}"),
    },
    features={
        "对话": ("dialogue", ("dialogue", "a conversation")),
        "转折": ("twist", ("a twist",)),
        "冲突": ("conflict", ("a conflict",)),
        "伏笔": ("foreshadowing", ("foreshadowing",)),
        "寓意": ("moral", ("a moral",)),
        "坏结局": ("bad ending", ("a bad ending",)),
    },
    length="{} to {} characters",
    marks=("; ", ".", ": "),
    separators=(", ",),
    last_separators=(" and ",),
    quotes=(("“", "”"), ("«", "»")),
)

# The characters of the Chinese phrases whose traditional form differs.
_TRADITIONAL = str.maketrans(
    "写个请讲给来词汇语里话这对折结后长数开头随机发点着义们为说处转冲笔寓坏终尾于从读轻丝见现",
    "寫個請講給來詞彙語裡話這對折結後長數開頭隨機發點著義們為說處轉衝筆寓壞終尾於從讀輕絲見現",
)
_ONLY_TRADITIONAL = re.compile("[們個這來說對時後為裡會開過還給點樣麼從讓見聽]")
_ONLY_SIMPLIFIED = re.compile("[们个这来说对时后为里会开过还给点样么从让见听]")


def language_of(text: str) -> str:
    """SIMPLIFIED, TRADITIONAL or ENGLISH: the language of an instruction about this text. ENGLISH if it has few Chinese characters."""
    if 5 * len(re.findall("[\u3400-\u9fff]", text)) < len(text):
        return ENGLISH
    return TRADITIONAL if len(_ONLY_TRADITIONAL.findall(text)) > len(_ONLY_SIMPLIFIED.findall(text)) else SIMPLIFIED


def instruction(requirements: tuple[Requirement, ...], language: str, rng: Random, *, asks_for_summary: bool = False) -> str:
    """An instruction with the requirements in this order, in a phrasing that `rng` chooses; to write a story, or the summary of one."""
    wording = ENGLISH_WORDING if language == ENGLISH else CHINESE
    own = (lambda phrase: phrase.translate(_TRADITIONAL)) if language == TRADITIONAL else str  # values stay as they are
    comma, stop, colon = wording.marks
    opening = own(rng.choice(wording.summary_openings if asks_for_summary else wording.openings))
    if rng.random() < 0.5:
        lines = [f"{own(rng.choice(wording.fields[r.kind]))}{colon}{_value(r, wording, own, rng)}" for r in requirements]
        return "\n".join([opening + stop, *lines])
    clauses = []
    for r in requirements:
        phrase = own(rng.choice(wording.clauses[r.kind]))
        clauses.append(phrase.replace("{}", _value(r, wording, own, rng, in_clause=True)))
    return comma.join([opening, *clauses]) + stop


def _value(r: Requirement, wording: Wording, own, rng: Random, *, in_clause: bool = False) -> str:
    if r.kind == "feature":
        in_field, in_clauses = wording.features[r.text]
        return own(rng.choice(in_clauses) if in_clause else in_field)
    if r.kind == "length":
        return own(wording.length).format(*r.characters)
    if r.kind in ("words", "people"):
        separator, last = rng.choice(wording.separators), rng.choice(wording.last_separators) if in_clause else None
        *words, end = r.words
        return (separator.join(words) + (last or separator) if words else "") + end
    if in_clause and r.kind != "place":
        opening, closing = next((q for q in wording.quotes if q[0] not in r.text and q[1] not in r.text), wording.quotes[-1])
        return f"{opening}{r.text}{closing}"
    return r.text
