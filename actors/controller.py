"""The named actor that owns a run: has the pools built (workers.py), runs the loop, keeps what it has to tell, takes commands.

    driver (launch/follow.py)  -- run, events, stop -->  Controller  --> pools --> actors
    command line                          -- scale -->

The driver may vanish and come back; the run is here. Only references and small records pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.cluster import has_gpus, shares_devices
from actors.controller_start import LOG_NAME
from actors.deaths import fate, kind_of, memory_wait_s
from actors.notices import heed, watch_notices
from actors.owner import controller_of, folders_of
from actors.ray_metrics import RayMetrics
from actors.runtime import give_way, settle_garbage_collector, within
from actors.scaler import RunScaler
from actors.workers import Started, Workers
from grpo_ray.attention import cpu_has_bf16
from grpo_ray.checkpoint import RunDir
from grpo_ray.config import DpoConfig, RunConfig, SftConfig, Strict
from grpo_ray.config_effects import about_context, check_context
from grpo_ray.cursor import Cursor
from grpo_ray.ended import write_ended
from grpo_ray.epochs import run_length
from grpo_ray.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    GrpoRayError,
    LostSamplesError,
    NoMemoryError,
    WorkerError,
)
from grpo_ray.eval_record import answers_folder, set_figures, write_figures
from grpo_ray.evaluate import eval_event, evaluate
from grpo_ray.events import EndEvent, Event, EventLog, MessageEvent, PhaseEvent
from grpo_ray.ledger import Ledger
from grpo_ray.manifest import digest_of
from grpo_ray.messages import MessageLog
from grpo_ray.models import context_length, load_config, load_tokenizer, prepare_model
from grpo_ray.names import check_name, run_name
from grpo_ray.ownership import holding
from grpo_ray.plain_terminal import say
from grpo_ray.prompts import PromptDataset, PromptSets, load_eval_prompts, load_prompts, trained_on
from grpo_ray.records import last_step, set_aside
from grpo_ray.replay import TOLERANCE, compare, parts_of, read_batch
from grpo_ray.rewards.columns import ColumnNeeds, check_columns, check_sets, eval_sets_told
from grpo_ray.roles import Tracker
from grpo_ray.rollout_log import ParquetRolloutLog, remove_after, rollout_path
from grpo_ray.sample_figures import figures_in
from grpo_ray.sample_files import SampleFolder
from grpo_ray.sampling import about_answers, about_samples, sample_all, write_answers
from grpo_ray.scaling import record, rescaled
from grpo_ray.secrets import hide_secrets
from grpo_ray.sft_loop import SftLoop
from grpo_ray.stops import stops_of_run
from grpo_ray.supervised import load_task
from grpo_ray.tokenized import LoadReport
from grpo_ray.tracking import make_trackers, read_metrics
from grpo_ray.train_loop import Roles, TrainLoop
from grpo_ray.types import Group, Sample, TrainBatch

KEEP_MESSAGES = ("grpo", "sft", "dpo", "reward_model")
"""Kinds of run that have a report of their own."""
START_AGAIN_S, LONGEST_WAIT_S = 2.0, 16.0
"""Between two starts of learners, at first and at most."""
LINGER_S = 30.0
"""How long a controller whose run has ended waits for someone to read that, before it goes."""


class Controller:
    """One run. Its methods are coroutines on one event loop: `stop` and `events` answer while `run` is under way."""

    def __init__(
        self,
        kind: str,
        config: RunConfig | SftConfig,
        run_dir: str,
        resume_step: int | None,
        needs: Sequence[ColumnNeeds] = (),
        detached: bool = False,
    ) -> None:
        give_way()
        self._kind = kind
        self._config: Strict = config
        self._run = RunDir(Path(run_dir)).with_checkpoints(config.checkpoint.path, config.deadlines.store_s)
        self._resume_step = resume_step
        self._needs = needs
        self._detached = detached
        self._lost: str | None = None
        self._events = EventLog()
        self._messages = MessageLog(self._run.path) if kind in KEEP_MESSAGES else None
        self._news = asyncio.Event()
        self._stop_reason: str | None = None
        self._loop: Any = None
        self._work: asyncio.Task[str] | None = None
        self._scaler: RunScaler | None = None

    async def run(self) -> None:
        """The whole run. How it ended is the last event; this never raises."""
        self._work = asyncio.create_task(self._alone())
        try:
            reason = await self._work
            end = EndEvent(reason, "")
        except asyncio.CancelledError:
            end = EndEvent("failed", self._lost) if self._lost else EndEvent(self._stop_reason or "cancelled", "")
        except BaseException as e:
            end = EndEvent("failed", hide_secrets(_message(e)))
            say(hide_secrets(traceback.format_exc()), error=True)
        if self._scaler is not None:
            await self._scaler.close()
            self._scaler = None
        self._keep_end(end)
        self._emit(end)
        self._leaving = asyncio.create_task(self._leave())

    def _keep_end(self, end: EndEvent) -> None:
        """For `resume`, which need not start anything then. A full disk is told by what has to be written."""
        if self._messages is not None and self._loop is not None:
            assert isinstance(self._config, RunConfig | SftConfig)
            with contextlib.suppress(OSError):
                loop = self._loop
                write_ended(self._run.path, self._config, end.status, end.text, loop.step, loop.total_steps)

    async def _leave(self) -> None:
        """A detached actor has nobody who ends it; the name of its run must become free."""
        await asyncio.sleep(LINGER_S)
        ray.kill(ray.get_runtime_context().current_actor)

    async def events(self, after: int, wait_s: float) -> tuple[list[Event], int]:
        """What happened from event number `after` on, and the number to ask from next time; waits up to `wait_s` for something."""
        if self._events.count <= after:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except TimeoutError:
                return [], after
        return self._events.since(after), self._events.count

    async def stop(self, reason: str, now: bool = False) -> None:
        """End after the step under way, with a checkpoint; before the first step, or `now`, at once.

        Raises:
            ConfigError: the reason is not a word: it becomes the run's status.
        """
        self._stop_reason = check_name(reason, "the reason of a stop")
        if self._loop is not None and not now:
            self._loop.stop(reason)
        elif self._work is not None:
            self._work.cancel()

    async def scale(self, words: Sequence[str]) -> str:
        """See `RunScaler.scale`.

        Raises:
            ConfigError: as there; or it has no workers at the moment, or is no run of `grpo-ray train`.
        """
        if self._scaler is None:
            raise ConfigError(
                f"{run_name(self._run.path)} can't be scaled: "
                + ("it has no workers, yet or any more" if self._kind == "grpo" else f"it is a run of `{self._kind}`")
            )
        return await self._scaler.scale(words)

    def _emit(self, event: Event) -> None:
        if isinstance(event, MessageEvent):
            event = replace(event, text=hide_secrets(event.text))
        if self._messages is not None:
            step = self._loop.step if self._loop is not None else 0
            match event:
                case MessageEvent():
                    self._messages.add(step, event.level, event.text)
                case EndEvent(status="failed"):
                    self._messages.add(step, "error", event.text)
        self._events.add(event)
        self._news.set()

    def _phase(self, phase: str, detail: str = "", done: int = 0, total: int = 0) -> None:
        self._emit(PhaseEvent(phase, detail, done, total))

    def _warn(self, text: str) -> None:
        self._emit(MessageEvent("warning", text))

    async def _alone(self) -> str:
        """The run, while nobody else writes in its folders. To them this writes nothing when somebody does."""
        messages, self._messages = self._messages, None
        here = asyncio.get_running_loop()

        def tell(text: str) -> None:
            here.call_soon_threadsafe(self._warn, text)

        def lose(reason: str) -> None:
            here.call_soon_threadsafe(self._lose, reason)

        me = controller_of(run_name(self._run.path), self._kind, detached=self._detached)
        held = holding(folders_of(self._run, self._kind), me, tell, lose)
        await asyncio.to_thread(held.__enter__)
        self._messages = messages
        try:
            return await self._run_kind()
        finally:
            await asyncio.to_thread(held.__exit__, None, None, None)

    def _lose(self, reason: str) -> None:
        self._lost, self._messages = reason, None
        if self._work is not None:
            self._work.cancel()

    async def _run_kind(self) -> str:
        match self._config, self._kind:
            case RunConfig() as config, "grpo":
                return await self._grpo(config)
            case RunConfig() as config, "eval":
                return await self._eval(config)
            case RunConfig() as config, "sample":
                return await self._sample(config)
            case RunConfig() as config, "replay":
                return await self._replay(config)
            case SftConfig() as config, "sft" | "dpo" | "reward_model":
                return await self._supervised(config)
        raise ConfigError(f"no run of kind {self._kind} with a {type(self._config).__name__}")

    # The kinds of run. Data are read while the workers start; what is wrong with them ends the start.

    async def _grpo(self, config: RunConfig) -> str:
        model = await self._prepare_model(config)
        async with Workers(config, self._run, model, self._phase, self._warn) as workers:
            async with asyncio.TaskGroup() as tasks:
                loading = tasks.create_task(self._load_prompts(config, model))
                starting = tasks.create_task(workers.start_all(self._num_steps(config, loading)))
            prompts, roles = loading.result(), starting.result()
            self._scaler = RunScaler(
                config,
                workers,
                lambda numbers: record(self._run.config, numbers),
                lambda level, text: self._emit(MessageEvent(level, text)),
            )

            async def again() -> None:
                nonlocal roles
                roles = await workers.replace_learner(roles)
                if self._resume_step is None:
                    await roles.weights.sync(0)

            return await self._outlive_learners(
                workers, lambda: self._train(config, prompts, roles, workers), again, config
            )

    async def _train(self, config: RunConfig, prompts: PromptSets, roles: Started, workers: Workers) -> str:
        await self._keep_records()
        rollout_log = await self._rollout_log(config)
        trackers = self._trackers(config, workers)
        ledger = Ledger(self._run.ledger)
        if self._resume_step is None:
            ledger.roll_back(0, 0)
        loop = TrainLoop(
            config,
            Roles(
                roles.sampler,
                roles.scorer,
                roles.learner,
                roles.weights,
                rollout_log,
                roles.voter,
                shares_devices(config, has_gpus()),
                samples=RaySamples(),
                scaler=self._scaler,
            ),
            Cursor(prompts.train, seed=config.seed, shuffle=config.data.shuffle),
            {name: list(held_out) for name, held_out in prompts.eval.items()},
            ledger,
            self._run,
            trackers,
            self._emit,
        )
        try:
            return await self._run_loop(loop)
        finally:
            await rollout_log.close()
            ledger.close()
            for tracker in trackers:
                tracker.close()

    async def _outlive_learners(
        self,
        workers: Workers,
        train: Callable[[], Awaitable[str]],
        start_again: Callable[[], Awaitable[None]],
        config: RunConfig | SftConfig,
    ) -> str:
        """`train`, and from the newest checkpoint once more whenever learners were lost, or samples with their node;
        `learner.max_restarts` times without a step more."""
        deaths, died_at = 0, -1
        while True:
            try:
                return await train()
            except Exception as e:
                step = self._loop.step if self._loop is not None else 0
                deaths = deaths + 1 if step <= died_at else 1
                mendable = workers.lost_learner is not None or isinstance(_first_typed(e), LostSamplesError)
                short = isinstance(_first_typed(e), NoMemoryError)
                if mendable and short and self._stop_reason is None and deaths > config.learner.max_restarts:
                    raise NoMemoryError(
                        f"{_message(e)}\nThat was {deaths} times without a step more (learner.max_restarts). Lower that in "
                        f"{self._run.config}, and `grpo-ray resume {self._run.path}` goes on"
                    ) from None
                if not mendable or self._stop_reason is not None or deaths > config.learner.max_restarts:
                    raise
                died_at = max(step, died_at)
                lost = _message(e)
            told: list[str] = []
            had_one = self._resume_step is not None or await asyncio.to_thread(last_step, self._run) > 0
            self._resume_step = await asyncio.to_thread(self._run.newest_whole, told.append)
            if self._resume_step is None and had_one:
                raise CheckpointError(
                    f"{lost}\nLearners can't start again: the checkpoints of this run, in {self._run.store.url}, are not there any "
                    f"more. Put them back, then `grpo-ray resume {self._run.path}` goes on; nothing that is recorded was changed"
                )
            start = "the beginning" if self._resume_step is None else f"the checkpoint of step {self._resume_step}"
            for text in (
                *told,
                f"{lost}\nStep {step + 1} can't be done with what is left; learners start again from {start}",
            ):
                self._warn(text)
            await asyncio.sleep(memory_wait_s(deaths) if short else 0)
            await self._started(start_again, config.deadlines.start_s)

    async def _started(self, start_again: Callable[[], Awaitable[None]], limit_s: float) -> None:
        """Learners that die while they start are started once more, later and later, within `limit_s`: as long as Ray does not know
        that a node is dead, it puts new ones there."""
        give_up = time.monotonic() + limit_s
        wait_s = START_AGAIN_S
        while True:
            try:
                await start_again()
                return
            except WorkerError as e:
                if self._stop_reason is not None or time.monotonic() + wait_s > give_up:
                    raise
                self._warn(f"{_message(e)}\nLearners start again in {wait_s:g} s")
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    @staticmethod
    async def _num_steps(config: RunConfig, loading: asyncio.Task[PromptSets]) -> int:
        """What the learning rate's schedule needs to know; the data have to be there only if it is not given."""
        return config.num_steps or run_length(config, len((await loading).train)).num_steps

    async def _supervised(self, config: SftConfig) -> str:
        model = await self._prepare_model(config)
        self._phase("data")
        tokenizer = await asyncio.to_thread(load_tokenizer, model, trust_remote_code=config.model.trust_remote_code)
        task = await asyncio.to_thread(load_task, config, tokenizer)
        self._tell_what_was_left_out(task.dataset.report)
        length = run_length(config, len(task.dataset))
        async with Workers(config, self._run, model, self._phase, self._warn) as workers:
            learner = await workers.start_learner(length.num_steps)

            async def fine_tune() -> str:
                await self._keep_records()
                trackers = self._trackers(config, workers)

                def cursor() -> Cursor[Any]:
                    return Cursor(task.dataset, seed=config.seed, shuffle=config.data.shuffle)

                def measure() -> Awaitable[dict[str, float]]:
                    return task.measure(learner)

                loop = SftLoop(
                    config,
                    learner,
                    cursor(),
                    self._run,
                    trackers,
                    self._emit,
                    task.batch,
                    measure if task.measures else None,
                )
                if isinstance(config, DpoConfig):
                    self._phase("reference")
                await task.prepare(learner, self._run.path, cursor(), length.num_rows)
                try:
                    return await self._run_loop(loop)
                finally:
                    for tracker in trackers:
                        tracker.close()

            async def again() -> None:
                nonlocal learner
                await workers.close_learner()
                learner = await workers.start_learner_again()

            return await self._outlive_learners(workers, fine_tune, again, config)

    def _trackers(self, config: RunConfig | SftConfig, workers: Workers) -> list[Tracker]:
        # Of a run that begins again, nothing that it told before stays.
        resume_step = -1 if self._resume_step is None else self._resume_step
        out = make_trackers(config.tracking, self._run.path, resume_step, config.model_dump(mode="json"))
        if config.tracking.prometheus:
            out.append(RayMetrics(run_name(self._run.path), workers.live))
        return out

    async def _keep_records(self) -> None:
        """Of steps that will be done again, before they are taken back."""
        last = await asyncio.to_thread(last_step, self._run)
        folder = await asyncio.to_thread(set_aside, self._run, self._resume_step)
        if folder is not None:
            start = self._resume_step or 0
            what = f"steps {start + 1} to {last} will be done again; " if last > start else ""
            self._emit(MessageEvent("info", f"{what}what was recorded after step {start} is in {folder} now"))

    async def _run_loop(self, loop: TrainLoop | SftLoop[Any]) -> str:
        self._loop = loop
        if self._stop_reason is not None:
            loop.stop(self._stop_reason)
        if self._resume_step is not None:
            self._phase("restoring", f"step {self._resume_step}")
            await loop.restore(self._resume_step)
        settle_garbage_collector(loop.config.samples_under_way if isinstance(loop, TrainLoop) else 0)
        watching = asyncio.create_task(watch_notices(lambda notice: self._warn(heed(notice, loop))))
        watching.add_done_callback(self._tell_unless_cancelled)
        try:
            return await loop.run()
        finally:
            watching.cancel()

    def _tell_unless_cancelled(self, watching: asyncio.Task[None]) -> None:
        if not watching.cancelled() and (error := watching.exception()) is not None:
            self._warn(f"notices of nodes that are taken away are not heard any more: {error}")

    async def _eval(self, config: RunConfig) -> str:
        # Nothing is trained, and an exported model has its adapters in it: samplers need no room for any.
        config = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
        model = await self._prepare_model(config)
        async with Workers(config, self._run, model, self._phase, self._warn) as workers:
            async with asyncio.TaskGroup() as tasks:
                loading = tasks.create_task(self._load_held_out(config, model))
                hashing = tasks.create_task(asyncio.to_thread(model_digest, model))
                sampling = tasks.create_task(workers.start_sampler())
                scoring = tasks.create_task(workers.start_scorer())
                voting = tasks.create_task(workers.start_voter())
            began = time.monotonic()
            sets = {}
            for name, prompts in loading.result().items():
                result = await evaluate(
                    list(prompts),
                    sampling.result(),
                    scoring.result(),
                    voting.result(),
                    config,
                    progress=partial(self._phase, "eval", name),
                )
                about = about_answers(config, prompts, config.model.path or "tiny", hashing.result())
                figures = await write_answers(
                    answers_folder(self._run.path, name), about, prompts, result, RaySamples()
                )
                sets[name] = set_figures(result, figures)
                self._emit(eval_event(0, name, result))
                self._emit(MessageEvent("info", f"{name}: {figures}" if name else str(figures)))
                if result.warning is not None:
                    self._warn(result.warning)
            seconds = time.monotonic() - began
            await asyncio.to_thread(write_figures, self._run.path, config, hashing.result(), sets, seconds)
        return "finished"

    async def _sample(self, config: RunConfig) -> str:
        # As in `_eval`: nothing is trained.
        config = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
        model = await self._prepare_model(config)
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(self._load_prompts(config, model))
            hashing = tasks.create_task(asyncio.to_thread(model_digest, model))
        prompts = loading.result().train
        about = about_samples(config, prompts, config.model.path or "tiny", hashing.result())
        samples = await asyncio.to_thread(SampleFolder.open, self._run.samples, about)
        if not samples.missing():
            await self._tell_figures(samples)
            return "finished"
        async with Workers(config, self._run, model, self._phase, self._warn) as workers:
            async with asyncio.TaskGroup() as tasks:
                sampling = tasks.create_task(workers.start_sampler())
                scoring = tasks.create_task(workers.start_scorer())
            progress = partial(self._phase, "rollout", "")
            report = await sample_all(
                prompts, sampling.result(), scoring.result(), RaySamples(), samples, config, progress
            )
        speed = report.num_tokens / report.seconds
        told = f"{report.num_made} samples, {report.num_tokens} tokens in {report.seconds:.1f} s ({speed:.0f} tokens/s)"
        if report.num_before:
            told += f"; {report.num_before} samples were there already"
        self._emit(MessageEvent("info", told))
        await self._tell_figures(samples)
        if report.num_unscored:
            self._warn(
                f"{report.num_unscored} of {report.num_made} samples have no reward, e.g.: {report.why_unscored}"
            )
        for one in report.left_out:
            self._emit(MessageEvent("warning", f"without samples: {one.why}"))
        return "finished"

    async def _tell_figures(self, samples: SampleFolder) -> None:
        """Of all that is there, also of what an earlier call made."""
        self._emit(MessageEvent("info", str(await asyncio.to_thread(figures_in, samples.path))))

    async def _replay(self, config: RunConfig) -> str:
        """The learner's part of the step after `resume_step` once more, with nothing written but logs."""
        assert self._resume_step is not None
        step = self._resume_step + 1
        lines = await asyncio.to_thread(read_metrics, self._run.metrics)
        recorded = next((line for line in lines if line["step"] == step), {})
        if (learners := recorded.get("workers/learner")) is not None:
            # Of that step: the run may have been scaled since, and sums would be in another order.
            config = rescaled(config, {"learner": int(learners)})
        model = await self._prepare_model(config)
        batch = await asyncio.to_thread(read_batch, rollout_path(self._run.rollouts, step))
        num_steps = config.num_steps
        if num_steps is None:
            num_steps = run_length(config, len((await self._load_prompts(config, model)).train)).num_steps
        async with Workers(config, self._run, model, self._phase, self._warn) as workers:
            learner = await workers.start_learner(num_steps)
            if self._resume_step > 0:
                self._phase("restoring", f"step {self._resume_step}")
                await learner.load(self._run.place(self._resume_step))
            self._phase("update")
            for part in parts_of(batch):
                await learner.accumulate(part)
            report = await learner.update(batch)
        figures = compare(recorded, report.metrics, tolerance=TOLERANCE[config.model.dtype])
        for figure in figures:
            self._emit(MessageEvent("info" if figure.agrees else "error", str(figure)))
        return "finished" if all(figure.agrees for figure in figures) else "not repeated"

    async def _prepare_model(self, config: RunConfig | SftConfig) -> str:
        self._phase("model")
        if config.model.dtype == "bfloat16" and not has_gpus() and not cpu_has_bf16():
            self._warn(
                "this CPU has no bfloat16 instructions and takes 50 times as long without; use model.dtype=float32"
            )
        return await asyncio.to_thread(prepare_model, config.model, self._run.path)

    async def _load_held_out(self, config: RunConfig, model: str) -> dict[str, PromptDataset]:
        """Of an evaluation alone. Prompts that are trained on stay: nothing is trained here, and that is said."""
        tokenizer, context = await self._prepare_data(config, model)
        held_out = await asyncio.to_thread(
            load_eval_prompts, config.data, tokenizer, seed=config.seed, max_context=context
        )
        for name, prompts in held_out.items():
            if prompts.report.num_too_long:
                self._tell_what_was_left_out(prompts.report)
            told = about_context(config, context, max(len(prompt.token_ids) for prompt in prompts))
            if told is not None:
                self._warn(f"{name}: {told}" if name else told)
        for note in check_sets(self._needs, eval_sets_told(held_out)):
            self._emit(MessageEvent("info", note))
        try:
            shared = await asyncio.to_thread(trained_on, config.data, tokenizer, held_out, seed=config.seed)
        except DataError as e:
            self._warn(f"whether prompts of data.eval are also in data.train is not known: {e}")
            return held_out
        if shared:
            total = sum(len(prompts) for prompts in held_out.values())
            self._warn(
                f"{shared} of {total} prompts of data.eval are also in data.train: for a model that was trained on them this is "
                "no held-out accuracy (training leaves them out, unless data.exclude_eval is off or data.eval was another)"
            )
        return held_out

    async def _prepare_data(self, config: RunConfig, model: str) -> tuple[Any, int]:
        """The tokenizer, and the model's context in tokens."""
        self._phase("data")
        code = config.model.trust_remote_code
        context = context_length(await asyncio.to_thread(load_config, model, trust_remote_code=code))
        tokenizer = await asyncio.to_thread(load_tokenizer, model, trust_remote_code=code)
        stops_of_run(config, tokenizer, model)
        check_context(config, context)
        return tokenizer, context

    async def _load_prompts(self, config: RunConfig, model: str) -> PromptSets:
        tokenizer, context = await self._prepare_data(config, model)
        prompts = await asyncio.to_thread(load_prompts, config.data, tokenizer, seed=config.seed, max_context=context)
        self._tell_what_was_left_out(prompts.train.report)
        told = about_context(config, context, max(len(prompt.token_ids) for prompt in prompts.train))
        if told is not None:
            self._warn(told)
        for note in check_columns(self._needs, prompts, train=True, evaluation=self._kind != "sample"):
            self._emit(MessageEvent("info", note))
        return prompts

    def _tell_what_was_left_out(self, report: LoadReport) -> None:
        if report.num_too_long:
            self._emit(
                MessageEvent(
                    "warning", f"{report.num_too_long} of {report.num_rows} rows are too long and were left out"
                )
            )
        if report.num_in_eval:
            self._emit(
                MessageEvent(
                    "info", f"{report.num_in_eval} of {report.num_rows} rows are also in data.eval and were left out"
                )
            )

    async def _rollout_log(self, config: RunConfig) -> ParquetRolloutLog | NoRolloutLog:
        if not config.tracking.rollouts:
            return NoRolloutLog()
        folder = self._run.rollouts
        folder.mkdir(exist_ok=True)
        remove_after(folder, self._resume_step or 0)
        return ParquetRolloutLog(folder, config.seed, RaySamples().fetch)


