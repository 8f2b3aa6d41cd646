"""Pins who becomes champion: better by more than chance, and measured alike, or else not and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from registered import finished_run, group_scores

from ddil_ray.evaluation.scoring import GROUPS
from ddil_ray.finished import read_finished
from ddil_ray.publish.gate import GATES, Evidence, Verdict, evidence_of, judge


def _evidence(mean, *, seed, score="kid_teacher"):
    return Evidence(4, {score: mean}, {score: group_scores(mean, seed=seed)}, {"evaluation.seed": "1", "about.k": "5"})


def test_a_student_that_is_better_in_all_groups_is_champion():
    verdict = judge(_evidence(0.008, seed=1), _evidence(0.012, seed=2), "kid_teacher")
    assert verdict.passes
    assert verdict.reason.startswith("it is better: kid_teacher is 0.008, and 0.012 of the champion; they differ by -")
    assert "(95 % interval -0.0" in verdict.reason
    assert verdict.reason.endswith(f"over {GROUPS} groups of samples")


def test_groups_that_chance_moves_alike_tell_students_apart_that_differ_by_less_than_it_moves_them():
    """The spread of groups is ten times the difference, and most of it is common to both."""
    better, worse = _evidence(0.0098, seed=1), _evidence(0.0100, seed=2)
    assert np.ptp(better.groups["kid_teacher"]) > 10 * 0.0002
    assert judge(better, worse, "kid_teacher").passes


def test_a_lead_within_what_chance_does_moves_nothing():
    own, other = _evidence(0.010, seed=1), _evidence(0.010, seed=2)
    verdicts = [judge(a, b, "kid_teacher") for a, b in ((own, other), (other, own))]
    assert not any(verdict.passes for verdict in verdicts)
    assert sorted(verdict.reason.partition(":")[0] for verdict in verdicts) == [
        "it is not better",
        "its lead may be chance",
    ]


def test_a_worse_student_and_the_same_one_are_not_better():
    champion = _evidence(0.010, seed=1)
    for student in (_evidence(0.020, seed=2), champion):
        verdict = judge(student, champion, "kid_teacher")
        assert not verdict.passes
        assert verdict.reason.startswith("it is not better: ")


def test_of_clip_scores_the_higher_one_is_better():
    low, high = (_evidence(mean, seed=seed, score="clip_score") for mean, seed in ((24.0, 1), (25.0, 2)))
    assert judge(high, low, "clip_score").passes
    assert not judge(low, high, "clip_score").passes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 1}, "it samples with 1 steps, and the champion with 4"),
        ({"benchmark": {"evaluation.seed": "2", "about.k": "5"}}, "`evaluation.seed` was 2 where it was measured, and"),
        ({"benchmark": {"evaluation.seed": "1"}}, "`about.k` was unset where it was measured, and 5 where the"),
        ({"groups": {}}, "it has no kid_teacher by groups of samples, which takes `evaluation.num_samples` of"),
        ({"groups": {"kid_teacher": [0.0] * 9}}, "it has no kid_teacher by groups of samples"),
    ],
)
def test_students_that_were_not_measured_alike_are_not_compared(change, reason):
    champion = _evidence(0.012, seed=2)
    other = replace(_evidence(0.001, seed=1), **change)
    verdict = judge(other, champion, "kid_teacher")
    assert not verdict.passes
    assert verdict.reason.startswith(f"the two cannot be compared: {reason}")
    assert not judge(champion, other, "kid_teacher").passes


def test_the_first_champion_must_be_one_that_others_can_be_compared_with():
    first = _evidence(0.012, seed=1)
    assert judge(first, None, "kid_teacher") == Verdict(True, "there was no champion")
    verdict = judge(first, None, "clip_score")
    assert not verdict.passes
    assert verdict.reason.startswith(
        "there was no champion, but it has no clip_score by groups of samples, which takes"
    )


def test_two_students_of_one_quality_rarely_change_places():
    """The interval is of 95 %, so one in forty would by chance alone."""
    rng = np.random.default_rng(0)
    moved = 0
    for _ in range(200):
        shared = rng.normal(0, 1, GROUPS)
        own, other = (
            Evidence(4, {"kid_data": 0.0}, {"kid_data": (shared + rng.normal(0, 1, GROUPS)).tolist()}, {})
            for _ in range(2)
        )
        moved += judge(own, other, "kid_data").passes
    assert 1 <= moved <= 12


def test_evidence_is_read_from_a_run_and_survives_the_registry(tmp_path):
    run = read_finished(finished_run(tmp_path, "a", kid=0.01), "RUN")
    evidence = evidence_of(run, 1)
    assert evidence.scores == {"kid_teacher": 0.01, "frechet_teacher": 1.0}
    assert set(evidence.groups) <= set(GATES)
    assert (
        evidence.benchmark.items()
        >= {
            "evaluation.seed": "1000003",
            "teacher.model": "builtin:digits",
            "data.source": "digits",
            "threshold.mode": "static",
            "about.features": "64 features",
        }.items()
    )
    assert Evidence.from_json(evidence.to_json()) == evidence
    assert evidence_of(run, 2) is None


def test_where_a_run_was_made_and_how_it_was_trained_are_no_part_of_the_benchmark(tmp_path):
    others = ["seed=7", "trainer.steps=3", "evaluation.num_actors=2", "evaluation.steps=[1,2]"]
    runs = [finished_run(tmp_path, name, kid=0.01, settings=settings) for name, settings in (("a", []), ("b", others))]
    first, second = (evidence_of(read_finished(run, "RUN"), 1) for run in runs)
    assert first.benchmark == second.benchmark
