"""Evaluation of samplers; needs no download unless it is asked for."""

from ddil_ray.evaluation.evaluate import Benchmark, Measurements
from ddil_ray.evaluation.features import FeatureNetwork, load_features, train_features
from ddil_ray.evaluation.instruments import Instruments, check_instruments, load_instruments
from ddil_ray.evaluation.references import pictures_of, reference_rows
from ddil_ray.evaluation.samplers import Sampler, draw, exported_sampler, most_steps, student_samplers, teacher_sampler

__all__ = [
    "Benchmark",
    "FeatureNetwork",
    "Instruments",
    "Measurements",
    "Sampler",
    "check_instruments",
    "draw",
    "exported_sampler",
    "load_features",
    "load_instruments",
    "most_steps",
    "pictures_of",
    "reference_rows",
    "student_samplers",
    "teacher_sampler",
    "train_features",
]
