"""An estimator added by a user, registered before the command line runs.

python -m support.half_divergence run FILES… --trainer.loss.estimator half_divergence
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from minidistill.estimators import ESTIMATORS, LossSettings
from minidistill.estimators.full import Full


class HalfDivergence(Full):
    """The `full` estimator with both taus halved."""

    name = "half_divergence"

    def loss_function(self, settings: LossSettings) -> Any:
        halved = replace(
            settings, teacher_tau=settings.teacher_tau / 2, student_tau=settings.student_tau / 2
        )
        return super().loss_function(halved)


ESTIMATORS[HalfDivergence.name] = HalfDivergence()

if __name__ == "__main__":
    from minidistill import cli

    sys.exit(cli.main(sys.argv[1:]))
