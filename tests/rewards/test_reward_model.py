"""The reward of a trained model, alone and in workers of its own beside other rewards."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.reward.by_function import RewardPools
from actors.reward.pool import RewardPool
from grpo_ray.config.reward import RewardConfig, RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.reward_model import _load, _Scorer
from grpo_ray.rewards.table import resolve
from grpo_ray.types import Sample, SampleInfo, Score, ScoreRequest, ScoreStatus, VersionSpan
from tests.endpoints import endpoint, vllm_server

TEXTS = ["yes", "no, not at all", "<think>hm</think>perhaps", ""]


@pytest.fixture(scope="module")
def scorer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path_factory.mktemp("scorer")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def plain_scores(folder: Path, prompts: list[Any], completions: list[str]) -> list[float]:
    """One text after the other, without padding."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    out = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = [
            *tokenizer(prompt)["input_ids"],
            *tokenizer(completion, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            out.append(model(torch.tensor([ids])).logits[0, 0].item())
    return out


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_plain_transformers_however_they_are_batched(
    scorer: Path, batch_tokens: int, chat: bool
) -> None:
    function = resolve(
        RewardFunctionConfig(name="reward_model", args={"path": str(scorer), "batch_tokens": batch_tokens}), load=True
    )
    prompts: list[Any] = ["1+1?", "Is it so? Or not?", "a", "b"]
    completions: list[Any] = TEXTS
    if chat:
        prompts = [[{"role": "user", "content": p}] for p in prompts]
        completions = [[{"role": "assistant", "content": c}] for c in TEXTS]
    scores = call_reward(function, ScoreInputs(prompts, completions, [[1]] * 4))
    assert [s.value for s in scores] == pytest.approx(plain_scores(scorer, prompts, TEXTS), abs=1e-5)


def test_a_model_is_loaded_in_the_dtype_that_args_name(scorer: Path) -> None:
    _load.cache_clear()
    for given, loaded in (({"dtype": "bfloat16", "num_threads": 2}, (2, "bfloat16")), ({}, (1, "float32"))):
        resolve(RewardFunctionConfig(name="reward_model", args={"path": str(scorer), **given}), load=True)
        forward: Any = _load(str(scorer), None, *loaded, False)._forward
        assert forward._model.dtype is getattr(torch, loaded[1])
        assert torch.get_num_threads() == loaded[0]
    assert _load.cache_info()[:2] == (2, 2)


def test_a_text_beyond_the_context_fails_alone(scorer: Path) -> None:
    function = resolve(RewardFunctionConfig(name="reward_model", args={"path": str(scorer)}))
    good, bad = call_reward(function, ScoreInputs(["a", "a"], ["b", "b" * 300], [[1], [1]]))
    assert good.status is ScoreStatus.OK
    assert bad.status is ScoreStatus.ERROR
    assert bad.detail == "the text has 302 tokens, the reward model's context is 256"


def test_a_model_that_is_not_there_is_told_before_the_run_and_one_that_scores_nothing_at_the_start(
    tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RewardError, match=r"holds no model \(no config.json\)"):
        resolve(RewardFunctionConfig(name="reward_model", args={"path": str(tmp_path)}))
    with pytest.raises(RewardError, match=r"needs args: \{path: FOLDER\}"):
        resolve(RewardFunctionConfig(name="reward_model"))
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    function = RewardFunctionConfig(name="reward_model", args={"path": str(tmp_path)})
    with pytest.raises(RewardError, match="has 2 labels, expected 1"):
        resolve(function, load=True)


def test_a_language_model_with_one_label_is_no_reward_model(tiny_model: Path, tmp_path: Path) -> None:
    """Its output layer would be random."""
    shutil.copytree(tiny_model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"id2label": {"0": "score"}, "label2id": {"score": 0}})
    )
    function = RewardFunctionConfig(name="reward_model", args={"path": str(tmp_path / "model")})
    with pytest.raises(RewardError, match=r"lacks 1 of the tensors of its model, which would be random: score\.weight"):
        resolve(function, load=True)


@pytest.mark.slow
def test_vllm_scores_as_transformers_does(scorer: Path) -> None:
    with vllm_server(scorer, "--runner", "pooling", max_model_len=256) as url:
        function = resolve(RewardFunctionConfig(name="reward_model", args={"path": str(scorer), "url": url}), load=True)
        scores = call_reward(function, ScoreInputs(["1+1?", "Is it so?", "a", "b"], TEXTS, [[1]] * 4))
    assert [s.value for s in scores] == pytest.approx(
        plain_scores(scorer, ["1+1?", "Is it so?", "a", "b"], TEXTS), abs=1e-3
    )
    (gone,) = call_reward(function, ScoreInputs(["a"], ["b"], [[1]]))
    assert gone.status is ScoreStatus.ERROR
    assert f"{url}/classify does not score (APIConnectionError" in gone.detail


def config(scorer: Path) -> RewardConfig:
    return RewardConfig.model_validate(
        {
            "functions": [
                {"name": "think_format", "weight": 0.5},
                {
                    "name": "reward_model",
                    "label": "helpful",
                    "part": "summary",
                    "sources": ["chat"],
                    "weight": 2.0,
                    "args": {"path": str(scorer)},
                    "workers": {"num_actors": 2, "num_cpus": 0.5},
                },
                {"name": "repetition_penalty"},
            ],
            "num_cpus": 0,
            "timeout_s": 30,
        }
    )


def test_a_function_with_workers_of_its_own_is_a_pool_of_its_own(scorer: Path) -> None:
    pools = config(scorer).pools
    assert {name: [f.title for f in part.functions] for name, part in pools.items()} == {
        "reward": ["think_format", "repetition_penalty"],
        "reward-helpful": ["helpful"],
    }
    part = pools["reward-helpful"]
    assert (part.num_actors, part.num_cpus, part.num_gpus, part.unit) == (2, 0.5, 0.0, "batch")


