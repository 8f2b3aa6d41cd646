"""Pushing an exported folder to the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ddil_ray.card import call_with
from ddil_ray.errors import ConfigError, RunFailedError, first_line

__all__ = ["check_push", "push"]


def check_push(repo_id: str, field: str = "--push") -> None:
    """What can be known before anything is sent to `repo_id`, which was given as `field`.

    Raises:
        ConfigError: no such name can be, or nothing says who pushes.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"`{field}` must be owner/name, but is {repo_id!r} instead: {first_line(error)}") from error
    if get_token() is None:
        raise ConfigError(
            f"`{field}` must have a token of the hub, but there is none. Run `hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Make the repository where it is not there, and commit all of `folder` to it, whose card then loads from there.

    Returns:
        The address of the repository.

    Raises:
        RunFailedError: the hub refused, or is out of reach.
    """
    call_with(folder, place=repo_id)
    api = HfApi()
    try:
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a student of ddil-ray")
    except Exception as error:  # the hub's and its transport's have no common class
        raise RunFailedError(
            f"Pushing to {repo_id} failed: {first_line(error)}. The folder is whole; try again with "
            f"`hf upload {repo_id} {folder}`."
        ) from error
    return url
