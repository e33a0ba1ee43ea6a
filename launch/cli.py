"""The command line: `grpo-ray --help`. The commands import the heavy libraries themselves, so that help is instant."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from grpo_ray.errors import ConfigError, GrpoRayError
from grpo_ray.plain_terminal import clean_streams, say
from grpo_ray.secrets import hide_secrets
from launch.cli_cluster import job, logs, scale, status, stop, submit
from launch.cli_options import Overrides, Recipe, Run
from launch.program import runnable

app = typer.Typer(
    name="grpo-ray",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train reasoning language models by reinforcement learning on a Ray cluster, or on this machine.",
)
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
WITHOUT_RAY = ("report", "decontaminate", "judge-pairs")
"""The commands that neither start nor join a cluster."""


def _print_version(asked: bool) -> None:
    if asked:
        from launch.versions import versions

        for name, version in versions():
            say(f"{name:<13}{version}")
        raise typer.Exit


@app.callback()
def before_any(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Of grpo-ray and of what it runs on"),
    ] = False,
) -> None:
    if context.invoked_subcommand not in WITHOUT_RAY:
        from launch.environment import prepare

        prepare()


@app.command()
def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train by GRPO. Ctrl-C ends after the step under way and leaves a run that `resume` continues."""
    from launch.run.jobs import start_grpo

    start_grpo(recipe, overrides or [])


@app.command()
def sft(recipe: Recipe, overrides: Overrides = None) -> None:
    """Fine-tune on demonstrations (the cold start): the same learner with a cross-entropy objective."""
    from launch.run.jobs import start_sft

    start_sft(recipe, overrides or [])


@app.command()
def sample(recipe: Recipe, overrides: Overrides = None) -> None:
    """Sample and score every prompt of data.train, to Parquet. Again with the same name=..., or `resume`: the rest of them."""
    from launch.run.jobs import start_sample

    start_sample(recipe, overrides or [])


@app.command()
def pipeline(
    recipe: Recipe,
    overrides: Overrides = None,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and all that build on it again")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="End after this stage")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every stage and print the plan, with estimated tokens and time")
    ] = False,
) -> None:
    """Run the stages of a recipe, one after the other. What is done is not done again; a stage that was cut off goes on."""
    from launch.pipeline.stages import run_pipeline

    run_pipeline(recipe, overrides or [], first, last, dry_run=dry_run)


@app.command()
def dpo(recipe: Recipe, overrides: Overrides = None) -> None:
    """Learn from pairs of answers, a better and a worse one, by direct preference optimisation: the same learner."""
    from launch.run.jobs import start_dpo

    start_dpo(recipe, overrides or [])


