"""Pairs written here load and train in TRL's own trainers unchanged, and mean the same tokens there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from grpo_ray.config.data import DataConfig
from grpo_ray.data.decontaminate import write_jsonl
from grpo_ray.data.preferences import load_pairs
from grpo_ray.datagen.judged_pairs import JudgedPair

PAIRS = [
    JudgedPair([{"role": "user", "content": f"{i}+1?"}], f"<think>{i}</think>{i + 1}", f"{i}, perhaps", 2.0 + i)
    for i in range(4)
]
ARGUMENTS: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    write_jsonl(tmp_path / "pairs.jsonl", (pair.row() for pair in PAIRS))
    return datasets.load_dataset(
        "json", data_files=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path), split="train"
    )


def ours(tmp_path: Path, tokenizer: Any) -> list[tuple[list[int], ...]]:
    data = DataConfig.model_validate({"train": {"path": str(tmp_path / "pairs.jsonl")}})
    pairs = load_pairs(data, tokenizer, seed=1, max_length=200, use_margin=True).train
    assert [p.target for p in pairs] == [p.margin for p in PAIRS]
    return [(p.prompt_ids, *p.answers) for p in pairs]


def test_pairs_train_in_trls_dpo_trainer(rows: Any, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), max_length=200, **ARGUMENTS),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    theirs = [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trainer.train_dataset]
    assert theirs == ours(tmp_path, tokenizer)
    trainer.train()
    (first,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_pairs_train_in_trls_reward_trainer(rows: Any, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1),
        args=RewardConfig(output_dir=str(tmp_path / "trl"), max_length=200, **ARGUMENTS),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    theirs = [(r["chosen_ids"], r["rejected_ids"]) for r in trainer.train_dataset]
    assert theirs == [(prompt + chosen, prompt + rejected) for prompt, chosen, rejected in ours(tmp_path, tokenizer)]
    trainer.train()
    assert json.dumps(trainer.state.log_history[0]["loss"])
