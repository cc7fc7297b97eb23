"""The estimators of the objective, by name. Importing this package imports no torch."""

from minidistill.estimators.base import Estimator, LossSettings, TeacherInputs, TeacherNeeds
from minidistill.estimators.full import FULL
from minidistill.estimators.sampled import SAMPLED
from minidistill.estimators.sft import SFT
from minidistill.estimators.top_k import TOP_K

__all__ = [
    "ESTIMATORS",
    "FULL",
    "SAMPLED",
    "SFT",
    "TOP_K",
    "Estimator",
    "LossSettings",
    "TeacherInputs",
    "TeacherNeeds",
]

ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        SAMPLED,
        FULL,
        TOP_K,
        SFT,
    )
}
