"""One HTTP request to a chat endpoint, and what its failure means: try again, mend it, or the judge declined."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any

from pnlac_fast.errors import UserError

TRY_AGAIN = (408, 409, 425, 429)  # and all of 500 and above
SHOWN = 300  # characters of an error that a server sends


class Busy(Exception):
    """The server may do better in a moment; ``after`` is how many seconds it asked to wait, if it did."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: urllib would send the key on to wherever they point."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def post(url: str, body: dict[str, Any], key: str | None, timeout: float) -> tuple[dict[str, Any], str | None]:
    """Send a chat request.

    Returns
    -------
    reply
        ``reply``, the text ("" where the server's filter withheld it), and ``served_by``, the model's name there.
    refused
        None, or what the server had against the request (HTTP 400).

    Raises
    ------
    Busy
        HTTP 408, 409, 425, 429 or 5xx, no connection, a timeout, or a body that is not a chat completion.
    UserError
        The server refuses the key, the address or the model.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with _opener.open(request, timeout=timeout) as response:
            found = json.loads(response.read())
        message = found["choices"][0]["message"]
        text = message.get("content") or message.get("refusal") or ""
        return {"reply": str(text), "served_by": str(found.get("model", ""))}, None
    except urllib.error.HTTPError as error:
        if error.code in TRY_AGAIN or error.code >= 500:
            error.close()
            raise Busy(f"HTTP {error.code}", _seconds(error.headers)) from error
        said = _said(error, key)
        if error.code == 400:
            if "content_filter" in said:
                return {"reply": "", "served_by": ""}, None
            return {}, said
        hint = "its key" if error.code in (401, 403) else "--judge-url and the model's name"
        raise UserError(f"The judge at {url} answered HTTP {error.code} ({said}): check {hint}.") from error
    except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and broken connections
        raise Busy(str(getattr(error, "reason", None) or error) or type(error).__name__) from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Busy("its reply is not a chat completion") from error


def _said(error: urllib.error.HTTPError, key: str | None) -> str:
    """The beginning of what the server has to say of an error, without the key, which some servers repeat."""
    try:
        with error:
            text = " ".join(error.read(4000).decode(errors="replace").split())
    except (OSError, http.client.HTTPException) as broken:
        raise Busy(f"HTTP {error.code}, and no more") from broken
    return (text.replace(key, "[key]") if key else text)[:SHOWN]


def _seconds(headers: Message) -> float | None:
    """Seconds that ``Retry-After`` asks for, given as a number or as a date."""
    value = (headers.get("Retry-After") or "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # neither: as if it had not been sent
        return None
