"""The process in which environments live: `python -m actors.environment.child REQUEST_FD RESPONSE_FD`.

It holds instances by their places, and answers one call at a time, in order, with one JSON line each. What a tool raises is text
for the model; what else of a user's code raises is a failure, which the parent reports. As for rewards, pickle goes down only.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Sequence
from typing import Any

from actors.environment.messages import Begin, Describe, End, Leave, Request, Setup, Step, ToolUse
from actors.reward.inside import extend_search_path, limit_memory, open_pipes, read_message, reply
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.episodes.described import LoadedClass, load_all
from grpo_ray.episodes.instances import Instance, seed_everything
from grpo_ray.errors import RewardError, kind_and_line
from grpo_ray.plain_terminal import clean_streams


class Environments:
    """The instances of this process."""

    def __init__(self, classes: dict[str, LoadedClass], functions: Sequence[Any]) -> None:
        self._classes = classes
        self._functions = functions
        self._instances: dict[tuple[int, str], Instance] = {}
        self._live: dict[int, Instance] = {}

    def answer(self, request: Request) -> dict[str, Any]:
        match request:
            case Begin():
                return {"observation": self._begin(request)}
            case Step():
                stepped = self._live[request.place].step(request.action)
                return {"messages": stepped.messages, "reward": stepped.reward, "done": stepped.done}
            case ToolUse():
                content, is_error = self._live[request.place].call(request.call)
                return {"content": content, "error": is_error}
            case End():
                return self._end(request)
            case Describe():
                described = {name: self._described(loaded) for name, loaded in self._classes.items()}
                return {"described": described, "functions": [f.name for f in self._functions]}
            case Leave():
                for instance in self._instances.values():
                    instance.close()
                return {}

    def _begin(self, request: Begin) -> Any:
        name = request.environment
        if name not in self._classes:
            raise RewardError(
                f"column 'environment' of the row is {name!r}, which is none of environment.classes: {', '.join(self._classes)}"
            )
        row = pickle.loads(request.row)
        seed_everything(request.seed)
        key = (request.place, name)
        if key not in self._instances:
            self._instances[key] = self._classes[name].instance()
        self._live[request.place] = instance = self._instances[key]
        return instance.reset(row, request.seed)

    def _end(self, request: End) -> dict[str, Any]:
        from actors.reward.answers import encode
        from grpo_ray.rewards.functions.scoring import call_reward

        instance = self._live[request.place]
        out: dict[str, Any] = {"reward": instance.reward(), "scores": []}
        if self._functions:
            inputs = pickle.loads(request.inputs)
            inputs.environments.append(instance.made)
            out["scores"] = [[f.name, *encode(call_reward(f, inputs)[0])] for f in self._functions]
        return out

    def _described(self, loaded: LoadedClass) -> dict[str, Any]:
        found = loaded.described()
        return {
            "title": found.title,
            "interface": found.interface,
            "schemas": found.schemas,
            "rewards": found.rewards,
        }


def main() -> None:
    clean_streams()
    requests, responses = open_pipes()
    me = os.getpid()
    setup: Setup = pickle.loads(read_message(requests))
    extend_search_path(setup.search_path)
    try:
        environments = Environments(load_all(setup.config), functions_beside(setup.functions))
    except RewardError as e:
        reply(responses, {"refused": str(e)})
        sys.exit(1)
    limit_memory(int(setup.config.memory_gb * 2**30))
    reply(responses, {"ready": True})
    while True:
        request = pickle.loads(read_message(requests))
        message, spent = safely(environments, request)
        if os.getpid() != me:
            os._exit(0)
        sys.stdout.flush()
        sys.stderr.flush()
        reply(responses, message)
        if spent or isinstance(request, Leave):
            os._exit(0)


def functions_beside(configs: Sequence[RewardFunctionConfig]) -> list[Any]:
    """The reward functions that name `environments`."""
    if not configs:
        return []
    from grpo_ray.rewards.table import resolve

    return [found for config in configs if (found := resolve(config)).in_episodes]


def safely(environments: Environments, request: Request) -> tuple[dict[str, Any], bool]:
    """The answer, or what was raised in its place; True beside it: memory ran out, and what filled it may still be held."""
    try:
        answer = environments.answer(request)
        json.dumps(answer)
        return answer, False
    except MemoryError as e:
        return {"raised": f"MemoryError: {e}; a process of environments may take environment.memory_gb"}, True
    except RewardError as e:
        return {"raised": str(e)}, False
    except Exception as e:
        return {"raised": kind_and_line(e)}, False


if __name__ == "__main__":
    main()
