"""A bounded cache of prompt embeddings, looked up by prompt id.

Embeddings outweigh the latents they describe 3 to 30 times, so they never travel with states: a state's condition is
the id of its prompt. Every process that runs a network holds one `PromptBank`, shared by all its networks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ddil_ray.errors import DataError

__all__ = ["NEGATIVE", "EmbeddingSource", "Embeddings", "HeldEmbeddings", "PromptBank", "Prompts"]

NEGATIVE = -1
"""The id of the negative prompt, towards which guidance pushes away."""

Embeddings = dict[str, Tensor]
"""What text encoders make of B prompts, by name: each (B, ...). The names are the family's own."""


class EmbeddingSource(Protocol):
    """Where embeddings lie; small, and sent to every process."""

    def __len__(self) -> int:
        """Number of prompts; their ids are 0 to this."""

    def rows(self, ids: Sequence[int]) -> Embeddings:
        """Embeddings of the prompts `ids`, in that order, on the CPU."""

    def texts(self) -> Sequence[str]:
        """All prompts, in the order of ids; empty where they are not known."""


@dataclass(frozen=True)
class HeldEmbeddings:
    """Embeddings in memory; for tests, and for few prompts."""

    embeddings: Embeddings
    prompts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(next(iter(self.embeddings.values())))

    def rows(self, ids: Sequence[int]) -> Embeddings:
        """See `EmbeddingSource.rows`."""
        return {name: rows[list(ids)] for name, rows in self.embeddings.items()}

    def texts(self) -> Sequence[str]:
        """See `EmbeddingSource.texts`."""
        return self.prompts


@dataclass(frozen=True)
class Prompts:
    """All prompts of a run: what is sent to a process for its bank."""

    source: EmbeddingSource
    negative: Embeddings
    """Of the negative prompt, (1, ...) each."""
    cache_bytes: int = 512 * 2**20

    def bank(self) -> PromptBank:
        """A bank of these prompts, empty at first."""
        return PromptBank(self)


class PromptBank:
    """Embeddings by prompt id, the most recently used of them in memory.

    Copies of a network share their bank: copying one gives itself. A pickled bank arrives empty.

    Args:
        prompts: where embeddings come from; `cache_bytes` bounds what is kept.
    """

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self._kept: OrderedDict[int, Embeddings] = OrderedDict()
        self._bytes = 0
        self.asked, self.missed = 0, 0

    def __call__(self, cond: Tensor, like: Tensor) -> Embeddings:
        """Embeddings (B, ...) of the prompt ids `cond` (B,), `NEGATIVE` among them, with dtype and device of `like`.

        Raises:
            DataError: an id that there is no prompt for.
        """
        ids = cond.tolist()
        distinct = list(dict.fromkeys(ids))
        found = self._take(distinct)
        place = {id_: i for i, id_ in enumerate(distinct)}
        rows = torch.tensor([place[id_] for id_ in ids], device=like.device)
        stacked = {name: torch.stack([found[i][name] for i in distinct]).to(like) for name in self.prompts.negative}
        return {name: part[rows] for name, part in stacked.items()}

    def _take(self, ids: list[int]) -> dict[int, Embeddings]:
        """Embeddings of distinct `ids`, read where they are not kept."""
        found = {}
        for id_ in ids:
            if id_ == NEGATIVE:
                found[id_] = {name: part[0] for name, part in self.prompts.negative.items()}
            elif id_ in self._kept:
                self._kept.move_to_end(id_)
                found[id_] = self._kept[id_]
        missing = [id_ for id_ in ids if id_ not in found]
        self.asked, self.missed = self.asked + len(ids), self.missed + len(missing)
        if missing:
            found |= self._read(missing)
        return found

    def _read(self, ids: list[int]) -> dict[int, Embeddings]:
        wrong = next((id_ for id_ in ids if not 0 <= id_ < len(self.prompts.source)), None)
        if wrong is not None:
            raise DataError(
                f"Prompt ids must be from 0 to {len(self.prompts.source) - 1}, but a state has {wrong} instead. "
                "Prepare the data again with `ddil-ray prepare`."
            )
        read = self.prompts.source.rows(ids)
        rows = {id_: {name: part[i].clone() for name, part in read.items()} for i, id_ in enumerate(ids)}
        for id_, row in rows.items():
            self._kept[id_] = row
            self._bytes += _size(row)
        while self._bytes > self.prompts.cache_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)
        return rows

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptBank:
        return self

    def __reduce__(self) -> tuple[type[PromptBank], tuple[Prompts]]:
        return PromptBank, (self.prompts,)


def _size(row: Embeddings) -> int:
    return sum(part.numel() * part.element_size() for part in row.values())
