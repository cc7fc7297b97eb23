"""Seeds derived from names and numbers."""

from __future__ import annotations

from minidistill.seeding import stable_seed


def test_seeds_are_the_same_on_every_machine() -> None:
    assert stable_seed(0, "train", 1, 2) == 18092050307847114677
    assert stable_seed(0, "train", 12) != stable_seed(0, "train", 1, 2)
