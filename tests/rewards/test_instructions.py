"""The reward `instructions`: IFEval's verdict, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.instruction_checks import CHECKS, _count_bullets, _languages, _punkt
from grpo_ray.rewards.table import resolve
from grpo_ray.types import Score, ScoreStatus
from tests.scoring import score_samples

# Instruction, its arguments, responses that keep it, responses that don't: what IFEval's own checker says, over NLTK 3.10 and
# langdetect 1.0.9. Those of languages are the same with every seed of langdetect.
VERDICTS: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["run", "sea"]}, ["Running at SEASIDE", "RUN\nsea"], ["run, see", "r un sea"]),
    ("keywords:existence", {"keywords": ["sea", "sea"]}, ["one sea"], []),
    ("keywords:existence", {"keywords": ["well-known"]}, ["a well-known man"], ["a well known man"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["run"]},
        ["running runs rerun", "run_down", "ran"],
        ["Run!", "run-down", "RUN's"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["can't"]}, ["I cant go", "I can\u2019t go"], ["I can't go"]),
    (
        "keywords:frequency",
        {"keyword": "no", "frequency": 3, "relation": "at least"},
        ["nose, NO, know", "nonono"],
        ["no no"],
    ),
    ("keywords:frequency", {"keyword": "aa", "frequency": 2, "relation": "less than"}, ["aaa"], ["aaaa"]),
    ("keywords:frequency", {"keyword": " sea ", "frequency": 1, "relation": "at least"}, ["the sea."], []),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["Even me"],
        ["Even", "éeE"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "s", "let_frequency": 1, "let_relation": "less than"},
        [],
        ["Straße", "STRASSE"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Der Hund geht in den Garten und schläft dort.", "1 + 2 = 3", "Der Hund ist hier, und er sagt: it is so."],
        ["The dog goes into the garden and sleeps."],
    ),
    ("language:response_language", {"language": "vi"}, ["Con chó đi vào vườn và ngủ ở đó."], []),
    (
        "language:response_language",
        {"language": "hi"},
        ["कुत्ता बगीचे में जाता है और वहाँ सोता है।"],
        ["El perro duerme en el jardín."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        ["well-known facts, don't", "naïve Straße über Öl", "3.14 x 2"],
        ["it's two", "one two three", "a_b c d", "* one ** two"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        ["two words", "中文没有空格 两"],
        ["mother-in-law", "e.g. this"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        [
            "Dr. Smith left. He slept.",
            "Really?! Yes.",
            "He came at 5 p.m. The end.",
            "First. second.",
            'He said "yes." Then he left.',
        ],
        [
            "Dr. Smith went home.",
            "It is 3.5 m. long",
            "Stop... now",
            "one\ntwo",
            "你好。再见。",
            "J. K. Rowling wrote it.",
        ],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        ["See the U.S. and the U.K. today. Go!"],
        ["A cat. A dog. A cow.", "1. One\n2. Two\n3. Three"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none\n***\ntwo\n***", "one***two", "one\n****\ntwo"],
        ["one\n\ntwo", "one\n***\n\n***\ntwo", "one\n******\ntwo", "one\n* * *\ntwo", "***one***"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        ["one\n\nso it is", "one\n\n'So it is", 'one\n\n"so" it is', "one\n\n\nso it is", "one\n\nso, no"],
        [
            "one\nso it is",
            "one\n\n\n\nso it is",
            "\n\none\n\nso it is",
            "one\n\nso-so",
            "one\n\n**so** it is",
            "one\n \nso it is",
        ],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 3, "nth_paragraph": 1, "first_word": "it's"},
        [],
        ["It's me\n\na\n\nb", "it\n\na\n\nb"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "hello"},
        ["Hello.World"],
        ["\n\nHello"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] [town]", "[] []"],
        ["[name]", "[[a] b]", "[a\nb] [c]", "[a] (b)", "[a][b"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["End.\nP.S. more", "End. P. S. more", "p.s. more", "the P.S. is", "P.P.S. more"],
        ["P.S more", "PS: more", "P.  S. more"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["P.P.S. more", "P. P. S more", "p.p.s"],
        ["P.S. more"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "Note:"}, ["a note: b"], ["a NOTE b"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        [
            "* one\n* two",
            "- one\n* two",
            "  * one\n\n  - two",
            "*one*\n- two",
            "* one\n---\n",
            "*\n* one\n* two",
            "*** \n* one\n-two",
        ],
        ["* one\n**two**", "* one\n- two\n- three", "•one\n•two", "1. one\n* two", "- one - two"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "So: My answer is maybe. Good", "**My answer is yes.**"],
        ["my answer is no.", "My answer is no"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and **b**", "***a***", "** ** *a* *b*", "*a*b*c*"],
        ["**a**", "* a *b*", "*a* *\n*", "*a\nb* *c*", "_a_ and _b_", "* one\n* two"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        [
            "Section 1\na\nSection 2\nb",
            "**Section 1**\na\n**Section 2**\nb",
            "Section1 Section2",
            "# Section 1\n## Section 2",
            "Section 1, Section 1",
        ],
        ["Section 1: Section X", "SECTION 1\nSECTION 2", "Subsection 1, Section 2", "Section  1\nSection  2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": 1}\n```', '```JSON {"a": 1}```', "```\n[1]\n```", "NaN", '"text"', '{"a": 1} ```'],
        ["{a: 1}", 'Here: {"a": 1}', "```python\n{}\n```", "```jsonc\n{}\n```", '{"a": 1,}'],
    ),
    (
        "detectable_format:title",
        {},
        ["<<The sea>>\nIt is.", "<<<a>>>", "so <<a>> b", "<< <b> >>", "<<>> a >>", "<<a>> <<b", "a>> <<b>>"],
        ["<< >>", "<<>>", "<<a\nb>>", "<a>"],
    ),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "******\none\n******\ntwo\n******", "one ****** One", "one\n*******\none"],
        [
            "one\n******\none",
            "one\n******\n\n******\ntwo",
            "one\n***\ntwo",
            "one******\ntwo******three",
            "one\n************\ntwo",
        ],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": " Why? "},
        ["why? Because.", "Why?", " \n WHY? So."],
        ["Because. Why?", '"Why?" So.'],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions? "},
        ["So. any questions?", 'So. Any questions?"', 'So. "Any questions?"\n', "ANY QUESTIONS?\n\n"],
        ['Any questions? "', "Any questions?.", "**Any questions?**"],
    ),
    ("startend:quotation", {}, ['"so"', ' "so"\n', '""', '"a" "b"'], ['"so', '"', "“so”", "'so'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        [
            "THE SEA",
            "DON'T",
            "I AM",
            "**BOLD** [NAME]",
            "CANNOT",
            "IT'S",
            "ÉTÉ ÖL",
            "\u0416\u0423\u041a \u041a\u041e\u0422",
        ],
        ["WELL-KNOWN", "U.S. one", "HTML5", "A.B, c", "a1 B2", "X=Y", "TO/FROM", "NO.YES"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, ["I"], ["I'M"]),
    (
        "change_case:english_capital",
        {},
        ["THE SEA IS BLUE", "DIE SEE IST BLAU", "THE SEA, 24 HOURS!"],
        [
            "THE SEA iS BLUE",
            "123",
            "\u041c\u041e\u0420\u0415 \u0421\u0418\u041d\u0415\u0415 \u0418 \u0413\u041b\u0423\u0411\u041e\u041a\u041e\u0415",
        ],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["the sea is blue and deep, and it is wide"],
        ["the sea is blue I think", "die see ist blau und tief, und sie ist weit", "123 456"],
    ),
    ("punctuation:no_comma", {}, ["a; b", "a\uff0cb", "a\u3001b"], ["a, b", "1,000", "", "  \n "]),
    ("startend:end_checker", {"end_phrase": "x"}, [], [" "]),
]


def scores(responses: list[str], ids: list[str], kwargs: Any, **args: Any) -> list[Score]:
    size = len(responses)
    columns = {"instruction_id_list": [ids] * size, "kwargs": [kwargs] * size}
    inputs = ScoreInputs(["Why?"] * size, responses, [[1, 2]] * size, columns)
    return score_samples([resolve(RewardFunctionConfig(name="instructions", args=args))], inputs)


def test_every_instruction_of_ifeval_has_both_verdicts() -> None:
    kept = {name for name, _, good, _ in VERDICTS if good}
    broken = {name for name, _, _, bad in VERDICTS if bad}
    assert len(CHECKS) == 25
    assert kept == broken == set(CHECKS)


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), VERDICTS)
def test_the_verdict_is_ifevals(name: str, arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    got = [s.value for s in scores([*good, *bad], [name], [{**arguments, "of_another_instruction": None}])]
    assert got == [1.0] * len(good) + [0.0] * len(bad)


def test_a_letter_may_be_a_sign_and_at_most_is_a_relation() -> None:
    hashtags = {"letter": "#", "let_frequency": 2, "let_relation": "at least"}
    assert [s.value for s in scores(["#a #b", "#a"], ["keywords:letter_frequency"], [hashtags])] == [1.0, 0.0]
    few = {"num_words": 3, "relation": "at most"}
    assert [s.value for s in scores(["a b c", "a b c d"], ["length_constraints:number_words"], [few])] == [1.0, 0.0]


def test_a_keyword_is_letters_and_no_regular_expression() -> None:
    got = scores(["I like C++.", "I like Cxx."], ["keywords:existence"], [{"keywords": ["C++"]}])
    assert [s.value for s in got] == [1.0, 0.0]


def test_zh_is_chinese_in_both_ways_of_writing() -> None:
    texts = [
        "\u8fd9\u662f\u4e00\u672c\u5f88\u597d\u7684\u4e66",
        "\u9019\u662f\u4e00\u672c\u5f88\u597d\u7684\u66f8",
        "This is a book",
    ]
    assert [s.value for s in scores(texts, ["language:response_language"], [{"language": "zh"}])] == [1.0, 1.0, 0.0]


def test_the_share_of_several_instructions_or_all_of_them() -> None:
    ids = ["punctuation:no_comma", "startend:quotation"]
    for strict, want in ((False, 0.5), (True, 0.0)):
        (score,) = scores(["no commas"], ids, [None, {}], strict=strict)
        assert score.value == want


def test_numbers_and_nulls_may_have_been_through_pandas() -> None:
    arguments = {"num_words": 3.0, "relation": "at least", "num_bullets": float("nan"), "keywords": None}
    assert [s.value for s in scores(["a b c", "a"], ["length_constraints:number_words"], [arguments])] == [1.0, 0.0]


def test_a_prompt_to_repeat_is_the_rows_where_it_is_not_given() -> None:
    assert [s.value for s in scores(["Why? So.", "So."], ["combination:repeat_prompt"], [None])] == [1.0, 0.0]


def test_a_row_without_instructions_is_not_for_this_reward() -> None:
    (score,) = scores(["a"], [], [])
    assert score.status is ScoreStatus.NOT_APPLICABLE


@pytest.mark.parametrize("response", ["text", ""])
@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("keywords:nothing", {}, "no instruction 'keywords:nothing'; known are keywords:existence"),
        ("keywords:existence", {}, "keywords:existence lacks its argument 'keywords'"),
        ("keywords:existence", {"keywords": "sea"}, "keywords is 'sea', expected a list of words"),
        ("keywords:existence", {"keywords": []}, "keywords is [], expected a list of words"),
        ("keywords:forbidden_words", {"forbidden_words": [""]}, "expected a list of words"),
        (
            "keywords:letter_frequency",
            {"letter": "ab", "let_frequency": 1, "let_relation": "at least"},
            "letter is 'ab'",
        ),
        ("language:response_language", {"language": "xx"}, "there is no language 'xx'; known are zh, af, ar"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "relation is 'about'"),
        ("length_constraints:number_words", {"num_words": 3}, "lacks its argument 'relation'"),
        ("length_constraints:number_words", {"num_words": -1, "relation": "at least"}, "num_words is -1"),
        ("length_constraints:number_words", {"num_words": 2.5, "relation": "at least"}, "num_words is 2.5"),
        ("length_constraints:number_words", {"num_words": "ten", "relation": "at least"}, "num_words is 'ten'"),
        ("length_constraints:number_words", {"num_words": 10**400, "relation": "at least"}, "num_words is 1000000"),
        (
            "length_constraints:number_words",
            {"num_words": 10**5000, "relation": "at least"},
            "num_words is a number of th",
        ),
        ("length_constraints:number_words", {"num_words": 1e308, "relation": "at least"}, "num_words is 1e+308"),
        ("length_constraints:number_words", {"num_words": "9" * 5000, "relation": "at least"}, "num_words is '9999"),
        ("length_constraints:number_words", {"num_words": True, "relation": "at least"}, "num_words is True"),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "S", "num_sections": 10**400},
            "num_sections is 10000",
        ),
        ("keywords:frequency", {"keyword": "a", "frequency": 10**400, "relation": "at least"}, "frequency is 10000"),
        ("language:response_language", {"language": ["en"]}, "language is ['en'], expected a text"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"},
            "nth_paragraph is 3, expected 1 to num_paragraphs (2)",
        ),
        (
            "detectable_format:number_bullet_lists",
            {"num_bullets": 2, "relation": "at least"},
            "detectable_format:number_bullet_lists takes no argument 'relation', but num_bullets",
        ),
        ("startend:end_checker", {"end_phrase": " "}, "end_phrase is ' ', expected a text"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_an_error_and_never_a_verdict(
    response: str, name: str, arguments: dict[str, Any], words: str
) -> None:
    (score,) = scores([response], [name], [arguments])
    assert score.status is ScoreStatus.ERROR
    assert words in score.detail


@pytest.mark.parametrize(
    ("ids", "kwargs"),
    [
        (["punctuation:no_comma"], []),
        (["punctuation:no_comma"], "[{}]"),
        ([["punctuation:no_comma"]], [{}]),
        ([{}], [{}]),
        (["punctuation:no_comma"], ["x"]),
        (["punctuation:no_comma"], [[1]]),
        (["punctuation:no_comma"], {"a": 1}),
        (5, 5),
    ],
)
def test_columns_that_do_not_fit_together_are_an_error(ids: Any, kwargs: Any) -> None:
    (score,) = scores(["a"], ids, kwargs)
    assert score.status is ScoreStatus.ERROR
    assert score.detail.startswith("RewardError: reward 'instructions': instruction_id_list is ")
    assert "expected two lists of the same length" in score.detail


def test_libraries_are_read_at_the_start_and_not_on_the_first_samples_time() -> None:
    _languages.cache_clear()
    _punkt.cache_clear()
    resolve(RewardFunctionConfig(name="instructions"), load=True)
    assert (_languages.cache_info().currsize, _punkt.cache_info().currsize) == (1, 1)


@pytest.mark.parametrize(
    ("text", "sign", "count"),
    [
        ("-\n- a", "-", 2),
        ("- a\n- b\n\n  - c\nd - e", "-", 3),
        ("*x\n* b", "*", 2),
        ("*\n* b", "*", 1),
        ("**bold**\n* b", "*", 1),
        ("* a\n*", "*", 1),
        ("", "-", 0),
    ],
)
def test_bullets_are_counted_line_by_line(text: str, sign: str, count: int) -> None:
    assert _count_bullets(text, sign) == count
