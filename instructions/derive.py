"""The requirements that a story meets: from the facts of a built-in story, and from the text of any other."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from random import Random

from ..stories.generator import Story
from ..stories.words import CHARACTERS, PLACES, THINGS
from .requirements import DIALOGUE, Requirement, has_dialogue, occurs

SENTENCE = (8, 40)  # characters of a sentence that an instruction quotes,
BEGINNING = (2, 20)  # and of a beginning
STEP = 50  # characters between the bounds of a length, at least a tenth of it
MAX_WORDS = 3  # that an instruction asks for
FEATURE_WEIGHTS = {"对话": 1, "转折": 1, "冲突": 4, "寓意": 4, "伏笔": 8, "坏结局": 8}  # rare ones are asked for as often as common ones

# With its locative (公园里), as the stories name it: the tokenizer has one entry for that, and other ones for 公园.
_AT = {place.name: place.at for place in PLACES}
Found = dict[str, Requirement]  # by kind


def of_built_in(story: Story, rng: Random) -> Found:
    """One requirement of each kind that the story meets; `rng` chooses among several."""
    names = [w.name for w in (*CHARACTERS, *THINGS, *PLACES)]
    summary = Requirement("summary", story.summary, _without_parts([name for name in names if name in story.summary]))
    features = {"feature": Requirement("feature", _feature(story.features, rng))} if story.features else {}
    return (
        of_text(story.text, rng)
        | features
        | {
            "words": Requirement("words", words=_some(story.words, rng)),
            "people": Requirement("people", words=story.characters),
            "place": Requirement("place", _AT[story.place]),
            "summary": summary,
        }
    )


def of_text(text: str, rng: Random, vocabulary: "Vocabulary | None" = None) -> Found:
    """One requirement of each kind that can be derived from the text: words, dialogue, a sentence, the length, the beginning.

    A kind is missing if the text has nothing for it. Words are only found with a `vocabulary`."""
    text, found = text.strip(), []
    if vocabulary and (words := vocabulary.important(text)):
        found.append(Requirement("words", words=_some(words, rng)))
    if has_dialogue(text):
        found.append(Requirement("feature", DIALOGUE))
    if sentences := [s for s in split_sentences(text)[1:] if SENTENCE[0] <= len(s) <= SENTENCE[1]]:
        found.append(Requirement("sentence", rng.choice(sentences)))
    if text:
        found.append(Requirement("length", characters=length_range(len(text))))
    first = re.match(r"[^，。！？；：,.!?;:\n“「『\"]*[，。！？,.!?]", text)
    if first and BEGINNING[0] < len(first[0]) <= BEGINNING[1]:
        found.append(Requirement("beginning", first[0]))
    return {r.kind: r for r in found}


def length_range(n: int) -> tuple[int, int]:
    """The range of lengths in which a story of `n` characters lies: between two multiples of STEP, or of a larger step for a long one."""
    step = STEP
    while 10 * step < n:
        step *= 2
    low = n // step * step
    return max(1, low), low + step


def split_sentences(text: str) -> list[str]:
    """The sentences of a text with their marks and closing quotes. One with an unpaired quote is left out."""
    sentences = re.findall(r"(?:[^。！？!?.…\n]|\.(?=\w))+(?:[。！？!?…]+|\.+(?!\w))[”’」』\"]*|[^。！？!?…\n]+$", text)
    pairs = (("“", "”"), ("「", "」"), ("『", "』"))
    is_whole = lambda s: all(s.count(a) == s.count(b) for a, b in pairs) and s.count('"') % 2 == 0
    return [s.strip() for s in sentences if is_whole(s)]


def _some(words: Iterable[str], rng: Random) -> tuple[str, ...]:
    words = list(words)
    return tuple(rng.sample(words, rng.randint(1, min(MAX_WORDS, len(words)))))


def _without_parts(words: list[str]) -> tuple[str, ...]:
    return tuple(w for w in words if not any(w != other and w in other for other in words))


def _feature(features: tuple[str, ...], rng: Random) -> str:
    return rng.choices(features, [FEATURE_WEIGHTS[f] for f in features])[0]


class Vocabulary:
    """The words of a collection of texts, found by statistics; no dictionary is needed.

    A Chinese word is a run of 2 to 4 characters that occurs in several texts, whose parts occur together much more often than by chance,
    and that many different characters precede and follow. A word in Latin letters has at least 4 of them. Words in more than a tenth of
    the texts say little about one of them and are left out, as are runs that begin or end with a function word."""

    def __init__(self, texts: Iterable[str], *, max_characters: int = 500_000):
        """Learn from the first texts, up to `max_characters` in all, which takes 4 s."""
        chosen, n = [], 0
        for text in texts:
            chosen.append(text)
            if (n := n + len(text)) >= max_characters:
                break
        self._rarity = _chinese_words(chosen) | _latin_words(chosen)  # word → log(texts / texts with it)

    def __len__(self) -> int:
        return len(self._rarity)

    def important(self, text: str, n: int = 6) -> list[str]:
        """The `n` words of the text with the highest tf-idf, none inside another."""
        counts = Counter(word for word in _runs(text) if word in self._rarity)
        ranked = sorted(counts, key=lambda word: (-math.sqrt(counts[word]) * self._rarity[word], word))
        found: list[str] = []
        for word in ranked:
            if not any(word in other or other in word for other in found) and occurs(word, text):
                found.append(word)
        return found[:n]


LONGEST, LEAST_TEXTS, MOST_TEXTS = 4, 4, 0.1  # characters of a word; texts with it, at least, and their share, at most
COHESION, FREEDOM = 4.0, 1.2  # nats: pointwise mutual information of its parts; entropy of the character before it and behind it
_CHINESE, _LATIN = re.compile("[\u3400-\u9fff]+"), re.compile(r"[A-Za-z][a-z]{3,}")
_JOINS = re.compile("[的了和與与這这]|(?<=.)[着著](?=.)")
_FUNCTION = frozenset(  # characters that do not begin or end a word worth asking for, in both scripts
    "的了是在着著和也就不都很把被给給让讓对對向从從到这這那哪你我他她它们們个個只一二三两兩有没沒又还還会會能要想说說道问問看去来來上下里裡中后後前与與及而且但因为為所以如何什么麼么吗嗎呢吧啊呀地得之其于於更最再太真每各已正当當时時候过過起出成可样樣些几幾"
)


def _runs(text: str) -> list[str]:
    # Every run of characters that may be a word, as often as it occurs.
    found = [word.lower() for word in _LATIN.findall(text)]
    for run in _CHINESE.findall(text):
        found += (run[i : i + n] for n in range(2, LONGEST + 1) for i in range(len(run) - n + 1))
    return found


def _latin_words(texts: list[str]) -> dict[str, float]:
    return _rarities(Counter(word for text in texts for word in {w.lower() for w in _LATIN.findall(text)}), len(texts))


def _rarities(n_with: Counter, n_texts: int) -> dict[str, float]:
    most = max(LEAST_TEXTS, MOST_TEXTS * n_texts)
    return {word: math.log(n_texts / n) for word, n in n_with.items() if LEAST_TEXTS <= n <= most and n < n_texts}


def _chinese_words(texts: list[str]) -> dict[str, float]:
    counts, n_with = Counter(), Counter()
    for text in texts:
        seen = set()
        for run in _CHINESE.findall(text):
            counts.update(run)
            grams = [run[i : i + n] for n in range(2, LONGEST + 1) for i in range(len(run) - n + 1)]
            counts.update(grams)
            seen.update(grams)
        n_with.update(seen)
    total = sum(n for gram, n in counts.items() if len(gram) == 1)
    is_bound = lambda w: all(counts[w] * total >= math.exp(COHESION) * counts[w[:i]] * counts[w[i:]] for i in range(1, len(w)))
    is_phrase = lambda w: len(w) == 4 and is_bound(w[:2]) and is_bound(w[2:])
    may_be_word = lambda w: w[0] not in _FUNCTION and w[-1] not in _FUNCTION and not _JOINS.search(w)
    found = _rarities(n_with, len(texts)).items()
    words = {w: rarity for w, rarity in found if may_be_word(w) and is_bound(w) and not is_phrase(w)}
    before, behind = {word: Counter() for word in words}, {word: Counter() for word in words}
    for text in texts:
        for n in range(2, LONGEST + 1):
            for i in range(len(text) - n + 1):
                if (word := text[i : i + n]) in words:
                    before[word][text[i - 1] if i else ""] += 1
                    behind[word][text[i + n : i + n + 1]] += 1
    return {w: rarity for w, rarity in words.items() if min(_entropy(before[w]), _entropy(behind[w])) >= FREEDOM}


def _entropy(counts: Counter) -> float:
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())
