"""Pins that a running job's actors can be made more and fewer: the request, its answer, and what happens to rows."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from commands import run as _run
from runs import small_run

from ddil_ray.config import to_yaml
from ddil_ray.errors import ConfigError
from ddil_ray.runtime.run import distill
from ddil_ray.runtime.scaling import Requests, scale
from ddil_ray.tracking import read_journal
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe


@pytest.mark.parametrize("scheme", ["memory://scaled", "file://{tmp}"])
def test_a_request_in_the_run_folder_is_taken_once_and_answered(scheme, tmp_path):
    fs, root = fsspec.core.url_to_fs(scheme.format(tmp=tmp_path))
    requests = Requests(fs, root)
    assert list(requests.take()) == []
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(requests.ask, {"student_rollouts": [1, 4]}, timeout_s=20)
        deadline = time.monotonic() + 10
        while not (taken := list(Requests(fs, root).take())):
            assert time.monotonic() < deadline
        ((name, sizes),) = taken
        assert sizes == {"student_rollouts": [1, 4]}
        Requests(fs, root).answer(name, {"after": 4})
        assert asked.result() == {"after": 4}
    assert list(requests.take()) == []
    assert fs.ls(f"{root}/scale") == []


def test_a_request_that_nobody_answers_is_taken_back(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(small_run()))
    with pytest.raises(ConfigError, match=r"RUN must be the folder of a job that is training, but nobody answers"):
        scale(str(tmp_path), {"student_rollouts": 2}, timeout_s=0.5)
    assert list((tmp_path / "scale").iterdir()) == []


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("trainer=2", "ROLE must be one that has actors while this run trains, forward_states, student_rollouts, but"),
        ("teacher_rollouts=2", "but is 'teacher_rollouts' instead"),
        ("labels=2", "but is 'labels' instead"),
        ("student_rollouts=0", "`student_rollouts` must be a number of actors, or [min, max]"),
        ("student_rollouts=[4,2]", "`student_rollouts` must be a number of actors, or [min, max]"),
        ("student_rollouts=many", "but is 'many' instead"),
        ("student_rollouts", "ROLE=N must name a role and its actors"),
    ],
)
def test_what_cannot_be_a_size_is_one_message_and_exit_code_two(capsys, tmp_path, size, expected):
    (tmp_path / "config.yaml").write_text(to_yaml(small_run()))
    code, out, err = _run(capsys, "scale", str(tmp_path), size)
    assert (code, out) == (2, "")
    assert expected in err
    assert not (tmp_path / "scale").exists()


def test_a_run_folder_that_cannot_be_written_is_one_message_and_exit_code_two(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(small_run()))
    (tmp_path / "scale").write_text("no folder")
    code, _, err = _run(capsys, "scale", tmp_path, "student_rollouts=2")
    assert code == 2
    assert "can be read and written" in err
    assert "must be able to write there" in err


def test_what_is_no_run_is_one_message_and_exit_code_two(capsys):
    code, _, err = _run(capsys, "scale", "/nowhere/run", "student_rollouts=2")
    assert code == 2
    assert "/nowhere/run/config.yaml" in err


def _counts(journal: Path, pool: str) -> list[float]:
    key = f"actors/count/{pool}"
    return [r[key] for r in read_journal(journal) if key in r] if journal.exists() else []


def _until(condition) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("placement", ["fused", "pool"])
def test_actors_come_and_go_while_training_and_no_row_is_lost_or_made_twice(run_dir, placement, capsys):
    """Forward and teacher states do not depend on timing: the losses are those of the same run without Ray."""
    share = {"num_gpus": 0.1}  # of the one that Ray was told of
    config = small_run(
        teacher={"model": "slow:slow_everywhere"},
        states={"forward": 0.5, "teacher": 0.5, "teacher_substeps": 1},
        trainer={"steps": 300, "batch_size": 16, **share},
        forward_states={"batch_size": 16, **share},
        teacher_rollouts={"batch_size": 16, **share},
        checkpoint={"every": 5000},
        labels={"placement": placement, **share},
        output=run_dir,
    )
    folder = Path(run_dir) / "small"
    role, pool = ("labels", "labels/teacher") if placement == "pool" else ("teacher_rollouts", "teacher")

    def resize() -> list[dict]:
        _until(lambda: len(_counts(folder / "metrics.jsonl", pool)) > 0 and _training(folder))
        answers = [scale(str(folder), {role: 3})]
        with pytest.raises(ConfigError, match=r"The roles must fit the cluster, but need .* CPUs"):
            scale(str(folder), {role: 99})
        _until(lambda: _counts(folder / "metrics.jsonl", pool)[-1] == 3)
        answers.append(scale(str(folder), {role: 1}))
        _until(lambda: _counts(folder / "metrics.jsonl", pool)[-1] == 1)
        return answers

    with ThreadPoolExecutor() as threads:
        resized = threads.submit(resize)
        distill(config)
        answers = resized.result()
    assert [(a["before"][role], a["after"][role]) for a in answers] == [(1, 3), (3, 1)]
    losses = [r["loss"] for r in _training(folder)]
    inline = distill_inline(Recipe(config))
    assert losses == pytest.approx([r["loss"] for r in inline.records], rel=1e-4)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_pool_grows_by_itself_where_the_trainer_waits_for_it(run_dir):
    """A block of teacher states takes about a second, the two steps that use it up a small part of one."""
    share = {"num_gpus": 0.1}
    config = small_run(
        teacher={"model": "slow:slow_to_make_states"},
        states={"forward": 0.5, "teacher": 0.5},
        trainer={"steps": 200, **share},
        forward_states={"batch_size": 16, "num_actors": (1, 2), **share},
        teacher_rollouts={"batch_size": 16, "num_actors": (1, 2), **share},
        output=run_dir,
    )
    distill(config)
    journal = Path(run_dir) / "small" / "metrics.jsonl"
    counts = _counts(journal, "teacher")  # fall at the end, when all blocks have been given out
    assert (counts[0], max(counts)) == (1, 2)
    assert max(_counts(journal, "forward")) == 1


def _training(folder: Path) -> list[dict]:
    return [r for r in read_journal(folder / "metrics.jsonl") if "loss" in r]
