"""Upload of a verified folder to a hub repository, only ever by an explicit flag."""

from __future__ import annotations

from pathlib import Path


def push(folder: Path, repository: str) -> None:
    """Creates the repository (private) if needed and uploads the folder; credentials are the hub client's own.

    Raises:
        OSError: the hub refuses or cannot be reached; the folder on disk is untouched and stays verified.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_large_folder(repo_id=repository, folder_path=str(folder), repo_type="model")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise OSError(f"--push {repository}: {str(error).splitlines()[0]}; {folder} is complete on disk") from error
    print(f"pushed {folder} to {repository}")
