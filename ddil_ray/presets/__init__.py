"""Shipped configs (NAME.yaml) and small teachers (NAME/, diffusers pipeline folders)."""
