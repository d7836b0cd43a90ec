"""The best and the worst answer to an instruction, by exact checks."""

from dataclasses import replace

from tritale.instructions.pairs import Answer, best_and_worst, rank
from tritale.instructions.requirements import Requirement
from tritale.instructions.samples import Sample

WORDS, LENGTH = Requirement("words", words=("小狗", "公园")), Requirement("length", characters=(1, 9))
MORAL = Requirement("feature", "寓意")
SAMPLE = Sample(({"role": "user", "content": "写"}, {"role": "assistant", "content": "小狗在公园。"}), (WORDS, LENGTH), is_built_in=True)


def test_the_best_answer_meets_everything_and_the_worst_misses_most():
    answers = [
        Answer("小狗在公园里跑了又跑，跑了又跑。", True),  # too long
        Answer("小狗在公园。", False),  # not coherent
        Answer("公园里有小狗。", True),
        Answer("小狗在公园！", True),
        Answer("天黑了。", True),  # no word
    ]
    assert best_and_worst(SAMPLE, answers) == ("公园里有小狗。", "小狗在公园。")
    assert best_and_worst(SAMPLE, answers[:1] + answers[4:]) == (None, "天黑了。")
    assert best_and_worst(SAMPLE, answers[2:4]) == ("公园里有小狗。", None)
    ranks = [rank(SAMPLE, answers[i]) for i in (1, 4, 0, 2)]
    assert ranks == sorted(ranks) and ranks[1] == (True, 0.5, 0.5) and ranks[2][1] == 0.5 and 0.5 < ranks[2][2] < 1


def test_a_requirement_that_cannot_be_judged_does_not_count():
    other = replace(SAMPLE, requirements=(MORAL, WORDS), is_built_in=False)
    assert rank(other, Answer("小狗在公园。", True)) == (True, 1, 1)
    assert rank(other, Answer("小狗", True)) == (True, 0, 0.5)
    assert rank(replace(other, requirements=(MORAL,)), Answer("", True)) == (True, 1, 1)
