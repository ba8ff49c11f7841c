"""The studies: one question a file. Which configs, which figure, what counts as an answer."""

from cifarlab.studies.study import Arm, Outcome, Results, Study, Trial

__all__ = ["STUDIES", "Arm", "Outcome", "Results", "Study", "Trial"]

STUDIES: dict[str, Study] = {}
