"""Whether DeepSpeed has the options of `learner.deepspeed`, by the source of the one that is installed: it is not imported."""

from __future__ import annotations

from actors.class_fields import fields_of
from grpo_ray.config.learner import LearnerConfig
from grpo_ray.errors import ConfigError

_SECTIONS = {
    "zero_optimization": ("runtime.zero.config", "DeepSpeedZeroConfig"),
    "comms_logger": ("comm.config", "CommsLoggerConfig"),
}
"""Section -> the module and the name of its schema; the other options are plain values."""


def check_deepspeed(learner: LearnerConfig) -> None:
    """Check the sections that are passed to DeepSpeed. Without DeepSpeed on this machine they are checked where ranks start.

    Raises:
        ConfigError: DeepSpeed has no such option, or takes no such value.
    """
    for section, (module, schema) in _SECTIONS.items():
        options = learner.deepspeed.get(section, {})
        fields = fields_of("deepspeed", module, schema)
        if not isinstance(options, dict):
            raise ConfigError(f"learner.deepspeed.{section}: a mapping is meant (got {options!r:.100})")
        if fields is not None:
            fields.check(options, f"learner.deepspeed.{section}", f"DeepSpeed's {schema}", whole_floats=True)
