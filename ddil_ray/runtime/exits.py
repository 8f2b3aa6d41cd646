"""Why a process of Ray's ended, as far as Ray knows; all of this is private in Ray."""

from __future__ import annotations

__all__ = ["exit_of"]


def exit_of(worker: str) -> str:
    """What Ray's table of processes says of the end of one, on one line; nothing where it does not.

    Args:
        worker: Ray's id of the process.
    """
    try:
        from ray._private.state import state
        from ray.core.generated.gcs_pb2 import WorkerTableData

        for row in state._connect_and_get_accessor().get_worker_table():
            process = WorkerTableData.FromString(row)
            if process.worker_address.worker_id.hex() == worker:
                return " ".join(process.exit_detail.split())
    except Exception:  # another Ray may have no such table
        return ""
    return ""
