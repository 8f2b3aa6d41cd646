"""Pins paired statistics to scipy's own, and the warning to planted laws of t."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from studies import time_record

from ddil_ray.ablation.statistics import compare_laws, interval, lower_is_better, paired_difference, time_counts

BASELINE, ARM = [1.0, 2.0, 4.0, 3.0], [0.5, 1.1, 1.9, 3.3]


def test_the_interval_of_a_paired_difference_is_that_of_the_paired_t_test():
    found = paired_difference(BASELINE, ARM)
    oracle = stats.ttest_rel(ARM, BASELINE).confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((oracle.low, oracle.high))
    assert found.difference.mean == pytest.approx(np.mean(np.subtract(ARM, BASELINE)))
    ratios = np.divide(ARM, BASELINE)
    oracle = stats.ttest_1samp(ratios, 0).confidence_interval(0.95)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((oracle.low, oracle.high))
    assert (found.of_baseline.mean, found.of_arm.mean) == pytest.approx((2.5, 1.7))


def test_the_interval_covers_the_mean_at_its_level():
    """950 of 1,000 expected, sd 7: outside 915 to 985 less than once in 10^6."""
    samples = np.random.default_rng(0).normal(3.0, 2.0, (1000, 5))
    hits = sum(found.low <= 3.0 <= found.high for found in map(interval, samples.tolist()))
    assert 915 < hits < 985


@pytest.mark.parametrize(
    ("score", "lower", "better"),
    [("frechet_teacher", True, 3), ("paired_error", True, 3), ("coverage", False, 1), ("spread", None, None)],
)
def test_better_follows_the_direction_of_the_score(score, lower, better):
    assert lower_is_better(score) is lower
    assert paired_difference(BASELINE, ARM, lower_better=lower).better == better


def test_one_seed_has_no_interval_and_a_baseline_at_zero_no_ratio():
    one = paired_difference([2.0], [1.0])
    assert (one.difference.mean, one.difference.low, one.difference.high) == (-1.0, None, None)
    assert (one.ratio.mean, one.ratio.low) == (0.5, None)
    assert paired_difference([0.0, 1.0], [1.0, 1.0]).ratio is None


def test_rows_are_counted_over_sources_and_each_once():
    records = [time_record(10, (0.4, 0.3, 0.2, 0.1)), time_record(30, (0.1, 0.2, 0.3, 0.4))]
    counts = time_counts(records, batch_size=100, reuse=2)
    assert counts == pytest.approx([0.4 * 500 + 0.1 * 1000, 0.3 * 500 + 200, 0.2 * 500 + 300, 50 + 400])
    assert sum(counts) == pytest.approx(30 * 100 / 2)


def test_steps_done_again_and_records_without_a_loss_do_not_count():
    records = [time_record(10), time_record(20), time_record(20), {"step": 20, "phase": 0, "shift/energy/step_1": 1.0}]
    assert sum(time_counts(records, batch_size=10, reuse=1)) == pytest.approx(200)


def test_a_planted_difference_of_t_is_told_and_chance_is_not():
    """Of 1,000 pairs of one law, 1 is expected below p = .001; more than 8 come up less than once in 10^5."""
    generator = np.random.default_rng(0)
    law = np.array([0.1, 0.2, 0.3, 0.4])
    same = generator.multinomial(5000, law, size=(1000, 2)).tolist()
    assert sum(compare_laws(*pair).differs for pair in same) <= 8
    found = compare_laws(generator.multinomial(5000, law), generator.multinomial(5000, law[[0, 1, 3, 2]]))
    assert found.differs
    assert found.total_variation == pytest.approx(0.1, abs=0.03)
    assert found.p_value < 1e-10


def test_a_difference_must_be_both_sure_and_large_to_be_told():
    tiny = compare_laws([2_500_000, 2_500_000], [2_510_000, 2_490_000])
    assert tiny.p_value < 1e-3
    assert not tiny.differs
    few = compare_laws([10, 10], [13, 7])
    assert few.total_variation > 0.1
    assert not few.differs


def test_laws_of_one_quarter_are_the_same():
    assert not compare_laws([0, 50, 0, 0], [0, 70, 0, 0]).differs
