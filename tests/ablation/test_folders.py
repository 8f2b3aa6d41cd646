"""Pins what finished run folders give to a comparison, and what cannot be compared."""

from __future__ import annotations

import functools

import pytest
from studies import write_run

from ddil_ray.ablation.folders import study_of
from ddil_ray.ablation.summary import summarise
from ddil_ray.errors import ConfigError

FORWARD, HALF = {"forward": 1.0}, {"forward": 0.5, "student": 0.5}
EVALUATION = {"enabled": True, "num_samples": 32, "steps": [1, 2]}


@pytest.fixture
def folder(tmp_path):
    """Write a run folder."""
    return functools.partial(write_run, tmp_path)


def _two_arms(folder, **skewed):
    forward = [folder(f"forward-{seed}", seed=seed, states=FORWARD) for seed in (0, 1)]
    return [*forward, *(folder(f"ddil-{s}", seed=s, states=HALF, scale=0.5, **skewed) for s in (1, 0))]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_runs_that_differ_in_seed_alone_are_one_arm_and_pairs_go_by_seed(folder, prefix):
    study = study_of([prefix + url for url in _two_arms(folder)])
    assert list(study.arms) == ["forward-0", "ddil-1"]
    report = summarise(study)
    (row,) = [r for r in report["comparisons"] if (r["score"], r["steps"]) == ("frechet_data", 2)]
    assert (row["seeds"], row["better"]) == (2, 2)
    assert row["ratio"]["mean"] == pytest.approx(0.5, abs=0.01)
    assert report["settings"]["arms"]["ddil-1"] == {"states.forward": "0.5", "states.student": "0.5"}
    assert report["shift"]
    assert not any(law["differs"] for law in report["laws"])
    assert set(study.outcomes[0].pictures) >= {"teacher-reference", "student-2-steps"}


def test_arms_trained_on_other_times_are_told(folder):
    report = summarise(study_of(_two_arms(folder, quarters=(0.7, 0.1, 0.1, 0.1))))
    assert [law["differs"] for law in report["laws"]] == [True]


def test_arms_with_teachers_of_other_thresholds_are_compared_with_a_note(folder):
    runs = [folder("plain"), folder("reflected", threshold={"mode": "static"})]
    assert "reflected and plain differ in `threshold.mode`" in study_of(runs).notes[0]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"finished": False}, r"must be a finished run, but .*other has no metrics.json.*--resume"),
        ({"scores": False}, r"must be an evaluated run, but .*other was run with `evaluation.enabled=false`"),
        ({"evaluation": {"enabled": True, "num_samples": 64}}, r"`evaluation.num_samples` must be the same.*is 32 in"),
        ({"evaluation": {"enabled": True, "num_samples": 32, "seed": 5}}, r"`evaluation.seed` must be the same"),
        ({"teacher": {"guidance": 2.0}}, r"`teacher.guidance` must be the same in all runs"),
        ({"seed": 1}, r"must name runs of two arms"),
        ({"seed": 1, "states": FORWARD}, r"`seed` must be one that the baseline has too, but is 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(folder, second, expected):
    with pytest.raises(ConfigError, match=expected):
        study_of([folder("first"), folder("other", **second)])


def test_folders_without_a_run_and_runs_given_twice_are_refused(folder, tmp_path):
    first = folder("first")
    with pytest.raises(ConfigError, match="must be the folder of a run"):
        study_of([first, str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match=r"must be a path or a URL of .*nosuch://x"):
        study_of([first, "nosuch://x"])
    with pytest.raises(ConfigError, match="`seed` must differ between runs of one arm, but is 0"):
        study_of([first, first, folder("other", states=FORWARD)])


def test_evaluation_at_other_steps_compares_the_steps_that_both_have(folder):
    other = folder("other", states=FORWARD, evaluation={**EVALUATION, "steps": [2]})
    assert study_of([folder("first"), other]).arms == ["first", "other"]
