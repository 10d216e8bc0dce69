"""Images at URLs of an allow-list, fetched so that nobody can make the server ask other machines.

A URL must lie below an allowed prefix, and so must every address to which it is redirected. The name of a host is
resolved once for a connection, and the connection goes to an address that was checked: none of the operator's own
network, unless the prefix names a host there. What is fetched is bounded in bytes and time.
"""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from openblip.errors import ConfigError, ImageError

MOST_REDIRECTS = 5
MOST_CONNECTIONS = 64
LOCAL_SUFFIXES = ("local", "localhost", "internal", "home.arpa")  # that no public name has
NAT64 = ipaddress.IPv6Address("64:ff9b::").packed[:12]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class AllowedPrefix:
    """URLs of one scheme, host and port, whose path is that of the prefix or below it."""

    def __init__(self, prefix: str) -> None:
        """Raises ConfigError for what is no `http(s)://HOST[:PORT][/PATH]`."""
        try:
            self.url = _parse(prefix)
        except ValueError as error:
            raise ConfigError(f"--allow-image-url {prefix}: {error}") from error
        if self.url.query_string or self.url.fragment:
            raise ConfigError(f"--allow-image-url {prefix}: a prefix ends with its path, without ? and #")
        self.segments = [segment for segment in self.url.raw_path.split("/") if segment]

    @property
    def is_local(self) -> bool:
        """Whether it names a host that is not of the internet: by an address, or a name that is only known locally."""
        host = self.url.raw_host or ""
        if (address := _as_address(host)) is not None:
            return not _is_public(address)
        return "." not in host or host.endswith(tuple(f".{suffix}" for suffix in LOCAL_SUFFIXES))

    def has(self, url: URL) -> bool:
        """Whether a URL lies below it."""
        same = (url.scheme, url.raw_host, url.port) == (self.url.scheme, self.url.raw_host, self.url.port)
        segments = [segment for segment in url.raw_path.split("/") if segment]
        return same and segments[: len(self.segments)] == self.segments


def _parse(text: str) -> URL:
    """A URL of a host. Raises ValueError, which says why, for anything that two parsers may read in two ways."""
    if not text.isascii() or any(character <= " " or character in "\\\x7f" for character in text):
        raise ValueError("a URL is of ASCII characters, without spaces and backslashes")
    url = URL(text)
    if url.scheme not in ("http", "https"):
        raise ValueError("only http and https are opened")
    if not url.raw_host or "@" in url.raw_authority:
        raise ValueError("a URL names a host, and no user")
    segments = unquote(text.partition("?")[0]).split("/")
    if {".", ".."} & set(segments) or "\\" in unquote(text):
        raise ValueError("a URL has no . and .. in its path")
    return url


def _as_address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_public(address: Address) -> bool:
    """Whether an address is of the internet, also where it is an IPv4 address in the form of IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        packed = address.packed
        translated = ipaddress.IPv4Address(packed[12:]) if packed[:12] == NAT64 else None
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1] or translated
        if inner is not None:
            return _is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast


class _CheckedResolver(AbstractResolver):
    """Gives a connection the addresses of a host, of which all must be of the internet where the host is not local."""

    def __init__(self, local_hosts: set[str]) -> None:
        self.local_hosts = local_hosts

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results: list[ResolveResult] = []
        for kind, _, protocol, _, (first, *_) in found:
            address = str(first)
            if host not in self.local_hosts and not _is_public(ipaddress.ip_address(address.partition("%")[0])):
                raise OSError(errno.EACCES, f"{host} is of a private network")
            results.append(
                {"hostname": host, "host": address, "port": port, "family": kind, "proto": protocol, "flags": 0}
            )
        return results

    async def close(self) -> None:
        pass


class ImageFetcher:
    """Fetches images from below allowed prefixes."""

    def __init__(self, prefixes: Sequence[str], *, max_bytes: int, timeout: float) -> None:
        """max_bytes: of all images of a request together. timeout: seconds for one image, redirects included. Raises
        ConfigError for what is no prefix.
        """
        self.prefixes = [AllowedPrefix(prefix) for prefix in prefixes]
        self.max_bytes, self.timeout = max_bytes, timeout
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, urls: Sequence[str]) -> list[bytes]:
        """The files at URLs, of a request. Raises ImageError, which names the URL, for one that is not allowed or whose
        file does not come.
        """
        left = self.max_bytes

        async def one(url: str) -> bytes:
            nonlocal left
            content = bytearray()
            try:
                async with asyncio.timeout(self.timeout), await self._open(url) as response:
                    async for piece in response.content.iter_chunked(1 << 16):
                        left -= len(piece)
                        if left < 0:
                            raise ValueError(f"more than {self.max_bytes:,} bytes came for the images of a request")
                        content += piece
            except TimeoutError as error:
                raise ImageError(f"{url[:200]}: it did not come within {self.timeout:g} seconds") from error
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise ImageError(f"{url[:200]}: {_reason(error)}") from error
            return bytes(content)

        tasks = [asyncio.ensure_future(one(url)) for url in urls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # the others, where one fails

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _open(self, address: str) -> Any:
        """The reply with the file. Raises ValueError for an address, or one that it is redirected to, that may not be
        asked, and for any other reply.
        """
        url = self._allowed(address)
        for _ in range(MOST_REDIRECTS + 1):
            response = await self._get(url)
            if response.status == 200 and response.headers.get("Content-Encoding", "identity") == "identity":
                return response
            response.close()
            if response.status == 200:
                raise ValueError("its content is compressed, which was not asked for")
            if response.status not in (301, 302, 303, 307, 308) or "Location" not in response.headers:
                raise ValueError(f"its server answers {response.status}")
            url = self._allowed(response.headers["Location"], url)
        raise ValueError(f"it is redirected more than {MOST_REDIRECTS} times")

    async def _get(self, url: URL) -> aiohttp.ClientResponse:
        if self._session is None:
            local = {prefix.url.raw_host or "" for prefix in self.prefixes if prefix.is_local}
            connector = aiohttp.TCPConnector(
                resolver=_CheckedResolver(local), use_dns_cache=False, limit=MOST_CONNECTIONS
            )
            self._session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False,
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "openblip"},
                timeout=aiohttp.ClientTimeout(total=self.timeout),
            )  # fmt: skip
        return await self._session.get(url, allow_redirects=False)

    def _allowed(self, address: str, base: URL | None = None) -> URL:
        """The URL, or where one is relative to another, that lies below a prefix. Raises ValueError for any other."""
        url = _parse(address if base is None else str(base.join(URL(address))))
        if not self.prefixes:
            raise ValueError("images are taken as data URIs or uploads; this server opens no URL")
        if not any(prefix.has(url) for prefix in self.prefixes):
            where = "" if base is None else f"it is redirected to {str(url)[:200]}, and "
            raise ValueError(f"{where}this server opens only URLs below the prefixes of --allow-image-url")
        return url


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
