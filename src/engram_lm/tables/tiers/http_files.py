"""fsspec's files over http, with the two checks that reading rows needs. Imports fsspec and aiohttp."""

import urllib.parse
from typing import Any

from fsspec.implementations.http import HTTPFileSystem

from engram_lm.errors import RemoteError
from engram_lm.tables.layout import VERSION_MARK


class HttpFiles(HTTPFileSystem):
    """Files over http that are read as long as they have the version that their address is marked with."""

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        address, _, version = url.partition(VERSION_MARK)
        if version and not version.startswith("W"):
            # A server that holds another version answers with the whole file, which is refused.
            kwargs["headers"] = {"If-Range": urllib.parse.unquote(version)}
        return await super()._cat_file(address, start=start, end=end, **kwargs)


async def refuse_whole_file(response: Any) -> None:
    """Refuse a whole file where a part was asked for, before it is sent; an aiohttp session calls this."""
    if response.status == 200 and "Range" in response.request_info.headers:
        raise RemoteError(
            f"{response.url}: the server ignores range requests (expected status 206, found 200), so rows cannot be "
            "read without the whole file; use a server that answers them, or download the file"
        )