class RaySamples:
    """`roles.SampleStore` in Ray's object store."""

    async def fetch(self, refs: list[Any]) -> list[Sequence[Sample]]:
        """Raises LostSamplesError."""
        reading = asyncio.gather(*refs)
        try:
            return list(await within(reading, 60, "reading samples to write them down", "tracking.rollouts"))
        except ray.exceptions.ObjectLostError as e:
            raise LostSamplesError(f"samples can't be written down, their node died: {e}") from None

    def put(self, samples: list[Sample]) -> Any:
        return ray.put(samples)


def model_digest(model: str) -> str:
    """Of a folder's files; empty for a name on the hub."""
    return digest_of(Path(model)) if Path(model).is_dir() else ""


class NoRolloutLog:
    """`tracking.rollouts: false`."""

    async def write(self, step: int, groups: Sequence[Group], batch: TrainBatch) -> None:
        pass

    async def close(self) -> None:
        pass


def _first_typed(error: BaseException) -> BaseException:
    """The first error with a message for users, through the groups that asyncio wraps them in; else the first of all."""
    if isinstance(error, BaseExceptionGroup):
        return _first_typed(next((e for e in error.exceptions if isinstance(e, GrpoRayError)), error.exceptions[0]))
    return error


def _message(error: BaseException) -> str:
    """One message for the user."""
    error = _first_typed(error)
    if isinstance(error, GrpoRayError):
        return str(error)
    if kind_of(error) == "out of memory":
        return f"the controller failed: {fate(error, LOG_NAME)}"
    return f"{type(error).__name__}: {error} (the traceback is in logs/{LOG_NAME}.log)"
