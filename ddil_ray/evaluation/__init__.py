"""Evaluation of samplers; needs no download."""

from ddil_ray.evaluation.evaluate import Benchmark, Sampler
from ddil_ray.evaluation.features import FeatureNetwork, train_features

__all__ = ["Benchmark", "FeatureNetwork", "Sampler", "train_features"]
