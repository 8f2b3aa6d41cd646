"""Pins that teacher rollouts are made once and replayed, the same rows with files and without."""

from __future__ import annotations

from dataclasses import replace

import fsspec
import pytest
import torch
from runs import PD, small_run

from ddil_ray.diffusion.schedule import RectifiedFlow
from ddil_ray.errors import ConfigError
from ddil_ray.folder import write_whole
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import StateRequest
from ddil_ray.training import inline
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.kept import KeptBlocks, from_parquet, kept_blocks, kept_folder, to_parquet
from ddil_ray.training.producer import StateMaker
from ddil_ray.training.recipe import Recipe

TEACHER = {"forward": 0.5, "teacher": 0.5}


def _run(**kept):
    return small_run(states=TEACHER, teacher_rollouts={"batch_size": 16, **kept})


def _request(index, phase=0):
    return StateRequest(Origin.TEACHER, phase, index, 16, seed=0)


class _Maker:
    """Makes the labelled rows of a run's teacher, and counts how often it was asked."""

    def __init__(self, recipe: Recipe, **teacher):
        made = recipe.ingredients(**teacher)
        self.conditions = made.data.labels
        self.maker: StateMaker = inline.state_maker(recipe, made, recipe.student_of(made.teacher), "cpu")
        self.expert = self.maker.expert
        self.asked: list[int] = []

    def __call__(self, request: StateRequest) -> StateBatch:
        self.asked.append(request.index)
        return self.expert.label(self.maker.objective, self.maker.make(request), "cpu")


def _same(a: StateBatch, b: StateBatch) -> bool:
    return all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


@pytest.fixture(params=["memory://kept-{name}", "file://{tmp}", "{tmp}/deep/er"])
def folder(request, tmp_path):
    url = request.param.format(name=tmp_path.name, tmp=tmp_path)
    yield url
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm(root, recursive=True)


def test_what_is_replayed_is_what_was_made_and_the_teacher_is_asked_once(folder):
    recipe = Recipe(_run(keep_rows=40))
    make = _Maker(recipe)
    kept = kept_blocks(recipe, Origin.TEACHER, make.conditions, folder=folder)
    made = {i: kept.block(_request(i), make.expert, make) for i in range(3)}
    assert make.asked == [0, 1, 2]  # 40 rows are three blocks of 16
    for index in range(3, 12):
        replayed = kept.replayed(_request(index)).index
        assert _same(kept.block(_request(index), make.expert, make), made[replayed])
    again = kept_blocks(recipe, Origin.TEACHER, make.conditions, folder=folder)  # another run, or actor
    assert _same(again.block(_request(1), make.expert, make), made[1])
    assert make.asked == [0, 1, 2]
    fresh = _Maker(recipe)
    assert _same(fresh(_request(2)), made[2])


def test_every_pass_has_every_block_once_in_an_order_of_its_own():
    kept = KeptBlocks(8, None, "")
    passes = [[kept.replayed(_request(8 * n + i)).index for i in range(8)] for n in range(5)]
    assert passes[0] == list(range(8))
    assert all(sorted(order) == passes[0] for order in passes)
    assert len(set(map(tuple, passes))) == 5
    other = [kept.replayed(_request(8 + i, phase=1)).index for i in range(8)]
    assert other != passes[1]


@pytest.mark.parametrize("objective", [PD, {"type": "lcm", "solver_steps": 10, "student_steps": 2}], ids=["pd", "lcm"])
def test_a_run_with_files_and_one_without_are_the_same_run(tmp_path, objective):
    """Two rounds of progressive distillation: the second round's teacher is another, whose rows are others."""
    runs = [
        small_run(objective=objective, states=TEACHER, teacher_rollouts={"batch_size": 16, "keep_rows": 48, **files})
        for files in ({}, {"keep_at": str(tmp_path)}, {"keep_at": str(tmp_path)})
    ]
    results = [distill_inline(Recipe(run)) for run in runs]
    losses = [[record["loss"] for record in result.records] for result in results]
    assert losses[0] == losses[1] == losses[2]
    phases = 2 if objective is PD else 1
    assert len(list(tmp_path.glob("*/*.parquet"))) == 3 * phases
    assert losses[0] != [r["loss"] for r in distill_inline(Recipe(_run())).records]


def test_another_teacher_or_setting_has_other_files(tmp_path):
    recipe = Recipe(_run(keep_rows=16))
    make = _Maker(recipe)
    stronger = Recipe(small_run(states=TEACHER, teacher={"guidance": 2.0}, teacher_rollouts={"keep_rows": 16}))
    other = recipe.load_teacher().copy()
    for parameter in other.network.parameters():
        parameter.data.mul_(1.01)
    moved = _Maker(recipe, teacher=other)
    shifted = replace(recipe.load_teacher().copy(), schedule=RectifiedFlow(3.0))
    rescheduled = _Maker(recipe, teacher=shifted)
    names = set()
    for one, maker in ((recipe, make), (stronger, make), (recipe, moved), (recipe, rescheduled)):
        kept = kept_blocks(one, Origin.TEACHER, maker.conditions, folder=str(tmp_path))
        names |= {kept._name(phase, maker.expert) for phase in range(2)}
    assert len(names) == 8


