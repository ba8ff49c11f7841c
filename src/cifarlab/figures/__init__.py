"""Arrays in, figure out: every figure is drawn by one function of this table, the same for a run's folder and for a report.

Charts are Altair's (PNG, SVG, or a live chart in a page), grids of images Matplotlib's. Nothing here imports torch, reads or
writes a file (but `save_figure`), or keeps a global state; Altair and Matplotlib are imported when a figure is drawn.
"""

from collections.abc import Callable
from typing import Any

from cifarlab.figures.activations import draw_activations
from cifarlab.figures.arms import draw_arm_curves, draw_arms
from cifarlab.figures.classes import draw_class_accuracy
from cifarlab.figures.confusion import draw_confusion
from cifarlab.figures.cost import draw_flops, draw_roofline
from cifarlab.figures.curvature import draw_sharpness
from cifarlab.figures.curves import draw_learning_curves
from cifarlab.figures.distributions import draw_distributions
from cifarlab.figures.export import how_to_read, save_figure
from cifarlab.figures.filters import draw_exciting, draw_feature_maps, draw_filters, draw_saliency
from cifarlab.figures.geometry import draw_geometry
from cifarlab.figures.gradient_flow import draw_flow_map, draw_gradient_flow
from cifarlab.figures.images import draw_samples
from cifarlab.figures.landscape import draw_landscape_contour, draw_landscape_line, draw_landscape_surface
from cifarlab.figures.lr_range import draw_lr_accuracy, draw_lr_range
from cifarlab.figures.noise import draw_noise
from cifarlab.figures.receptive import draw_effective_field, draw_receptive_field
from cifarlab.figures.reliability import draw_reliability
from cifarlab.figures.schedule import draw_lr
from cifarlab.figures.sensitivity import draw_importance, draw_pairs
from cifarlab.figures.update_ratio import draw_update_ratio
from cifarlab.figures.weight_flow import draw_weight_magnitude

__all__ = [
    "FIGURES",
    "draw_activations",
    "draw_arm_curves",
    "draw_arms",
    "draw_class_accuracy",
    "draw_confusion",
    "draw_distributions",
    "draw_effective_field",
    "draw_exciting",
    "draw_feature_maps",
    "draw_filters",
    "draw_flops",
    "draw_flow_map",
    "draw_geometry",
    "draw_gradient_flow",
    "draw_importance",
    "draw_landscape_contour",
    "draw_landscape_line",
    "draw_landscape_surface",
    "draw_learning_curves",
    "draw_lr",
    "draw_lr_accuracy",
    "draw_lr_range",
    "draw_noise",
    "draw_pairs",
    "draw_receptive_field",
    "draw_reliability",
    "draw_roofline",
    "draw_saliency",
    "draw_samples",
    "draw_sharpness",
    "draw_update_ratio",
    "draw_weight_magnitude",
    "how_to_read",
    "save_figure",
]

FIGURES: dict[str, Callable[..., Any]] = {
    "learning-curves": draw_learning_curves,
    "learning-rate": draw_lr,
    "lr-range": draw_lr_range,
    "lr-accuracy": draw_lr_accuracy,
    "confusion": draw_confusion,
    "class-accuracy": draw_class_accuracy,
    "reliability": draw_reliability,
    "samples": draw_samples,
    "receptive-field": draw_receptive_field,
    "effective-field": draw_effective_field,
    "flops": draw_flops,
    "roofline": draw_roofline,
    "gradient-flow": draw_gradient_flow,
    "flow-map": draw_flow_map,
    "update-ratio": draw_update_ratio,
    "weight-magnitude": draw_weight_magnitude,
    "distributions": draw_distributions,
    "activations": draw_activations,
    "sharpness": draw_sharpness,
    "noise": draw_noise,
    "landscape-line": draw_landscape_line,
    "landscape-contour": draw_landscape_contour,
    "landscape-surface": draw_landscape_surface,
    "filters": draw_filters,
    "feature-maps": draw_feature_maps,
    "exciting": draw_exciting,
    "saliency": draw_saliency,
    "geometry": draw_geometry,
    "arms": draw_arms,
    "arm-curves": draw_arm_curves,
    "pairs": draw_pairs,
    "importance": draw_importance,
}
