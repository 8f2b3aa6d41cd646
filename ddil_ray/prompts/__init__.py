"""Prompts as conditions: states carry ids, and whoever runs a network looks the embeddings up; pure torch."""

from __future__ import annotations

from ddil_ray.prompts.bank import NEGATIVE, Embeddings, EmbeddingSource, HeldEmbeddings, PromptBank, Prompts

__all__ = ["NEGATIVE", "EmbeddingSource", "Embeddings", "HeldEmbeddings", "PromptBank", "Prompts"]
