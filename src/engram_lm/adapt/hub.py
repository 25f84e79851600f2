"""Adapters in repositories of the Hugging Face Hub: fetched file by file, written in one commit."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_lm.adapt.folder import CONFIG, FILES, TABLES, AdapterFiles, LocalFiles, check_adapter
from engram_lm.adapt.model_card import REPOSITORY
from engram_lm.adapt.patch_folder import PATCHES
from engram_lm.errors import CheckpointError, ConfigError, EngramError, RemoteError
from engram_lm.files import user_path

_ACCESS = "log in with `hf auth login`, or pass token="
_ANSWER_SECONDS = 8.0


class HubFiles:
    """Files of a repository, downloaded into the cache that all Hugging Face libraries share.

    All files come from the commit that the revision names when the first one is fetched. The options are ``token``,
    ``cache_dir`` and ``local_files_only``, as for `huggingface_hub.hf_hub_download`.
    """

    def __init__(self, repo_id: str, *, revision: str | None, **options: Any) -> None:
        self.name = repo_id
        self._options: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "local_files_only": False, **options}
        self._access = {"token": options.get("token")}
        self._is_asked = self._options["local_files_only"]

    def fetch(self, name: str, most_bytes: int) -> Path | None:
        """Download a file unless it is in the cache; see `AdapterFiles.fetch`."""
        from huggingface_hub import errors, hf_hub_download

        if not self._is_asked:
            self._options["local_files_only"] |= not hub_answers(self.name, self._options["revision"], **self._access)
            self._is_asked = True
        try:
            with _speaking(f"cannot fetch {name} of {self.name}", errors.EntryNotFoundError):
                found = hf_hub_download(filename=name, dry_run=True, **self._options)
                if found.file_size is not None and found.file_size > most_bytes:
                    raise CheckpointError(
                        f"{name} of the repository {self.name} has {found.file_size:,} bytes, but what its "
                        f"configuration describes takes at most {most_bytes:,}; it is not downloaded"
                    )
                # The first request names the branch, so that the cache remembers which commit the branch was.
                path = Path(hf_hub_download(filename=name, **self._options))
                self._options["revision"] = path.parent.name  # snapshots/COMMIT/NAME
                return path
        except errors.LocalEntryNotFoundError as error:
            raise RemoteError(
                f"there is no folder {self.name} on this machine, {name} of a repository of that name was not "
                "downloaded before, and the Hub does not answer, or is not asked (local_files_only, HF_HUB_OFFLINE, "
                "HF_ENDPOINT, HTTPS_PROXY); look at how the name is spelled"
            ) from error
        except errors.EntryNotFoundError:
            return None

    def fetch_folder(self, name: str, most_bytes: int) -> Path:
        """Download the safetensors of a folder unless they are in the cache; see `AdapterFiles.fetch_folder`."""
        from huggingface_hub import errors, snapshot_download

        # With a file that is always there, because the client warns where nothing fits its patterns.
        wanted: dict[str, Any] = {**self._options, "allow_patterns": [CONFIG, f"{name}/*.safetensors"]}
        with _speaking(f"cannot fetch {name}/ of {self.name}"):
            try:
                listed = [] if wanted["local_files_only"] else snapshot_download(dry_run=True, **wanted)
            except errors.DryRunError:  # without a network; then what was downloaded before is complete, or an error
                listed = []
            if (size := sum(file.file_size or 0 for file in listed)) > most_bytes:
                raise CheckpointError(
                    f"the files in {name}/ of the repository {self.name} have {size:,} bytes, but what its "
                    f"configuration describes takes at most {most_bytes:,}; they are not downloaded"
                )
            return Path(snapshot_download(**wanted))


def hub_answers(repo_id: str, revision: str | None = None, *, token: str | bool | None = None) -> bool:
    """Ask the Hub for a repository, once and for a few seconds: its client asks again and again for a minute.

    Returns:
        Whether the Hub answers. Where it does not, or must not be asked, only what was downloaded before can be used.

    Raises:
        CheckpointError: The Hub answers that there is no such repository or revision.
    """
    from huggingface_hub import HfApi, errors

    try:
        HfApi(token=token).model_info(repo_id, revision=revision, timeout=_ANSWER_SECONDS)
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"the repository {repo_id} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {repo_id} on this machine, and the Hub shows no repository of that name; look at how "
            f"it is spelled, and if it is private or gated, {_ACCESS}"
        ) from error
    except errors.HfHubHTTPError:
        return True  # it answers; what it says of a file is more to the point
    except Exception:  # the client's releases use different HTTP libraries, each with its own errors
        return False
    return True


def files_of(path_or_repo: str | os.PathLike[str], *, revision: str | None = None, **options: Any) -> AdapterFiles:
    """Tell a folder from a repository: whatever exists here, or cannot be the name of a repository, is a folder."""
    path = user_path(path_or_repo)
    if isinstance(path_or_repo, os.PathLike) or path.exists() or not REPOSITORY.fullmatch(path_or_repo):
        return LocalFiles(path)
    return HubFiles(path_or_repo, revision=revision, **options)


def push_folder(
    repo_id: str,
    write: Callable[[Path], None],
    *,
    tables: bool,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
) -> str:
    """Write an adapter's folder to a repository in one commit, and return the commit's address.

    The arguments are those of `MemoryAdapter.push_to_hub`; ``write`` writes the adapter into the folder it is given.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not REPOSITORY.fullmatch(repo_id):
        raise ConfigError(f"a repository is called 'owner/name', not {repo_id!r:.200}")
    api = HfApi(token=token)
    with _speaking(f"the Hub does not take {repo_id}; {_ACCESS} with the right to write there"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        held = set(api.list_repo_files(repo_id, revision=revision))
    if CONFIG in held:
        # Anyone who loads a model from there would otherwise get our configuration with its weights.
        with tempfile.TemporaryDirectory() as cache:
            there = HubFiles(repo_id, revision=revision, token=token, cache_dir=cache, local_files_only=False)
            try:
                check_adapter(there)
            except CheckpointError as error:
                raise ConfigError(f"the repository {repo_id} holds something else ({error}); name another") from error
    # Tables that are pushed hold what row patches say, and those of an earlier adapter do not fit them.
    patches = sorted(name for name in held if name.startswith(f"{PATCHES}/"))
    if (TABLES in held or patches) and not tables:
        raise ConfigError(
            f"the repository {repo_id} holds {'tables' if TABLES in held else 'row patches'}, which need not belong to "
            "this adapter; push with tables=True, or to another repository or revision"
        )
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "adapter"
        write(written)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=written / name)
            for name in FILES
            if (written / name).is_file()
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in patches]
        with _speaking(f"the Hub does not take the files for {repo_id}"):
            done = api.create_commit(
                repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
            )
    return str(done.commit_url)


@contextmanager
def _speaking(what: str, *known: type[Exception]) -> Iterator[None]:
    """Turn any error of the Hub, except those that the caller handles, into one that says what has failed."""
    try:
        yield
    except Exception as error:  # the client's releases use different HTTP libraries, each with its own errors
        if isinstance(error, (EngramError, *known)):
            raise
        raise RemoteError(f"{what}: {error!s:.500}") from error
