"""What every section of the schema is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from grpo_ray.secrets import check_env

PositiveInt = Annotated[int, Field(ge=1)]
NonNegInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegFloat = Annotated[float, Field(ge=0)]
Env = Annotated[dict[str, str], AfterValidator(check_env)]
"""Environment variables of workers. A secret is named, not written: `HF_TOKEN: ${HF_TOKEN}`."""


class Strict(BaseModel):
    """Unknown keys are refused, nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