def test_data_at_another_place_are_other_data_and_a_teacher_at_another_place_is_not():
    """Conditions do not tell two sets of prompts apart, which are numbered alike; weights tell teachers apart."""
    conditions = torch.arange(8)

    def made_from(**changes):
        recipe = Recipe(small_run(states=TEACHER, teacher_rollouts={"keep_rows": 16}, **changes))
        return kept_blocks(recipe, Origin.TEACHER, conditions, folder=None).made_from

    usual = made_from(data={"source": "one/prepared"})
    assert made_from(data={"source": "other/prepared"}) != usual
    assert made_from(data={"source": "one/prepared"}, teacher={"model": "elsewhere"}) == usual
    assert made_from(data={"source": "one/prepared", "prompt_cache_mib": 1}) == usual


class _DiesError(BaseException):
    pass


def test_a_process_that_dies_while_it_writes_leaves_nothing_half(tmp_path, monkeypatch):
    recipe = Recipe(_run(keep_rows=16))
    make = _Maker(recipe)
    kept = kept_blocks(recipe, Origin.TEACHER, make.conditions, folder=str(tmp_path))
    fs, _ = fsspec.core.url_to_fs(str(tmp_path))

    def half(path, content):
        fs.open(path, "wb").write(content[: len(content) // 2])
        raise _DiesError

    monkeypatch.setattr(type(fs), "pipe_file", lambda self, path, content: half(path, content))
    monkeypatch.setattr(type(fs), "rm_file", lambda self, path: None)  # a killed process clears nothing up
    with pytest.raises(_DiesError):
        kept.block(_request(0), make.expert, make)
    monkeypatch.undo()
    assert fs.glob(f"{tmp_path}/*/[!.]*") == []
    first = kept.block(_request(0), make.expert, make)
    assert make.asked == [0, 0]
    assert _same(kept.block(_request(0), make.expert, make), first)
    assert make.asked == [0, 0]


def test_a_file_that_cannot_be_read_is_made_again(tmp_path):
    recipe = Recipe(_run(keep_rows=16))
    make = _Maker(recipe)
    kept = kept_blocks(recipe, Origin.TEACHER, make.conditions, folder=str(tmp_path))
    first = kept.block(_request(0), make.expert, make)
    (file,) = tmp_path.glob("*/*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    assert _same(kept.block(_request(0), make.expert, make), first)
    assert _same(from_parquet(file.read_bytes()), first)
    assert make.asked == [0, 0]


def test_a_storage_that_cannot_be_written_costs_no_run(tmp_path):
    recipe = Recipe(_run(keep_rows=16))
    make = _Maker(recipe)
    kept = kept_blocks(recipe, Origin.TEACHER, make.conditions, folder="/proc/nowhere")
    kept.block(_request(0), make.expert, make)
    kept.block(_request(0), make.expert, make)
    assert make.asked == [0, 0]


def test_a_folder_that_cannot_be_written_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"`teacher_rollouts.keep_at` must be a folder or URL that can be written"):
        kept_folder(_run(keep_rows=16, keep_at="/proc/nowhere"), "/tmp/run")


def test_kept_rows_lie_in_the_run_folder_unless_a_place_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kept_folder(_run(), str(tmp_path)) is None
    assert kept_folder(_run(keep_rows=1), str(tmp_path / "run")) == str(tmp_path / "run" / "kept")
    assert kept_folder(_run(keep_rows=1, keep_at="here"), "/x") == str(tmp_path / "here")
    with pytest.raises(ValueError, match="keep_rows must be set where keep_at is"):
        _run(keep_at="here")


def test_only_the_teachers_own_rollouts_are_kept():
    recipe = Recipe(_run(keep_rows=16))
    assert kept_blocks(recipe, Origin.MIXED, torch.zeros(3, dtype=torch.int64), folder=None) is None
    assert kept_blocks(Recipe(_run()), Origin.TEACHER, torch.zeros(3, dtype=torch.int64), folder=None) is None


def test_states_without_labels_keep_their_shape():
    rows = StateBatch(
        torch.randn(3, 2, 4, 4),
        *(torch.rand(3, dtype=torch.float64), torch.arange(3), torch.rand(3)),
        *(torch.ones(3, dtype=torch.int8), torch.full((3,), -1), torch.zeros(3, dtype=torch.int64)),
        label=torch.zeros(3, 0),
    )
    assert _same(from_parquet(to_parquet(rows)), rows)


def test_a_file_appears_whole(tmp_path):
    fs, root = fsspec.core.url_to_fs(str(tmp_path))
    write_whole(fs, f"{root}/a/b", b"abc")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b").read_bytes() == b"abc"


def test_no_flipped_bit_of_the_footer_makes_zeros_of_labels():
    """Its names of columns have no checksum; a column that is not found is not one without values."""
    rows = StateBatch(
        torch.randn(3, 2, 4, 4),
        *(torch.rand(3, dtype=torch.float64), torch.arange(3), torch.rand(3)),
        *(torch.ones(3, dtype=torch.int8), torch.full((3,), -1), torch.zeros(3, dtype=torch.int64)),
        label=torch.randn(3, 5),
    )
    content = to_parquet(rows)
    length = int.from_bytes(content[-8:-4], "little") + 8
    for place in range(len(content) - length, len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        try:
            found = from_parquet(bytes(flipped))
        except Exception:
            continue
        assert found.label.any()
        assert found.x_t.any()
