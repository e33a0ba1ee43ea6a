"""What any split of parameters has written, any other split reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_ray.errors import CheckpointError
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.fragments import Fragment, FragmentReader, even_part, write_fragments
from grpo_ray.run.learner_files import HeldModel, SavedLearner, write_rank

SIZES = {"embed": 97, "layer.weight": 30, "norm": 3, "one": 1}


def whole(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    kinds = ("master", "exp_avg")
    return {n: {k: torch.randn(size, generator=generator) for k in kinds} for n, size in SIZES.items()}


def of_each(num_ranks: int) -> list[list[Fragment]]:
    """As stages 0 and 3 split: every parameter evenly."""
    out = []
    for rank in range(num_ranks):
        parts = {name: even_part(size, rank, num_ranks) for name, size in SIZES.items()}
        out.append([cut(name, start, numel) for name, (start, numel) in parts.items() if numel])
    return out


def of_the_flat(num_ranks: int) -> list[list[Fragment]]:
    """As stages 1 and 2 split: all parameters in a row, evenly."""
    out, total = [], sum(SIZES.values())
    for rank in range(num_ranks):
        start, numel = even_part(total, rank, num_ranks)
        fragments, at = [], 0
        for name, size in SIZES.items():
            first, last = max(start, at), min(start + numel, at + size)
            if first < last:
                fragments.append(cut(name, first - at, last - first))
            at += size
        out.append(fragments)
    return out


def cut(name: str, start: int, numel: int) -> Fragment:
    return Fragment(name, start, {k: t[start : start + numel].clone() for k, t in whole()[name].items()})


SPLITS = {"each": of_each, "flat": of_the_flat}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(SPLITS)),
    st.integers(1, 7),
    st.sampled_from(sorted(SPLITS)),
    st.integers(1, 7),
)
def test_every_rank_of_another_split_reads_its_own_elements(
    before: str, ranks_before: int, after: str, ranks_after: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = CheckpointLocation(folder)
        for rank, fragments in enumerate(SPLITS[before](ranks_before)):
            state = {"torch": torch.tensor([rank])}
            write_rank(place, rank, ranks_before, {"policy": HeldModel(fragments, 7, 9)}, state, {"a": 1})
        with place.reading() as files:
            saved = SavedLearner.open(files)
            reader = saved.reader("policy")
            for fragments in SPLITS[after](ranks_after):
                for f in fragments:
                    for kind, values in f.values.items():
                        assert torch.equal(reader.read(f.name, kind, f.start, f.numel), values)
            assert {name: reader.numel(name) for name in (*SIZES, "other")} == {**SIZES, "other": 0}
            assert (saved.num_steps("policy"), saved.num_scheduled("policy"), saved.facts) == (7, 9, {"a": 1})
            assert not saved.has("critic")
            for rank in range(ranks_before):
                assert saved.random_state(rank) == {"torch": torch.tensor([rank])}
            assert saved.random_state(ranks_before) is None


def test_only_the_files_that_have_some_of_it_are_opened(tmp_path: Path) -> None:
    parts = of_the_flat(4)
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    extents = [write_fragments(part, path) for part, path in zip(parts, paths, strict=True)]
    opened: list[int] = []

    def path_of(number: int) -> Path:
        opened.append(number)
        return paths[number]

    reader = FragmentReader(extents, path_of)
    assert torch.equal(reader.read("embed", "master", 0, 10), whole()["embed"]["master"][:10])
    assert set(opened) == {0}


def test_elements_that_are_in_no_file_are_told(tmp_path: Path) -> None:
    parts = of_each(3)
    extents = [write_fragments(part, tmp_path / f"{i}") for i, part in enumerate(parts)]
    reader = FragmentReader([extents[0], {}, extents[2]], lambda i: tmp_path / f"{i}")
    with pytest.raises(CheckpointError, match=r"elements 32 to 64 of master of embed are in none of 3 files"):
        reader.read("embed", "master", 0, 64)


def test_a_rank_whose_folder_is_missing_is_told(tmp_path: Path) -> None:
    place = CheckpointLocation(str(tmp_path))
    write_rank(place, 0, 2, {"policy": HeldModel(of_each(2)[0])}, {}, {})
    with place.reading() as files, pytest.raises(CheckpointError, match=r"rank-1/state\.json can't be read"):
        SavedLearner.open(files)


def test_a_stretch_in_the_midst_of_files_is_read_from_where_it_begins(tmp_path: Path) -> None:
    values = torch.arange(12.0)
    extents = []
    for i, (start, stop) in enumerate([(8, 12), (0, 3), (3, 8)]):
        extents.append(
            write_fragments([Fragment("w", start, {"master": values[start:stop].clone()})], tmp_path / str(i))
        )
    assert extents == [{"w": (8, 4)}, {"w": (0, 3)}, {"w": (3, 5)}]
    reader = FragmentReader(extents, lambda i: tmp_path / str(i))
    for start in range(12):
        for stop in range(start, 13):
            assert reader.read("w", "master", start, stop - start).tolist() == values[start:stop].tolist()
    assert (reader.numel("w"), reader.numel("v")) == (12, 0)
    assert reader.read("w", "master", 12, 0).tolist() == []
    with pytest.raises(CheckpointError, match=r"^elements 12 to 14 of master of w are in none of 3 files$"):
        reader.read("w", "master", 10, 4)
    (tmp_path / "3").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"/3 can't be read \("):
        FragmentReader([{"w": (0, 1)}], lambda i: tmp_path / "3").read("w", "master", 0, 1)