def requests(source: str) -> list[ScoreRequest]:
    ids = np.array([1, 2], np.int32)
    held = [
        Sample("d/0/0", i, ids, ids, np.zeros(2, np.float32), (VersionSpan(0, 0, 2),), "stop", t)
        for i, t in enumerate(TEXTS)
    ]
    infos = [SampleInfo("d/0/0", i, 2, 2, 0, "stop", "rollout-0", held, i) for i in range(len(TEXTS))]
    return [ScoreRequest(info, "1+1?", None, {"source": source}, 0) for info in infos]


async def score_all(whole: RewardConfig, folder: Path) -> tuple[list[list[Score]], set[str]]:
    pools = [await RewardPool.create(part, str(folder), name=name) for name, part in whole.pools.items()]
    try:
        scorer = RewardPools(whole, pools)
        both = await asyncio.gather(scorer.score(requests("chat")), scorer.score(requests("math")))
        return list(both), {track.worker for track in scorer.take_tracks()}
    finally:
        await asyncio.gather(*(pool.close() for pool in pools))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.long
def test_the_parts_of_several_pools_are_one_score_in_the_recipes_order(scorer: Path, tmp_path: Path) -> None:
    (chat, math), workers = asyncio.run(score_all(config(scorer), tmp_path))
    summaries = [t.rpartition("</think>")[2] for t in TEXTS]
    told = plain_scores(scorer, ["1+1?"] * 4, summaries)
    formats = [0.0, 0.0, 1.0, 0.0]
    assert [s.value for s in chat] == pytest.approx(
        [0.5 * f + 2.0 * v for f, v in zip(formats, told, strict=True)], abs=1e-5
    )
    assert [s.value for s in math] == pytest.approx([0.5 * f for f in formats])
    assert [p.name for p in chat[0].parts] == ["think_format", "helpful", "repetition_penalty"]
    assert [p.status for p in math[0].parts][1] is ScoreStatus.NOT_APPLICABLE
    assert workers == {"reward-0", "reward-helpful-0", "reward-helpful-1"}


def test_a_sample_that_is_lost_to_one_pool_is_a_lost_sample(scorer: Path) -> None:
    pools = RewardPools(config(scorer), [])
    lost = Score(ScoreStatus.CRASHED, float("nan"), (), "its object is gone")
    fine = replace(lost, status=ScoreStatus.OK, parts=(object(),))  # type: ignore[arg-type]
    assert pools._joined([fine, lost], 2) is lost


def test_a_served_model_is_asked_for_raw_scores_and_they_come_back_in_their_order(
    scorer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: dict[str, Any], _: int) -> tuple[int, dict[str, str], str]:
        rows = [{"index": i, "probs": [len(ids) / 2]} for i, ids in enumerate(request["input"])]
        return 200, {}, json.dumps({"data": rows[::-1]})

    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with endpoint(answer) as server:
        args = {"path": str(scorer), "url": server.url, "batch_tokens": 100}
        function = resolve(RewardFunctionConfig(name="reward_model", args=args), load=True)
        scores = call_reward(function, ScoreInputs(["1+1?", "a"], ["22", "bcdefgh"], [[1]] * 2))
    (request,) = server.requests
    tokenizer = AutoTokenizer.from_pretrained(scorer)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ("1+1?22", "abcdefgh")]
    assert request == {"input": ids, "use_activation": False}
    assert server.keys == ["Bearer sesame"]
    assert [s.value for s in scores] == [len(one) / 2 for one in ids]


@pytest.mark.parametrize(
    ("body", "what"),
    [('{"object": "list"}', "KeyError: 'data'"), ('{"data": [{"index": 0, "probs": []}]}', "IndexError")],
)
def test_an_answer_without_scores_is_no_score(scorer: Path, body: str, what: str) -> None:
    with endpoint(lambda request, number: (200, {}, body)) as server:
        function = resolve(RewardFunctionConfig(name="reward_model", args={"path": str(scorer), "url": server.url}))
        (score,) = call_reward(function, ScoreInputs(["a"], ["b"], [[1]]))
    assert score.status is ScoreStatus.ERROR
    assert f"reward 'reward_model': {server.url}/classify does not score ({what}" in score.detail


@pytest.mark.parametrize("batch_tokens", [1, 20, 40, 100, 8192])
def test_batches_keep_their_tokens_with_the_padding_and_the_longest_come_first(scorer: Path, batch_tokens: int) -> None:
    batches: list[list[int]] = []

    def forward(texts: list[Any]) -> list[float]:
        batches.append([len(text) for text in texts])
        return [float(len(text)) for text in texts]

    completions: list[Any] = ["x" * n for n in (9, 3, 30, 3, 17, 300, 1, 30, 12)]
    scores = _Scorer(str(scorer), forward, False).scores(["a"] * 9, completions, batch_tokens)
    # A token for each letter, one for the prompt, one for the end.
    assert [s for s in scores if not isinstance(s, RewardError)] == [n + 2 for n in (9, 3, 30, 3, 17, 1, 30, 12)]
    assert isinstance(scores[5], RewardError)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(batch) <= batch_tokens
    longest = [max(batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    least = {1: 8, 20: 6, 40: 5, 100: 2, 8192: 1}
    assert len(batches) == least[batch_tokens]


def test_a_model_without_weights_is_told_by_its_folder(scorer: Path, tmp_path: Path) -> None:
    for file in scorer.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    function = RewardFunctionConfig(name="reward_model", args={"path": str(tmp_path)})
    with pytest.raises(RewardError, match=rf"'reward_model': {re.escape(str(tmp_path))} can't be loaded: "):
        resolve(function, load=True)
