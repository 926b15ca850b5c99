"""From the url of a source to its folder."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from megatron_vl.config.errors import UserError
from megatron_vl.data.storage.folder import AccessRule, Folder
from megatron_vl.data.storage.http import HttpStore
from megatron_vl.data.storage.local import LocalFolder
from megatron_vl.data.storage.objects import GcsStore, S3Store
from megatron_vl.data.storage.remote import RemoteFolder, without_credentials
from megatron_vl.data.storage.store import Store

OPTIONAL = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}  # package, and the extra of ours that installs it


def open_folder(url: str | Path, access: AccessRule) -> Folder:
    """The folder at a path or url. Nothing is read yet.

    Raises UserError where nothing here reads such a url, a package is missing, or the url holds credentials.
    """
    scheme, is_url, rest = str(url).partition("://")
    if not is_url:
        return LocalFolder(url)
    stores: dict[str, Callable[[str], Store]] = {
        "http": HttpStore,
        "https": HttpStore,
        "s3": lambda url: S3Store(url, access.timeout_seconds),
        "gs": GcsStore,
    }
    if scheme not in stores:
        raise UserError(
            f"{scheme}:// is not read; a folder is a path, or begins with {'://, '.join(stores)}://"
        )
    parts = urlsplit(f"{scheme}://{rest.rstrip('/')}")
    if parts.username is not None or parts.query or parts.fragment or not parts.netloc:
        raise UserError(
            f"{without_credentials(str(url))}: a folder's url is {scheme}://WHERE/PATH; credentials come from the "
            "environment (docs/storage.md)"
        )
    if scheme in OPTIONAL:
        _need(scheme)
    return RemoteFolder(parts.geturl(), lambda: stores[scheme](parts.geturl()), access)


def _need(scheme: str) -> None:
    package, extra = OPTIONAL[scheme]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs {package}, which is not installed: pip install 'megatron-vl[{extra}]'"
        ) from error
