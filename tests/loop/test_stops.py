"""What ends a sample, and what rewards read of it: the text as it was written, whichever tokens are special."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_ray.config.loading import build
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.turns import end_of_turn
from grpo_ray.errors import ConfigError
from grpo_ray.loop.stops import Stops, find_stops, name_turn_end, stops_of_run, template_end
from grpo_ray.models.files.loading import eos_ids, load_tokenizer
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.table import resolve
from launch.check.command import _data_rows
from launch.check.model import ModelFiles
from tests.families import FAMILIES, family_tokenizer

PERFECT = "<think>2+2</think><answer>4</answer>"


def stops_of(name: str, template: str = "chat", **options: Any) -> Stops:
    tokenizer = family_tokenizer(name)
    end = template_end(tokenizer, template)
    return find_stops(tokenizer, [tokenizer.eos_token_id], end, len(tokenizer), **options)


def ids_of(name: str, *tokens: str) -> list[int]:
    ids: list[int] = family_tokenizer(name).convert_tokens_to_ids(list(tokens))
    return ids


@pytest.mark.parametrize("name", FAMILIES)
def test_what_ends_a_demonstration_ends_a_sample(name: str) -> None:
    family = FAMILIES[name]
    assert stops_of(name).token_ids == tuple(dict.fromkeys(ids_of(name, family.eos, family.end)))
    assert stops_of(name, "raw").token_ids == tuple(ids_of(name, family.eos))


def test_the_model_s_own_ends_are_those_of_its_files(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
    eos = tokenizer.eos_token_id
    for named, want in ((5, [eos, 5]), ([6, 5, eos], [eos, 6, 5]), (None, [eos])):
        file = folder / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": named}))
        assert eos_ids(str(folder), tokenizer, trust_remote_code=False) == want
    file.unlink()
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert eos_ids(str(folder), tokenizer, trust_remote_code=False) == [eos, 4]


def test_an_exported_model_names_the_end_of_its_template_s_turns() -> None:
    from transformers import GenerationConfig

    for name, before in (("qwen base", 0), ("qwen base", None), ("qwen base", [0, 2]), ("llama2", 0)):
        (end,) = ids_of(name, FAMILIES[name].end)
        model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=before))
        for _ in range(2):
            name_turn_end(model, family_tokenizer(name))
            named = before if isinstance(before, list) else [i for i in [before] if i is not None]
            assert model.generation_config.eos_token_id == [*named, end]
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=end))
    name_turn_end(model, family_tokenizer("llama2"))
    assert model.generation_config.eos_token_id == end
    name_turn_end(SimpleNamespace(generation_config=None), family_tokenizer("llama2"))


@pytest.mark.parametrize("template", ["raw", "chat"])
def test_a_stop_string_that_is_a_special_token_stops_and_leaves_the_text_unless_it_is_a_tag(template: str) -> None:
    name = "qwen base"
    tokenizer = family_tokenizer(name)
    stops = stops_of(name, template, strings=["<|im_end|>"])
    (im_end,) = ids_of(name, "<|im_end|>")
    assert im_end in stops.token_ids
    assert stops.read(tokenizer, [*tokenizer("yes")["input_ids"], im_end]) == "yes"
    thinker = family_tokenizer("qwen3")
    stops = stops_of("qwen3", template, strings=["</answer>"])
    assert ids_of("qwen3", "</answer>")[0] in stops.token_ids
    assert stops.read(thinker, thinker(PERFECT)["input_ids"]) == PERFECT
    told = stops_of("qwen3", template, token_ids=ids_of("qwen3", "</answer>", "<|endoftext|>"))
    assert told.read(thinker, thinker(PERFECT)["input_ids"]) == PERFECT
    assert told.read(thinker, thinker("a<|endoftext|>")["input_ids"]) == "a"


@pytest.mark.parametrize(
    ("strings", "words"),
    [
        ([""], "holds an empty text"),
        (["<|endoftext|>\n"], r"can never match: a sample ends with its <\|endoftext\|>, before the rest"),
        (["\n<|im_end|>\n"], r"can never match: a sample ends with its <\|im_end\|>"),
        (["ok", "<|endoftext|><|endoftext|>"], "can never match"),
    ],
)
def test_a_stop_string_that_can_never_match_is_refused(strings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stops_of("qwen base", strings=strings)


def test_stop_strings_that_can_match_are_taken() -> None:
    strings = ["\n\n", "</answer>\n", "Question:", "\n<|im_end|>", "<|im_start|>user", "größer"]
    assert stops_of("qwen base", strings=strings).strings == tuple(strings)


def test_a_stop_string_beyond_the_tokenizer_s_letters_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="</s>")
    assert find_stops(tokenizer, [3], None, 4, ["a b"]).strings == ("a b",)
    for string in ("c", "a c"):
        with pytest.raises(ConfigError, match="the tokenizer has no tokens for all of it"):
            find_stops(tokenizer, [3], None, 4, [string])


def test_stop_tokens_are_those_of_the_model_s_vocabulary(tiny_model: Path) -> None:
    def run(**rollout: Any) -> RunConfig:
        raw = {
            "model": {"path": str(tiny_model)},
            "data": {"train": {"path": "unused.jsonl"}},
            "rollout": rollout,
            "reward": {"functions": [{"name": "accuracy"}]},
        }
        return build(RunConfig, raw, "test")

    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
    assert stops_of_run(run(stop_token_ids=[7, 7]), tokenizer, str(tiny_model)).token_ids == (1, 7)
    last = len(tokenizer) - 1
    # A model's file may name an end that its logits do not reach.
    assert find_stops(tokenizer, [last + 1, 1, last], None, last + 1).token_ids == (1, last)
    for wrong in (last + 1, 10**6):
        with pytest.raises(ConfigError, match=rf"rollout\.stop_token_ids holds {wrong}, .* go from 0 to {last}"):
            stops_of_run(run(stop_token_ids=[wrong]), tokenizer, str(tiny_model))
    with pytest.raises(ConfigError, match=r"rollout\.stop_token_ids"):
        run(stop_token_ids=[-1])


def test_check_says_what_ends_a_sample_or_an_answer_and_that_the_template_opens_the_thinking(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
    ends = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|system|>\n{% endfor %}"
    tokenizer.chat_template = ends + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    tokenizer.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": "<think>\nr</think>a"}) + "\n")
    common: dict[str, Any] = {"model": {"path": str(folder)}, "data": {"train": {"path": str(tmp_path / "rows.jsonl")}}}
    rollout = {
        "rollout": {"stop": ["</answer>"], "stop_token_ids": [0]},
        "reward": {"functions": [{"name": "r1_format"}]},
    }
    config = build(RunConfig, {**common, **rollout}, "t")
    files = ModelFiles(config.model)
    rows = dict(_data_rows(config, files, imports=True))
    assert rows["ends"] == "a sample ends at <eos> (1), <|system|> (4), <pad> (0), '</answer>'"
    assert rows["thinking"].startswith("the template opens <think>")
    rows = dict(_data_rows(build(SftConfig, common, "t"), files, imports=True))
    assert rows["ends"] == "an answer ends with <|system|> (4), as the chat template ends a turn"
    rows = dict(
        _data_rows(
            build(SftConfig, {**common, "data": {**common["data"], "template": "raw"}}, "t"), files, imports=True
        )
    )
    assert rows["ends"] == "an answer ends with <eos> (1), the tokenizer's end-of-sequence token"


# What rewards read


def score(name: str, completion: str) -> float:
    (result,) = call_reward(
        resolve(RewardFunctionConfig(name=name)), ScoreInputs(["q"], [completion], [[1]], {"answer": ["4"]})
    )
    return result.value


@pytest.mark.parametrize("family", ["qwen3", "qwen base"], ids=["special tags", "added tags"])
def test_a_perfect_text_has_full_marks_whether_or_not_its_tags_are_special_tokens(family: str) -> None:
    tokenizer = family_tokenizer(family)
    written = tokenizer(PERFECT, add_special_tokens=False)["input_ids"]
    assert len(written) == 4 + 3 + 1
    for end in ([], [tokenizer.eos_token_id], ids_of(family, "<|im_end|>")):
        text = stops_of(family).read(tokenizer, [*written, *end])
        assert text == PERFECT
        assert [score(n, text) for n in ("r1_format", "think_format", "accuracy")] == [1.0, 1.0, 1.0]


def test_only_the_last_token_is_left_out_and_only_if_it_ends_the_turn() -> None:
    tokenizer, stops = family_tokenizer("qwen base"), stops_of("qwen base")
    for text in ("<|im_start|>user\nhello , world .", "ends <|im_start|>", "", " spaced  out "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert stops.read(tokenizer, ids) == stops.read(tokenizer, [*ids, tokenizer.eos_token_id]) == text


def test_of_two_tokens_that_begin_alike_the_longer_ends_a_turn(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
    tokenizer.add_tokens(["<end", "<end>"])
    end = end_of_turn(tokenizer, lambda messages: f"? {messages[-1]['content']}<end>\n")
    assert (end.token, end.id) == ("<end>", tokenizer.convert_tokens_to_ids("<end>"))
