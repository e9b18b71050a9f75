"""Can a server be reached? Asked once and briefly, before a library retries for a minute."""

import socket
import threading
from urllib.parse import urlsplit

WAIT = 1.5  # seconds for the name and the connection together
_PORTS = {"https": 443, "http": 80}


def unreachable(url: str, wait: float = WAIT) -> str | None:
    """Why no connection to a URL's server, or to the proxy in front of it, can be opened; None where one can.

    Args:
        wait: seconds that the resolver and the server have together; a resolver has no time limit of its own.
    """
    host, port = _first_stop(url)
    reasons: list[str | None] = []
    attempt = threading.Thread(target=lambda: reasons.append(_refusal(host, port, wait)), daemon=True)
    attempt.start()
    attempt.join(wait)
    return reasons[0] if reasons else f"{host} does not answer within {wait:g} s"


def _first_stop(url: str) -> tuple[str, int]:
    """Host and port that a request for this URL connects to first."""
    from urllib.request import getproxies, proxy_bypass  # brings TLS along, which lists of names do without

    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(parts.netloc):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 80)


def _refusal(host: str, port: int, wait: float) -> str | None:
    try:
        with socket.create_connection((host, port), timeout=wait):
            return None
    except (OSError, UnicodeError) as error:
        return f"{host}: {getattr(error, 'strerror', None) or error}"
