"""Metrics of the services, which `scalellm top` reads by HTTP."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import repeat
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from scalellm.services.common.metric_window import Labels, Scrape, samples_of

_TIMEOUT = 1.5
_CHARSET = "utf-8"
_MAX_BYTES = 4 * 2**20


def scrape(addresses: Sequence[str], tls: ssl.SSLContext | None = None) -> list[Scrape]:
    """Ask all endpoints (host:port) at once, over TLS if that is given."""
    with ThreadPoolExecutor(max_workers=len(addresses)) as pool:
        return list(pool.map(_scrape, addresses, repeat(tls)))


def _scrape(address: str, tls: ssl.SSLContext | None) -> Scrape:
    # Services are asked as they stand: a web proxy does not reach them.
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=tls))
    scheme = "http" if tls is None else "https"
    at = time.monotonic()
    try:
        with opener.open(f"{scheme}://{address}/metrics", timeout=_TIMEOUT) as answer:
            body = answer.read(_MAX_BYTES + 1)
        if len(body) > _MAX_BYTES:
            return Scrape(address, at)
        return Scrape(address, at, read_samples(body.decode(_CHARSET)))
    except (OSError, HTTPException, ValueError):
        return Scrape(address, at)


def read_samples(exposition: str) -> dict[str, dict[Labels, float]]:
    """The samples by name and labels; an empty family is there, too. Raises ValueError for what is no exposition."""
    from prometheus_client.parser import text_string_to_metric_families  # only here: importing it takes a while

    try:
        return samples_of(text_string_to_metric_families(exposition))
    except Exception as error:  # whatever the parser stumbles over
        raise ValueError("not a metrics exposition") from error
