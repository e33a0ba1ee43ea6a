"""The tasks of several turns: their games, their tools and their demonstrations."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.errors import DataError
from grpo_ray.models.files.tiny import make_tokenizer
from grpo_ray.tasks.calculator import calculate, flawed_uses, prompts
from grpo_ray.tasks.guess_number import GuessNumber, flawed_games


def won(game: GuessNumber, seed: int) -> bool:
    """Whether halving what is left wins."""
    game.reset(seed=seed)
    least, most = 1, 15
    for turn in itertools.count(1):
        guess = (least + most) // 2
        hint, reward, right, lost, _ = game.step(str(guess))
        assert right == (reward == 1.0) == (hint == "right")
        if right or lost:
            assert turn <= 4
            return right
        least, most = (guess + 1, most) if hint == "higher" else (least, guess - 1)
    raise AssertionError


def test_who_halves_what_is_left_always_wins_and_every_number_is_asked() -> None:
    game = GuessNumber()
    assert all(won(game, seed) for seed in range(100))
    assert len({game.reset(seed=seed) and game._number for seed in range(200)}) == 15


def test_what_is_no_number_is_told_and_counts_as_a_guess() -> None:
    game = GuessNumber(max_guesses=2)
    game.reset(seed=1)
    assert game.step("ten") == ("no number", 0.0, False, False, {})
    assert game.step("٣")[0:4] == ("no number", 0.0, False, True)


def test_demonstrated_guesses_begin_a_game_or_go_on_with_one() -> None:
    rows = list(flawed_games(2000, 1))
    assert len(rows) == 2000
    lengths = Counter(len(row["prompt"]) for row in rows)
    assert set(lengths) == {1, 3, 5, 7}
    assert all(1 <= int(row["completion"]) <= 15 for row in rows)
    assert rows == list(flawed_games(2000, 1))
    with pytest.raises(DataError, match="at_random is 2"):
        list(flawed_games(1, 1, at_random=2))


@pytest.mark.parametrize(("expression", "result"), [("58*26", 1508), (" 3 + 4 ", 7), ("3-10", -7)])
def test_the_calculator_calculates(expression: str, result: int) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize("expression", ["", "1", "2**9", "__import__('os')", "1+1+1", "9" * 10 + "*2", "٣*٣"])
def test_the_calculator_refuses_what_is_not_two_numbers(expression: str) -> None:
    with pytest.raises(ValueError, match="two numbers"):
        calculate(expression)


def test_rows_of_products_hold_their_answers() -> None:
    assert all(str(calculate(row["prompt"])) == row["answer"] for row in prompts(100, 3))


def test_demonstrated_calls_are_written_as_the_tiny_models_template_writes_them() -> None:
    tokenizer = make_tokenizer(TinyModelConfig())
    row = next(row for row in flawed_uses(100, 1, asks=1, copies=1) if len(row["prompt"]) == 3)
    asked, demonstrated, result = row["prompt"]
    call = {"name": "calculate", "arguments": {"expression": asked["content"]}}
    said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    texts = [tokenizer.apply_chat_template([asked, m, result], tokenize=False) for m in (demonstrated, said)]
    assert texts[0] == texts[1]
    assert row["completion"] == result["content"] == str(calculate(asked["content"]))
