"""Pins the scores of a set of rows, over everything and by class."""

from __future__ import annotations

import pytest
import torch

from ddil_ray.evaluation.maker import SampleRows
from ddil_ray.evaluation.metrics import frechet_distance, kernel_distance
from ddil_ray.evaluation.neighbours import prdc
from ddil_ray.evaluation.scoring import GROUPS, Scorer, _parts

EMPTY = torch.zeros(0)


def _clusters(rows, seed, classes=3, mean=10.0):
    """Features of classes that lie far apart, and their classes."""
    labels = torch.arange(rows) % classes
    noise = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return noise + mean * torch.eye(4)[labels], labels


def _rows(features, cond, **more):
    errors = torch.arange(len(cond), dtype=torch.float64)
    found = {"clip": EMPTY, "lpips": EMPTY, "first": torch.zeros(0, 1, 2, 2), **more}
    return SampleRows(features, cond, errors, **found)


@pytest.fixture(scope="module")
def data():
    return _clusters(300, seed=0)


@pytest.fixture(scope="module")
def teacher():
    return _clusters(150, seed=1)[0]


def test_scores_are_those_of_the_metrics(data, teacher):
    features, cond = _clusters(120, seed=2)
    scores = Scorer(*data, teacher)(_rows(features, cond)).scores
    assert scores["frechet_data"] == frechet_distance(data[0], features)
    assert scores["frechet_teacher"] == frechet_distance(teacher, features)
    assert scores["kid_teacher"] == kernel_distance(teacher, features)
    assert scores.items() >= prdc(data[0], features).items()
    assert scores["paired_error"] == 119 / 2
    assert not {"clip_score", "lpips_diversity"} & set(scores)


def test_asked_scores_are_means_of_their_rows(data, teacher):
    features, cond = _clusters(120, seed=2)
    rows = _rows(features, cond, clip=torch.linspace(20, 30, 120), lpips=torch.tensor([0.1, 0.3]))
    scores = Scorer(*data, teacher)(rows).scores
    assert scores["clip_score"] == pytest.approx(25)
    assert scores["lpips_diversity"] == pytest.approx(0.2)


def test_groups_score_as_all_do_on_average_and_pair_up_between_samplers(data, teacher):
    features, cond = _clusters(120, seed=2)
    score = Scorer(*data, teacher)
    found, shifted = (score(_rows(x, cond, clip=torch.linspace(20, 30, 120))) for x in (features, features + 3))
    assert {name: len(values) for name, values in found.groups.items()} == dict.fromkeys(
        ("kid_data", "kid_teacher", "paired_error", "clip_score"), GROUPS
    )
    for name in ("paired_error", "clip_score"):
        assert sum(found.groups[name]) / GROUPS == pytest.approx(found.scores[name])
        assert found.groups[name] == shifted.groups[name]  # of the same rows
    for name in ("kid_data", "kid_teacher"):
        pairs = list(zip(found.groups[name], shifted.groups[name], strict=True))
        assert all(far > near for near, far in pairs)
        mean, error = torch.tensor([far for _, far in pairs]).mean(), torch.tensor([far for _, far in pairs]).std()
        assert abs(float(mean) - shifted.scores[name]) < float(error)


def test_a_group_of_sorted_rows_has_some_of_all():
    parts = _parts(torch.arange(100).repeat_interleave(10))
    assert [len(part) for part in parts] == [100] * GROUPS
    assert all(part.unique().numel() > 50 for part in parts)


def test_few_rows_have_no_groups(data, teacher):
    features, cond = _clusters(2 * GROUPS - 1, seed=2)
    assert Scorer(*data, teacher)(_rows(features, cond)).groups == {}
    enough, few_data = _rows(*_clusters(2 * GROUPS, seed=2)), (data[0][:10], data[1][:10])
    assert set(Scorer(*few_data, teacher)(enough).groups) == {"kid_teacher", "paired_error"}


def test_one_class_that_fails_is_seen_in_its_row_alone(data, teacher):
    """Samples of class 1 that look like class 0 lie among the data, but not among the data of their class."""
    features, cond = _clusters(120, seed=2)
    features[cond == 1] = features[cond == 0]
    measured = Scorer(*data, teacher, prompts=["a", "b", "c"])(_rows(features, cond))
    good, bad, other = measured.classes
    assert measured.scores["precision"] > 0.9
    assert (bad["precision"], bad["coverage"]) == (0, 0)
    assert min(good["precision"], good["coverage"], other["precision"], other["coverage"]) > 0.6
    assert bad["kid_data"] > 100 * abs(good["kid_data"])
    assert [row["prompt"] for row in measured.classes] == ["a", "b", "c"]
    assert [row["count"] for row in measured.classes] == [40, 40, 40]
    assert [row["paired_error"] for row in measured.classes] == [58.5, 59.5, 60.5]


def test_small_classes_have_what_they_can_have(teacher):
    data, labels = _clusters(303, seed=0)
    labels[-3:] = torch.tensor([5, 5, 6])
    features, cond = _clusters(120, seed=2)
    cond[:2] = torch.tensor([5, 5])
    *_, five, six = Scorer(data, labels, teacher)(_rows(features, cond)).classes
    assert five.keys() == {"class", "count", "paired_error", "kid_data"}
    assert six == {"class": 6, "count": 0}


def test_data_without_labels_has_no_classes(data, teacher):
    unlabelled = torch.full((300,), -1)
    assert Scorer(data[0], unlabelled, teacher)(_rows(teacher, unlabelled[:150])).classes == []
