"""Files that others have published."""

import http.client
import urllib.request

from carn.errors import StorageError

TIMEOUT_S = 60


def fetch(url: str) -> bytes:
    """The whole content of what is published at an address.

    Args:
        url: http:// or https://. Proxies are those of the environment.

    Raises:
        StorageError: nobody answers, the address is wrong, or the answer breaks off.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = f"could not be fetched ({error}); run this again, or put the file there yourself"
        raise StorageError(url, reason) from error
    return content
