"""What one actor of a role holds at its peak."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RoleMemory"]

_CUT = ("student", "teacher", "critic", "target", "average", "gradients", "optimizer")
"""Parts that grow with the network."""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one actor of a role, by part."""

    parts: dict[str, int]
    """At the peak, on the device that computes."""
    host: dict[str, int] = field(default_factory=dict)
    """In the CPU's memory, whatever computes."""
    gpu: bool = False
    """Whether a GPU computes."""

    def cut(self, workers: int) -> RoleMemory:
        """What each of `workers` keeps where they keep parts of whatever grows with the network."""
        parts, host = (
            {name: -(-size // workers) if name in _CUT else size for name, size in where.items()}
            for where in (self.parts, self.host)
        )
        return RoleMemory(parts, host, self.gpu)

    @property
    def device_bytes(self) -> int:
        """At the peak, on the device that computes; all of it where that is the CPU."""
        return sum(self.parts.values()) + (0 if self.gpu else sum(self.host.values()))

    @property
    def host_bytes(self) -> int:
        """In the CPU's memory where a GPU computes."""
        return sum(self.host.values()) if self.gpu else 0
