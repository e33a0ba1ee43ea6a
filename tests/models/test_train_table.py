"""A part of `make models-train`: a family whose scores and logits are capped, and the text model of a multimodal checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.train_table import LIMIT_S, MAX_MISMATCH, trained

pytestmark = [pytest.mark.long, pytest.mark.timeout(2 * LIMIT_S)]


@pytest.mark.parametrize("kind", ["gemma2", "smolvlm"])
def test_a_family_is_trained_as_it_is_sampled_and_its_export_loads(kind: str, tmp_path: Path) -> None:
    row = trained(kind, tmp_path, ["float32"])
    assert row.troubles == []
    assert row.mismatch["float32"] < MAX_MISMATCH["float32"]
    assert row.loads == {"Transformers": "yes", "vLLM": "yes"}
