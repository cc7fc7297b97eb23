"""Claims: intervals over seeds, verdicts, and figures that follow from others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support.experiment_records import OTHER, SHORT, record, records

from bench.experiments.claims import (
    CONFIRMED,
    CONTRADICTED,
    INCOMPLETE,
    NOT_SHOWN,
    UNDEFINED,
    Alike,
    Claim,
    EverySeed,
    Higher,
    Near,
    judged,
)
from bench.experiments.statistics import T975, difference, mean


def test_intervals_are_students_t() -> None:
    """The density between the quantiles, integrated, is 95%."""
    for n, quantile in T975.items():
        freedom = n - 1
        t = np.linspace(-quantile, quantile, 200_001)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        density = (
            scale / math.sqrt(freedom * math.pi) * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
        )
        assert np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-5)
    values = [0.91, 0.95, 0.93, 0.97, 0.90]
    measured = mean(values)
    half = T975[5] * float(np.std(values, ddof=1)) / math.sqrt(5)
    assert (measured.low, measured.high) == pytest.approx((0.932 - half, 0.932 + half))
    assert measured.lowest == 0.90


@pytest.mark.parametrize("values", [[0.5], [0.4, 0.6]])
def test_fewer_than_three_seeds_have_no_interval(values: list[float]) -> None:
    assert mean(values).value == pytest.approx(0.5)
    assert mean(values).low is None
    assert mean(values).high is None


def test_differences_are_paired() -> None:
    """What the seeds have in common does not widen the interval."""
    measured = difference([0.2, 0.5, 0.9], [0.1, 0.4, 0.8])
    assert measured.value == pytest.approx(0.1)
    assert measured.low == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shorter"):
        difference([0.1, 0.2], [0.1])


@pytest.mark.parametrize(
    ("claim", "values", "word"),
    [
        (EverySeed("", "short", "gap_closed", 0.9), (0.95, 0.9), CONFIRMED),
        (EverySeed("", "short", "gap_closed", 0.9), (0.99, 0.89), CONTRADICTED),
        (EverySeed("", "short", "gap_closed", 0.9, most=True), (0.9, 0.1), CONFIRMED),
        (EverySeed("", "short", "gap_closed", 0.9, most=True), (0.91, 0.1), CONTRADICTED),
        (EverySeed("", "short", "gap_closed", 0.9), (0.99, float("nan")), UNDEFINED),
    ],
)
def test_verdicts_of_one_run(claim: Claim, values: tuple[float, ...], word: str) -> None:
    assert judged(claim, records(SHORT, "gap_closed", *values), 2).word == word


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((1.9, 1.91, 1.92), CONFIRMED),
        ((1.7, 1.71, 1.72), CONTRADICTED),
        ((2.3, 2.31, 2.32), CONTRADICTED),
        ((1.7, 2.0, 2.3), NOT_SHOWN),
        ((2.0, 2.0), INCOMPLETE),
    ],
)
def test_verdicts_of_a_prediction(values: tuple[float, ...], word: str) -> None:
    """By the interval, not by the mean."""
    claim = Near("", "short", "gap_closed", 2.0, 0.1)
    assert judged(claim, records(SHORT, "gap_closed", *values), 3).word == word


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        ((0.8, 0.82, 0.81), CONFIRMED),
        ((0.2, 0.22, 0.21), CONTRADICTED),
        ((0.1, 0.9, 0.5), NOT_SHOWN),
        ((0.8, 0.82), INCOMPLETE),
        ((0.8, 0.82, math.nan), UNDEFINED),
    ],
)
def test_verdicts_of_two_runs(ours: tuple[float, ...], word: str) -> None:
    both = records(SHORT, "gap_closed", *ours) | records(OTHER, "gap_closed", 0.5, 0.5, 0.5)
    assert judged(Higher("", "short", "other"), both, 3).word == word


def test_a_margin_moves_the_border() -> None:
    both = records(SHORT, "student", 0.52, 0.58, 0.5) | records(OTHER, "student", 0.5, 0.5, 0.5)
    for margin, word in ((0.0, NOT_SHOWN), (-0.1, CONFIRMED), (0.2, CONTRADICTED)):
        assert judged(Higher("", "short", "other", "student", margin), both, 3).word == word


def test_means_that_are_alike() -> None:
    both = records(SHORT, "student", 0.55, 0.65) | records(OTHER, "student", 0.5, 0.5)
    for runs, margin, seeds, word in (
        (("short", "other"), 0.11, 2, CONFIRMED),
        (("other", "short"), 0.09, 2, CONTRADICTED),
        (("short", "other"), 0.09, 3, INCOMPLETE),
    ):
        assert judged(Alike("", *runs, "student", margin), both, seeds).word == word


def test_a_run_that_failed_leaves_a_claim_incomplete() -> None:
    made = {"short": [record(SHORT, 0, gap_closed=0.9), record(SHORT, 1, error="it broke")]}
    assert judged(EverySeed("", "short", "gap_closed", 0.5), made, 2).word == INCOMPLETE


def test_figures_that_follow_from_others() -> None:
    kls: dict[str, Any] = {"heldout_kl_before": 0.5, "heldout_kl_after": 0.1, "drift_kl": 0.04}
    made = record(SHORT, 0, student=0.9, baseline_student=0.2, **kls)
    assert made.number("gain") == pytest.approx(0.7)
    assert made.number("distilled") == pytest.approx(0.4)
    assert made.number("drift_share") == pytest.approx(0.1)
    assert made.number("added_back") is None
    worse = record(SHORT, 0, **kls | {"heldout_kl_after": 0.7})
    assert worse.number("drift_share") is None, "there is nothing that it is a share of"
