"""Suffixes of turns and the templates of episodes, for the chat templates of families of models as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.episodes.suffix import TurnSuffixes, check_keeps_prefix
from grpo_ray.episodes.templates import CHANGES, episode_template
from grpo_ray.errors import ConfigError
from grpo_ray.models.files.tiny import make_tokenizer
from tests.episodes.chat_templates import TOOLS, tokenizer_of
from tests.families import family_tokenizer

ENDS = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "llama3_2": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "phi3_5": "<|end|>",
    "deepseek_r1_distill": "<\uff5cend▁of▁sentence\uff5c>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "lfm2_v2": "<|im_end|>",
    "nemotron_3_nano": "<|im_end|>",
    "muse_glimmer": "<|eot|>",
}
"""The token that ends a turn in each template."""
WITHOUT_TOOLS = {"gemma3", "phi3_5", "deepseek_r1_distill", "cohere2"}
THINKS = {"qwen3", "qwen3_6", "deepseek_r1_distill", "nemotron_3_nano"}
CASES = [(f, "user") for f in ENDS] + [(f, "tool") for f in ENDS if f not in WITHOUT_TOOLS]


def conversation(file: str, role: str) -> list[dict[str, Any]]:
    """Four turns of the model, and what it is told between them; the third turn calls two tools."""
    thought = "<think>\nthe number is five\n</think>\n\n" if file in THINKS else ""
    out: list[dict[str, Any]] = [{"role": "user", "content": "guess the number"}]
    for turn in range(4):
        calls = ["search", "guess"][: 1 + (turn == 2 and file != "llama3_2")] if role == "tool" and turn < 3 else []
        said: dict[str, Any] = {"role": "assistant", "content": f"{thought}is it {turn}?" if not calls else thought}
        if calls:
            said["tool_calls"] = [
                {"id": f"call0000{i}", "type": "function", "function": {"name": c, "arguments": {"text": "five"}}}
                for i, c in enumerate(calls)
            ]
        out.append(said)
        if turn < 3:
            heard = [{"role": "tool", "name": c, "content": f"{c} says no, {turn}"} for c in calls]
            out += heard or [{"role": "user", "content": f"no, guess once more: {turn}"}]
    return out


def places_of_turns(messages: Sequence[dict[str, Any]]) -> list[int]:
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def render(tokenizer: Any, template: str | None, messages: list[dict[str, Any]], ask: bool, tools: Any) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tools=tools, add_generation_prompt=ask, tokenize=False
    )
    return text


def turns_and_suffixes(tokenizer: Any, end: str, messages: list[dict[str, Any]], tools: Any) -> tuple[Any, ...]:
    """The template; the prompt's ids; the text of each turn of the model as the template writes it, its end token included; and
    the ids that follow each."""
    role = messages[2]["role"]
    template = episode_template(tokenizer, None, tools, None, roles=(role,)).text
    suffixes = TurnSuffixes(tokenizer, template, tools, None)
    places = places_of_turns(messages)
    turns, following = [], []
    for place, after in zip(places, [*places[1:], None], strict=True):
        asked = render(tokenizer, template, messages[:place], True, tools)
        whole = render(tokenizer, template, messages[: place + 1], False, tools)
        assert whole.startswith(asked)
        turns.append(whole[len(asked) :].partition(end)[0] + end)
        if after is not None:
            calls = [c["function"]["name"] for c in messages[place].get("tool_calls", ())]
            following.append(suffixes.after(messages[place + 1 : after], calls=calls))
    prompt = ids_of(tokenizer, render(tokenizer, template, messages[:1], True, tools))
    return template, prompt, turns, following


@pytest.mark.parametrize(("file", "role"), CASES)
@pytest.mark.parametrize("end_takes_blanks", [False, True])
def test_ids_built_turn_by_turn_are_the_templates_own_of_the_whole_conversation(
    file: str, role: str, end_takes_blanks: bool
) -> None:
    tokenizer = tokenizer_of(file, ENDS[file], end_takes_blanks=end_takes_blanks)
    tools = TOOLS if role == "tool" else None
    messages = conversation(file, role)
    template, ids, turns, following = turns_and_suffixes(tokenizer, ENDS[file], messages, tools)
    for turn, suffix in zip(turns, [*following, []], strict=True):
        ids = ids + ids_of(tokenizer, turn) + suffix
    whole = ids_of(tokenizer, render(tokenizer, template, messages, False, tools))
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]).strip() in ("", tokenizer.eos_token)
    assert all("no" in tokenizer.decode(suffix) for suffix in following)


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_turn_that_ends_with_the_next_messages_token_is_followed_by_the_rest_of_it(role: str) -> None:
    end = "<|observation|>" if role == "tool" else "<|user|>"
    tokenizer = tokenizer_of("glm4moe", end)
    tools = TOOLS if role == "tool" else None
    template, prompt, turns, following = turns_and_suffixes(tokenizer, end, conversation("glm4moe", role), tools)
    ids = prompt
    for turn, suffix in zip(turns[:3], following, strict=True):
        ids = ids + ids_of(tokenizer, turn) + suffix
    whole = render(tokenizer, template, conversation("glm4moe", role)[:-1], True, tools)
    assert ids == ids_of(tokenizer, whole)


def test_tokens_that_encoding_would_not_give_stay_as_they_were_sampled() -> None:
    tokenizer = tokenizer_of("qwen3", "<|im_end|>")
    messages = conversation("qwen3", "user")
    _, prompt, turns, canonical = turns_and_suffixes(tokenizer, "<|im_end|>", messages, None)
    suffixes = TurnSuffixes(tokenizer, episode_template(tokenizer, None, None, None).text, None, None)
    ids, places = list(prompt), places_of_turns(messages)
    for number, place in enumerate(places[:3]):
        before = list(ids)
        text = turns[number].removesuffix("<|im_end|>")
        sampled = [i for letter in text for i in ids_of(tokenizer, letter)] + ids_of(tokenizer, "<|im_end|>")
        assert ids_of(tokenizer, tokenizer.decode(sampled)) != sampled
        ids += sampled + suffixes.after([messages[place + 1]])
        assert ids[: len(before) + len(sampled)] == before + sampled
        assert ids[len(before) + len(sampled) :] == canonical[number]


@pytest.mark.parametrize(
    ("file", "family"),
    [
        ("qwen3", "Qwen3"),
        ("qwen3_6", "Qwen3.5"),
        ("qwen3_5_nothink", "Qwen3.5"),
        ("glm4moe", "GLM-4.5"),
        ("nemotron_3_nano", "Nemotron 3"),
        ("deepseek_r1_distill", "DeepSeek"),
        ("lfm2_2_5", "LFM2.5"),
    ],
)
def test_a_template_that_strips_reasoning_is_refused_and_its_change_writes_the_same_prompts(
    file: str, family: str
) -> None:
    tokenizer = tokenizer_of(file, ENDS.get(file, "<|im_end|>"))
    with pytest.raises(ConfigError, match=r"does not keep the text of earlier turns: .*: first '.*', then '.*'"):
        check_keeps_prefix(tokenizer, None, None, None)
    made = episode_template(tokenizer, None, None, None)
    assert made.told == (f"the model's own chat template, changed as for {family}: earlier turns keep their reasoning")
    system = {"role": "system", "content": "be brief"}
    for messages in (conversation(file, "user")[:1], [system, *conversation(file, "user")[:1]]):
        for tools in (None, TOOLS):
            prompts = {render(tokenizer, t, messages, True, tools) for t in (None, made.text)}
            assert len(prompts) == 1
    thought = "<think>\nhm\n</think>\n\n"
    said = [
        *conversation(file, "user")[:1],
        {"role": "assistant", "content": f"{thought}five"},
        *[system | {"role": "user"}],
    ]
    assert "hm" not in render(tokenizer, None, said, True, None)
    assert "hm" in render(tokenizer, made.text, said, True, None)


def test_thinking_that_is_switched_off_stays_so_in_every_turn() -> None:
    tokenizer = tokenizer_of("qwen3", "<|im_end|>")
    off = {"enable_thinking": False}
    template = episode_template(tokenizer, None, None, off).text
    ids = TurnSuffixes(tokenizer, template, None, off).after([{"role": "user", "content": "no"}])
    assert tokenizer.decode(ids) == ("\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_template_without_a_place_for_calls_or_results_says_so() -> None:
    with pytest.raises(ConfigError, match="does not write calls of tools"):
        check_keeps_prefix(tokenizer_of("gemma3", "<end_of_turn>"), None, TOOLS, None, roles=("tool",))
    dropped = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role }}{{ m.content }}{{ m.tool_calls }}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(ConfigError, match="does not write messages of role 'tool'"):
        TurnSuffixes(tokenizer_of("qwen3", "<|im_end|>"), dropped, TOOLS, None).after(
            [{"role": "tool", "name": "search", "content": "no"}]
        )
    with pytest.raises(ConfigError, match=r"<\|return\|>', then '.*<\|end\|>"):
        check_keeps_prefix(tokenizer_of("gptoss", "<|return|>"), None, None, None)


def test_a_template_of_ones_own_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "kept.jinja"
    tokenizer = tokenizer_of("qwen3", "<|im_end|>")
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made = episode_template(tokenizer, str(path), None, None)
    assert made.told == f"{path}, instead of the model's own chat template"
    ids = TurnSuffixes(tokenizer, made.text, None, None).after([{"role": "user", "content": "no"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nno<|im_end|><|im_start|>assistant\n"
    path.write_text("{% for m in messages %}{{ m.content if loop.last }}<|im_end|>{% endfor %}")
    with pytest.raises(ConfigError, match="does not keep the text"):
        episode_template(tokenizer, str(path), None, None)
    with pytest.raises(ConfigError, match=r"environment\.template '.*gone\.jinja' can't be read"):
        episode_template(tokenizer, str(tmp_path / "gone.jinja"), None, None)


def test_no_known_change_fits_what_has_no_end_or_no_template() -> None:
    with pytest.raises(ConfigError, match="written in another way once a message follows"):
        episode_template(family_tokenizer("no end"), None, None, None)
    assert [change.of("{{ messages }}") for change in CHANGES] == [None] * len(CHANGES)


def test_the_tiny_models_template_keeps_its_turns() -> None:
    tokenizer = make_tokenizer(TinyModelConfig())
    check_keeps_prefix(tokenizer, None, None, None)
    ids = TurnSuffixes(tokenizer, None, None, None).after([{"role": "user", "content": "no"}])
    assert tokenizer.decode(ids) == "<|user|>no<|assistant|>"


def test_a_name_that_the_model_made_up_is_no_matter_of_the_template() -> None:
    tokenizer = tokenizer_of("qwen2_5", "<|im_end|>")
    suffixes = TurnSuffixes(tokenizer, None, TOOLS, None)
    heard = [{"role": "tool", "name": 'x"\n}', "content": "no such tool"}]
    assert suffixes.after(heard, calls=['x"\n}']) == suffixes.after(heard, calls=["search"])


class _Clock:
    """A date that a template asks for: it changes once after so many questions, or at each."""

    def __init__(self, asked: int | None) -> None:
        self.asked = asked
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count if self.asked is None else self.count > self.asked


def test_midnight_between_two_renderings_is_no_change_of_the_template() -> None:
    dated = "{{ today() }}{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = tokenizer_of("qwen2_5", "<|im_end|>")
    heard = [{"role": "user", "content": "no"}]
    want = TurnSuffixes(tokenizer, dated, None, {"today": lambda: 0}).after(heard)
    for asked in range(1, 6):
        assert TurnSuffixes(tokenizer, dated, None, {"today": _Clock(asked)}).after(heard) == want
    with pytest.raises(ConfigError, match="does not keep the text"):
        TurnSuffixes(tokenizer, dated, None, {"today": _Clock(None)}).after(heard)
