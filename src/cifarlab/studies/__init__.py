"""The studies: one question a file. Which configs, which figure, what counts as an answer."""

from cifarlab.studies import augmentation, filters, landscape, learning_rate, optimizers, schedules, sensitivity, stride_padding
from cifarlab.studies.study import Arm, Outcome, Results, Study, Trial

__all__ = ["STUDIES", "Arm", "Outcome", "Results", "Study", "Trial"]

STUDIES: dict[str, Study] = {
    "learning-rate": learning_rate.STUDY,
    "sensitivity": sensitivity.STUDY,
    "augmentation": augmentation.STUDY,
    "landscape": landscape.STUDY,
    "filters": filters.STUDY,
    "stride-padding": stride_padding.STUDY,
    "optimizers": optimizers.STUDY,
    "schedules": schedules.STUDY,
}
