"""The exact reverse KL, from all of the teacher's logits."""

from __future__ import annotations

from minidistill.estimators.base import Estimator, TeacherNeeds


class Full(Estimator):
    """-ρ adv_tau A log π(y) + Σ_v π_v (student_tau log π_v - teacher_tau log q_v)"""

    name = kernel_mode = "full"
    needs = TeacherNeeds.ALL_LOGITS


FULL = Full()
