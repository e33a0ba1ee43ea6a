"""Which answers become training data: a labelled set, single filters, selection, and the mix in the forms that others read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.config.data import DataSource
from grpo_ray.config.loading import build
from grpo_ray.datagen.filters.config import FilterConfig, MixConfig, PromptsConfig, SampledSource
from grpo_ray.datagen.filters.mix import make_mix
from grpo_ray.datagen.filters.prompts import join_prompts
from grpo_ray.datagen.filters.select import select, written
from grpo_ray.datagen.filters.trace import first_fault, foreign, loops, repeated
from grpo_ray.errors import DataError
from tests.samples import row, sample_folder
from tests.traces import Labelled, labelled

FILTER = FilterConfig(min_scores={"accuracy": 1.0, "language_consistency": 0.9}, form="think")


def test_good_traces_are_kept_and_bad_ones_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    traces = labelled()
    kept = [t for t in traces if first_fault(t.trace, FILTER) is None]
    right = sum(t.good for t in kept)
    precision, recall = right / len(kept), right / sum(t.good for t in traces)
    with capsys.disabled():
        print(
            f"\n{len(traces)} traces, {sum(t.good for t in traces)} good: precision {precision:.1%}, recall {recall:.1%}"
        )
        for name, wrong in (("kept, and bad", [t for t in kept if not t.good]), ("good, and left out", _lost(traces))):
            print(f"  {name}: {dict(Counter(t.kind for t in wrong)) or 'none'}")
    assert len(traces) >= 200
    assert precision >= 0.98
    assert recall >= 0.98


def _lost(traces: list[Labelled]) -> list[Labelled]:
    return [t for t in traces if t.good and first_fault(t.trace, FILTER) is not None]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("wrong answer", "accuracy"),
        ("cut off", "cut off"),
        ("thinking twice", "form"),
        ("no thought", "too short"),
        ("other scripts", "mixed scripts"),
        ("code block", "code block"),
        ("long paragraph", "long paragraph"),
        ("loop of a line", "loop"),
        ("going round", "repetition"),
    ],
)
def test_the_fault_is_called_by_its_name(kind: str, fault: str) -> None:
    without_languages = FilterConfig(min_scores={"accuracy": 1.0})
    faults = Counter(first_fault(t.trace, without_languages) for t in labelled() if t.kind == kind)
    assert faults.most_common(1)[0][0] == fault


def test_foreign_words_are_counted_as_words() -> None:
    assert foreign("How many?", "one two three 答案") == pytest.approx(2 / 5)
    assert foreign("How many?", "with $\\alpha$ and α, Δ and 字 alone") == 0.0
    assert foreign("What does 答案 mean?", "答案 means answer") == 0.0


def test_repetition_and_loops_by_hand() -> None:
    assert repeated("a b c d a b c d", 4) == pytest.approx(1 / 5)
    assert repeated("a b", 4) == 0.0
    assert loops("so it is. " * 5, 4)
    assert not loops("so it is. " * 4, 4)
    assert not loops("a long way to 100000000000000000000000000000000", 4)


def test_a_score_that_does_not_apply_is_not_asked_and_one_that_failed_is_no_pass() -> None:
    config = SampledSource(path="x", filter=FilterConfig(min_scores={"accuracy": 1.0}, form=None))
    rows = [
        row("p/0/0", 0, "kept", rewards={"accuracy": ("not_applicable", None)}),
        row("p/0/1", 0, "failed", rewards={"accuracy": ("timeout", None)}),
        row("p/0/2", 0, "missing", rewards={}),
    ]
    found = select(rows, config, seed=1)
    assert [r["completion"][0]["content"] for r in found.rows] == ["kept"]
    assert found.left_out == {"accuracy: timeout": 1, "accuracy: missing": 1}


def test_of_each_prompt_so_many_different_answers_are_kept() -> None:
    texts = [
        "<think>a</think>1",
        "<think>a </think>1",
        "<think>long one</think>1",
        "<think>b</think>1",
        "<think>b</think>1",
    ]
    rows = [row("p/0/0", i, text) for i, text in enumerate(texts)] + [row("p/0/1", 0, "<think>c</think>2")]
    by = {
        prefer: select(rows, SampledSource(path="x", keep_per_prompt=2, prefer=prefer), seed=1)
        for prefer in ("first", "shortest", "random")
    }
    # `a ` differs from `a` inside the tags; only white space between words is none.
    assert [r["index"] for r in by["first"].rows] == [0, 1, 0]
    assert [r["index"] for r in by["shortest"].rows] == [0, 3, 0]
    for found in by.values():
        assert (found.num_samples, found.num_prompts) == (6, 2)
        assert found.num_samples == found.num_kept + sum(found.left_out.values())
        assert found.left_out["duplicate"] == 1


def test_the_summary_is_written_around_the_answer_in_the_language_of_the_row() -> None:
    text = "<think>5 + 2</think>hm <answer> 7 </answer>"
    summary = {"en": "So it is <answer>{answer}</answer>.", "de": "Also {answer}."}
    assert written(text, {"language": "en"}, summary) == "<think>5 + 2</think>So it is <answer>7</answer>."
    assert written(text, {"language": "de"}, summary) == "<think>5 + 2</think>Also 7."
    assert written(text, {}, None) == text
    with pytest.raises(DataError, match="language 'fr'"):
        written(text, {"language": "fr"}, summary)


@pytest.fixture
def mix(tmp_path: Path) -> MixConfig:
    rows = [
        row(f"p/0/{i}", j, f"<think>{i} and {j}</think>{i}", question=f"how much is {i} ?")
        for i in range(90)
        for j in range(2)
    ]
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"prompt": f"write about {i}", "completion": "fine"}) + "\n" for i in range(20))
    )
    return MixConfig(
        samples=(SampledSource(path=str(sample_folder(tmp_path / "samples", rows))),),
        other=(DataSource(path=str(other)),),
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_mix_has_the_ratio_and_says_what_it_is_made_of(mix: MixConfig, tmp_path: Path) -> None:
    report = make_mix(mix, tmp_path / "mix.jsonl")
    rows = read(tmp_path / "mix.jsonl")
    assert report.composition == {"other": 20, "samples/add": 60}
    assert Counter(r["source"] for r in rows) == {"samples": 60, "other": 20}
    assert (report.num_rows, report.num_samples, report.num_chosen) == (80, 180, 90)
    make_mix(mix, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "mix.jsonl").read_bytes()


def test_rows_of_a_test_set_are_left_out(mix: MixConfig, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"prompt": "tell me how much is 7 ? please"}) + "\n")
    changed = mix.model_copy(update={"decontaminate": (DataSource(path=str(test)),), "ngram": 4, "ratio": None})
    report = make_mix(changed, tmp_path / "mix.jsonl")
    assert report.num_contaminated == 1
    assert not any(r["prompt"][0]["content"] == "how much is 7 ?" for r in read(tmp_path / "mix.jsonl"))


def test_nothing_left_says_why(mix: MixConfig, tmp_path: Path) -> None:
    (source,) = mix.samples
    strict = source.model_copy(update={"filter": FilterConfig(max_tokens=1)})
    with pytest.raises(DataError, match="too long 180"):
        make_mix(MixConfig(samples=(strict,)), tmp_path / "mix.jsonl")
    with pytest.raises(DataError, match="needs samples or other"):
        make_mix(build(MixConfig, {}, "test"), tmp_path / "mix.jsonl")


def test_prompts_of_several_sources_keep_their_columns_and_say_their_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"problem": f"{i}", "answer": i}) + "\n" for i in range(9)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"prompt": f"write {i}"}) + "\n" for i in range(9)))
    config = PromptsConfig(
        sources={
            "math": DataSource(path=str(tmp_path / "a.jsonl"), columns={"prompt": "problem"}, limit=6),
            "general": DataSource(path=str(tmp_path / "b.jsonl")),
        }
    )
    report = join_prompts(config, tmp_path / "prompts.jsonl")
    rows = read(tmp_path / "prompts.jsonl")
    assert report.composition == {"math": 6, "general": 9}
    assert [r["answer"] for r in sorted(rows, key=lambda r: r["prompt"]) if r["source"] == "math"] == list(range(6))
    assert [r["source"] for r in rows] != sorted((r["source"] for r in rows), reverse=True)


def test_hugging_face_and_our_own_loader_read_the_mix(mix: MixConfig, tmp_path: Path, tiny_model: Path) -> None:
    import datasets

    from grpo_ray.config.data import DataConfig
    from grpo_ray.data.prompts import load_demonstrations
    from grpo_ray.models.files.loading import load_tokenizer

    make_mix(mix, tmp_path / "mix.jsonl")
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "mix.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == 80
    assert loaded[0]["completion"][0]["role"] == "assistant"
    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
    examples = load_demonstrations(
        DataConfig(train=DataSource(path=str(tmp_path / "mix.jsonl"))), tokenizer, seed=1, max_length=200
    )
    assert len(examples) == 80


@pytest.mark.slow
def test_trl_trains_on_the_mix_unchanged(mix: MixConfig, tmp_path: Path, tiny_model: Path) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    make_mix(mix, tmp_path / "mix.jsonl")
    rows = datasets.load_dataset(
        "json", data_files=str(tmp_path / "mix.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    args = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    result = SFTTrainer(model=str(tiny_model), args=args, train_dataset=rows).train()
    assert result.training_loss == pytest.approx(5.8, abs=1.0)  # ln of its 320 tokens
