"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's name (see `grpo-ray check --list`) or a .yaml file")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Dotted overrides, e.g. learner.zero_stage=3. Text is taken as typed, but for quotes around all of it; null (or "
        "nothing) unsets an option, {} empties a mapping",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster: http://HEAD:8265, its dashboard. Else RAY_API_SERVER_ADDRESS or RAY_ADDRESS says",
    ),
]
ClusterRun = Annotated[
    str, typer.Argument(metavar="RUN", help="The name of a run on the cluster, see `grpo-ray status`")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, e.g. runs/smoke")]
