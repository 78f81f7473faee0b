"""Folders of a Hugging Face hub, by huggingface_hub: the files of one commit, with its hashes."""

from __future__ import annotations

import hashlib
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ...errors import AdapterInvalid
from . import remote
from .address import HUB, Address
from .remote import Interrupted, TooLong
from .web import download

PIECE = 1 << 20


class Hub:
    """A folder in a repository of models, at the commit that its revision means when asked."""

    def __init__(self, address: Address) -> None:
        found = HUB.fullmatch(address.place)
        assert found is not None
        self._repo, self._revision = found["repo"], found["revision"]
        self._folder = f"{found['folder']}/" if found["folder"] else ""
        self._commit = ""
        self._files: dict[str, Any] = {}

    def version(self) -> str:
        """The commit."""
        from huggingface_hub import HfApi, errors

        try:
            info = HfApi().model_info(
                self._repo,
                revision=self._revision,
                timeout=remote.READ_SECONDS,
                files_metadata=True,
            )
        except errors.RevisionNotFoundError as error:
            raise AdapterInvalid(f"{self._repo} has no revision {self._revision!r}") from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise AdapterInvalid(
                f"the hub shows no {self._repo}; if it is private, set HF_TOKEN to a token that "
                "may read it"
            ) from error
        except Exception as error:  # of its HTTP library
            raise Interrupted(f"the hub: {error or type(error).__name__}") from error
        if not info.sha:
            raise Interrupted(f"the hub names no commit of {self._repo}")
        self._commit = info.sha
        self._files = {file.rfilename: file for file in info.siblings or ()}
        return info.sha

    def fetch(self, name: str, file: BinaryIO, max_bytes: int, until: float) -> bool:
        """As `Remote.fetch`; the content is what the commit says."""
        from huggingface_hub import hf_hub_url

        # The package imports it without naming it in __all__: its documentation does.
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        path = self._folder + name
        known = self._files.get(path)
        if known is None:
            return False
        if known.size is not None and known.size > max_bytes:
            raise TooLong(f"{name} has {known.size} bytes, more than {max_bytes}")
        url = hf_hub_url(self._repo, path, revision=self._commit)
        own = urlsplit(url)[:2]

        def may_go(other: str) -> bool:
            """To the hub's own stores, which it names itself."""
            return urlsplit(other).scheme == "https" or urlsplit(other)[:2] == own

        if not download(url, file, name, max_bytes, until, may_go, build_hf_headers()):
            raise Interrupted(f"the hub lists {name} and does not have it")
        _check_hash(file, known)
        return True


def _check_hash(file: BinaryIO, known: Any) -> None:
    """Interrupted, unless the file is what the hub's commit says."""
    size = file.tell()
    if known.lfs is not None:
        hash_, wanted = hashlib.sha256(), known.lfs.sha256
    else:
        hash_, wanted = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), known.blob_id
    file.seek(0)
    while piece := file.read(PIECE):
        hash_.update(piece)
    if wanted is not None and hash_.hexdigest() != wanted:
        raise Interrupted(
            f"{known.rfilename} came with {hash_.hexdigest()} as its hash, and the commit says "
            f"{wanted}"
        )
