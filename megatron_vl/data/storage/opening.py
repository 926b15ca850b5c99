"""From the url of a source to its folder."""

from pathlib import Path

from megatron_vl.config.errors import UserError
from megatron_vl.data.storage.folder import AccessRule, Folder
from megatron_vl.data.storage.local import LocalFolder


def open_folder(url: str | Path, access: AccessRule) -> Folder:
    """The folder at a path or url. Nothing is read yet.

    Raises UserError where nothing here reads such a url.
    """
    scheme, separator, _ = str(url).partition("://")
    if not separator:
        return LocalFolder(url)
    raise UserError(f"{url}: nothing reads {scheme}://; a folder is a path")
