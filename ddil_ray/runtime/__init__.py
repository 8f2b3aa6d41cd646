"""Distillation on Ray; the only package that imports it. `README.md` here tells who waits for whom."""
