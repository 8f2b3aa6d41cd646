"""Evaluation of samplers; needs no download."""

from ddil_ray.evaluation.evaluate import Benchmark
from ddil_ray.evaluation.features import FeatureNetwork, train_features
from ddil_ray.evaluation.samplers import Sampler, exported_sampler, student_samplers, teacher_sampler

__all__ = [
    "Benchmark",
    "FeatureNetwork",
    "Sampler",
    "exported_sampler",
    "student_samplers",
    "teacher_sampler",
    "train_features",
]
