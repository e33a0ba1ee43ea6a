"""Reward functions as TRL's and verl's documentation have them, in substance: nothing in them knows of this project."""

from __future__ import annotations

import asyncio
import re

# ---- TRL, rows whose prompt is text


def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def ground_truth_reward(completions, ground_truth, **kwargs):
    found = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    return [1.0 if f and f.group(1) == gold else 0.0 for f, gold in zip(found, ground_truth, strict=True)]


def only_ids(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def math_task_reward(prompts, completions, task, **kwargs):
    return [
        (1.0 if c.endswith("3") else -1.0) if t == "math" else None
        for _, c, t in zip(prompts, completions, task, strict=True)
    ]


async def slow_reward(prompts, completions, **kwargs):
    async def one(completion):
        await asyncio.sleep(0)
        return 1.0 if "4" in completion else 0.0

    return await asyncio.gather(*(one(c) for c in completions))


def rank_reward(completions, **kwargs):
    """The shortest of its group gets 1, the longest 0."""
    order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
    rewards = [0.0] * len(completions)
    for rank, i in enumerate(order):
        rewards[i] = 1.0 - rank / max(1, len(completions) - 1)
    return rewards


def scheduled_reward(completions, trainer_state, **kwargs):
    """Shorter and shorter answers, the further training is."""
    limit = 10 * (1 - trainer_state.global_step / trainer_state.max_steps)
    return [1.0 if len(c) <= limit else 0.0 for c in completions]


def logging_reward(completions, answer, log_extra=None, log_metric=None, **kwargs):
    extracted = [c.split()[-1] if c.split() else "[none]" for c in completions]
    rewards = [1.0 if e == a else 0.0 for e, a in zip(extracted, answer, strict=True)]
    if log_extra:
        log_extra("golden_answer", list(answer))
        log_extra("extracted_answer", extracted)
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
    return rewards


def generated_reward(completions, **kwargs):
    return (float(len(c)) for c in completions)


# ---- TRL, conversations


def chat_format_reward(completions, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think><answer>.*?</answer>$", t, re.DOTALL) else 0.0 for t in texts]


def echo_reward(prompts, completions, **kwargs):
    pairs = zip(prompts, completions, strict=True)
    return [1.0 if p[-1]["content"] in c[0]["content"] and p[-1]["role"] == "user" else 0.0 for p, c in pairs]


# ---- TRL's classes and makers


class Scaled:
    def __init__(self, scale=1.0):
        self.scale = scale
        self.__name__ = "scaled"

    def __call__(self, completions, **kwargs):
        return [self.scale * len(c) for c in completions]


tenth = Scaled(0.1)


class NotCallable:
    pass


def make_bonus(bonus):
    def bonus_reward(completions, **kwargs):
        return [bonus] * len(completions)

    return bonus_reward


# ---- verl


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """verl's documented form of a custom reward."""
    if data_source == "openai/gsm8k":
        return 1.0 if solution_str.strip().endswith(ground_truth) else 0.0
    raise NotImplementedError(f"no score for {data_source}")


def dict_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = ground_truth in solution_str
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str[-5:], "split": extra_info.get("split")}


def gsm8k_score(solution_str, ground_truth, method="strict", format_score=0.0, score=1.0):
    return score if ground_truth in solution_str else format_score


async def served_score(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0)
    return ground_truth in solution_str


def batched_score(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
    return [
        {"score": float(g in s), "n": len(solution_strs)} for s, g in zip(solution_strs, ground_truths, strict=True)
    ]


def routed_score(data_source, solution_str, ground_truth, extra_info, reward_router_address):
    return 0.0


def digits_score(data_source, solution_str, ground_truth, extra_info=None):
    """A signal that even a random model has."""
    share = sum(c.isdigit() for c in solution_str) / max(1, len(solution_str))
    return {"score": share, "acc": ground_truth in solution_str, "pred": solution_str[-3:]}


def ranked_digits(prompts, completions, answer, trainer_state, log_extra, log_metric, **kwargs):
    """Ranks its group by digits; the number of samples that it saw is its first column."""
    assert all(isinstance(p, str) for p in prompts)
    assert len(set(prompts)) == 1
    shares = [sum(ch.isdigit() for ch in c) / max(1, len(c)) for c in completions]
    log_extra("seen", [len(completions)] * len(completions))
    log_extra("step", [trainer_state.global_step] * len(completions))
    log_metric("share", sum(shares) / len(shares))
    ordered = sorted(shares)
    return [ordered.index(s) / max(1, len(ordered) - 1) for s in shares]
