"""Where `grpo-ray` begins: signals are heard before anything that takes time is imported."""

from __future__ import annotations

from typing import NoReturn

from launch import interrupts


def main() -> NoReturn:
    interrupts.install()
    from launch.cli import main as run

    run()