@app.command()
def reward_model(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train a reward model on pairs of answers, or on answers with a label: the same learner, with one output."""
    from launch.run.jobs import start_reward_model

    start_reward_model(recipe, overrides or [])


@app.command()
def resume(run: Run, overrides: Overrides = None) -> None:
    """Go on with a run from its newest checkpoint: no prompt is skipped or trained twice. num_steps=N trains a finished one longer;
    options may change where that does not belie what was trained."""
    from launch.run.jobs import resume_run

    resume_run(run, overrides or [])


@app.command(name="eval")
def eval_(
    target: Annotated[str, typer.Argument(metavar="RUN|RECIPE", help="A run (its newest exported model) or a recipe")],
    overrides: Overrides = None,
) -> None:
    """Held-out accuracy: pass@1 as the mean over eval.num_samples samples, pass@k and the vote cons@k, with standard errors."""
    from launch.run.jobs import evaluate_target

    evaluate_target(target, overrides or [])


@app.command()
def check(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name or a .yaml file")] = None,
    overrides: Overrides = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the shipped recipes and the built-in rewards")] = False,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="train, sft, dpo or reward-model; else the recipe tells")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="GPU", help="Plan for these GPUs instead of what is here: h100, 8xh100, l4, 80GB, .."),
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Also run what the recipe brings: its rewards, data functions, model code"),
    ] = False,
) -> None:
    """Everything that can be known without loading a model: schema, data, rewards, memory, resources. Prints the plan, and names
    code that is not grpo-ray's without running it."""
    from launch.check.command import check_recipe, print_lists

    if list_:
        print_lists()
    elif recipe is None:
        raise ConfigError("name a recipe to check, or ask for --list")
    else:
        check_recipe(recipe, overrides or [], kind, gpu=gpu, run_code=run_code, makes_models=False)


@app.command()
def report(run: Run) -> None:
    """Write RUN/report.html: curves, timings and samples in one file that stands alone."""
    from grpo_ray.run.run_dir import RunDir
    from launch.run.jobs import make_report

    try:
        say(str(make_report(RunDir.open(run))))
    except OSError as e:
        raise ConfigError(f"the report of {run} can't be written: {e}") from None


@app.command()
def replay(run: Run, step: Annotated[int, typer.Option(min=1, help="The step to repeat")]) -> None:
    """Repeat a recorded step of the learner alone: the same batch, the same loss and gradient norm, or exit code 1."""
    from launch.run.jobs import replay_step

    replay_step(run, step)


@app.command()
def decontaminate(
    train: Annotated[
        str, typer.Argument(metavar="TRAIN", help="What data.train.path takes: a file, a data set's name, ..")
    ],
    against: Annotated[
        list[str], typer.Option(metavar="TEST", help="A test set, likewise; may be given several times")
    ],
    ngram: Annotated[
        int, typer.Option(min=1, help="Words in a row that make a row contaminated; each Chinese character is one")
    ] = 10,
    out: Annotated[Path | None, typer.Option(help="File for the kept rows; else NAME.decontaminated.jsonl")] = None,
    column: Annotated[str | None, typer.Option(help="Where TRAIN has its prompt; else prompt, or messages")] = None,
    against_column: Annotated[str | None, typer.Option(help="Where TEST has it; else as in TRAIN")] = None,
    name: Annotated[str | None, typer.Option(help="Subset of both, for data sets on the hub")] = None,
    split: Annotated[str | None, typer.Option(help="Of TRAIN, or a part of it: train[:50%]; else train")] = None,
    against_split: Annotated[str | None, typer.Option(help="Of TEST, likewise; else test, or all of a file")] = None,
) -> None:
    """Leave out the training rows that share ten words in a row with a test prompt, or hold all of a shorter one, and write the
    others as JSONL."""
    from launch.pipeline.decontaminate import decontaminate as run
    from launch.pipeline.decontaminate import source_of

    tests = [source_of(path, name, against_split, "test") for path in against]
    source = source_of(train, name, split, "train")
    if name is not None and not any(s.name for s in (source, *tests)):
        raise ConfigError(f"--name {name} is a subset of a data set on the hub, and none is named here")
    run(source, tests, column, against_column or column, ngram, out)


@app.command()
def judge_pairs(
    answers: Annotated[
        str, typer.Argument(metavar="ANSWERS", help=".jsonl or .parquet with prompt and completions, or completion")
    ],
    model: Annotated[str, typer.Option(help="The judge, as its endpoint calls it")],
    out: Annotated[Path, typer.Option(help="File for the pairs: prompt, chosen, rejected, margin, as JSONL")],
    base_url: Annotated[str, typer.Option(help="Of an OpenAI-compatible endpoint; its key is OPENAI_API_KEY")] = (
        "https://api.openai.com/v1"
    ),
    rubric: Annotated[Path | None, typer.Option(help="File with what to compare by; else helpfulness")] = None,
    part: Annotated[
        Literal["all", "reasoning", "summary"], typer.Option(help="What the judge sees of an answer")
    ] = "all",
    pairs_per_prompt: Annotated[int, typer.Option(min=1, help="Comparisons of each prompt's answers")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Judgements in each of the two orders")] = 2,
    min_margin: Annotated[float, typer.Option(min=0, help="Least mean difference of ratings, in points of ten")] = 1.0,
    length_tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Mean difference of lengths that may be left; 1: don't balance")
    ] = 0.05,
    requests_per_minute: Annotated[float | None, typer.Option(help="Of the endpoint's limit; else no pace")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions under way at once")] = 16,
    cache: Annotated[Path | None, typer.Option(help="File that keeps answers: the same command goes on")] = None,
    seed: Annotated[int, typer.Option(help="Which answers are compared")] = 1,
) -> None:
    """Have a judge compare sampled answers in both orders, and write the pairs where all judgements agree clearly."""
    from grpo_ray.datagen.judged_pairs import RUBRIC
    from grpo_ray.rewards.endpoints.judge_client import JudgeOptions
    from launch.pipeline.judge_pairs import make_pairs

    make_pairs(
        answers,
        out,
        JudgeOptions(
            model,
            base_url,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            cache=str(cache) if cache else None,
        ),
        rubric=RUBRIC if rubric is None else rubric.read_text().strip(),
        part=part,
        pairs_per_prompt=pairs_per_prompt,
        rounds=rounds,
        min_margin=min_margin,
        length_tolerance=length_tolerance,
        seed=seed,
    )


@app.command()
def smoke(overrides: Overrides = None) -> None:
    """A tiny model from a cold start to 90% of an arithmetic task, with the real engines, on this machine."""
    from launch.run.smoke import run_smoke

    run_smoke(overrides or [])


@app.command()
def episodes(overrides: Overrides = None) -> None:
    """Tiny models from a cold start to 80% of tasks of several turns, with the real engines, on this machine."""
    from launch.run.smoke import run_episodes

    run_episodes(overrides or [])


@app.command()
def pretrained(overrides: Overrides = None) -> None:
    """A real model, SmolLM2-135M-Instruct of the hub or the package index, on word problems that it half knows, on this machine."""
    from launch.run.pretrained import run_pretrained

    run_pretrained(overrides or [])


for command in (submit, status, logs, stop, scale):
    app.command()(command)
app.add_typer(job, name="job")


def main() -> NoReturn:
    """Run the command: errors for the user are one message on stderr and an exit code, without a traceback."""
    # A cluster protects itself by a token when it finds one, but a client shows its token only if this is set before Ray's import.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    for stream in (sys.stdout, sys.stderr):
        # What a model or a file contains may not exist in the terminal's encoding; a message is never lost for that.
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    clean_streams()
    # Packages that reasoning-gym installs show it once, at the first import after an installation.
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    try:
        check_one_root()
        code = app(standalone_mode=False)
    except GrpoRayError as e:
        _tell_error(_with_cause(str(e)))
        sys.exit(EXIT_USAGE if isinstance(e, ConfigError) else EXIT_FAILED)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except Exception as e:
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):  # click's usage errors
            _tell_error(f"{e.format_message()}; {_meant(e) or 'see grpo-ray --help'}")
            sys.exit(e.exit_code)
        from launch.environment import blamed

        if (cause := blamed(str(e))) is not None:
            e.add_note(cause)
        raise
    # Without its standalone mode typer returns the code of an Exit, among them its 130 for a KeyboardInterrupt.
    sys.exit(code if isinstance(code, int) else 0)


def _with_cause(text: str) -> str:
    """The text of an error, and the variables of the environment that it may be about."""
    from launch.environment import blamed

    return "\n".join(part for part in (text, blamed(text)) if part is not None)


def check_one_root() -> None:
    """Raise ConfigError when the three packages come from different checkouts: their records would not fit together."""
    import actors
    import grpo_ray
    import launch

    root = Path(launch.__file__ or "").parent.parent
    for package in (grpo_ray, actors):
        # A folder without an __init__.py has no file.
        where = Path(package.__file__ or next(iter(package.__path__)))
        if not where.is_relative_to(root / package.__name__):
            raise ConfigError(
                f"the package {package.__name__} comes from {where}, and launch from {root}: rename what hides grpo-ray's own "
                "package (it is first on PYTHONPATH, or in this folder), or install one checkout: pip install -e ."
            )


def _meant(error: Exception) -> str | None:
    """What an option of another project's command line, such as `--actor_learning_rate 1e-6`, is called here."""
    from grpo_ray.config.aliases import called_here
    from grpo_ray.config.loading import all_keys
    from grpo_ray.config.schema import RunConfig

    option = getattr(error, "option_name", None)
    called = called_here(option, all_keys(RunConfig)) if option else None
    return None if called is None else f"{called}, and given as KEY=VALUE"


def _tell_error(text: str) -> None:
    from launch.console import headed, plain_console

    plain_console(stderr=True).print(headed("error:", "bold red", f" {hide_secrets(runnable(text))}"), soft_wrap=True)
