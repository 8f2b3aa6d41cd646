"""ddil-ray: few-step students of diffusion models, distilled on Ray with imitation learning."""

__version__ = "0.1.0"

__all__ = ["__version__"]
