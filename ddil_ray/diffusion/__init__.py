"""The mathematics of diffusion that distillation needs; pure torch."""
