"""Upload of a verified folder to a hub repository, only ever by an explicit flag.

Repository name and credentials are checked before the export begins: a mistake in them should not cost hours of writing.
The hub (HF_ENDPOINT) and the token are the hub client's own affair; the upload streams and resumes where it can.
"""

from __future__ import annotations

from pathlib import Path


def check(repository: str) -> None:
    """Raises ValueError (one line) for a name that no hub takes, or if there is no token; asks nobody."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: {_line(error)}; expected name or organisation/name") from None
    if get_token() is None:
        raise ValueError(f"--push {repository}: no token for the hub; log in (`hf auth login`) or set HF_TOKEN")


def push(folder: Path, repository: str) -> None:
    """Creates the repository (private; one that exists stays as it is) if needed and uploads the folder.

    Raises:
        OSError: the hub refuses, breaks off or cannot be reached, or the user does; the folder on disk is untouched and stays
            verified. One line, which says how to go on.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the HTTP library that this version of the client uses

    api = HfApi()
    try:
        created = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="FP4 checkpoint")
    except (HTTPError, OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else _line(error)
        raise OSError(f"--push {repository}: {reason}; {folder} is complete and verified on disk, go on with: "
                      f"hf upload {repository} {folder}") from None
    print(f"pushed {folder} to {created}")


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
