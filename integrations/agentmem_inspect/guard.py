"""Who may see the page, and who may change something through it.

The page shows everything that a database holds, so it is for the person who started the command. Others on this machine
can reach a port of the loopback interface, and every web page in that person's browser can send requests to it:

- A request needs a cookie, which only the address that the command printed gives out. The cookie's value is another
  secret than the token in that address, so the browser's history alone opens nothing once the command has ended.
- The header Host must name this server: a page whose name was made to resolve to 127.0.0.1 (DNS rebinding) sends its
  own.
- A change must come from a form of this page: with its hidden value, and not from another origin.
- The content security policy lets the browser load and run nothing but files of this package, so that text of messages
  stays text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hmac import compare_digest
from secrets import token_urlsafe
from urllib.parse import parse_qsl

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_MOST_FORM_BYTES = 256 * 1024
_SAFE = ("GET", "HEAD")

# Not a redirect: one that follows a link from another site would be sent without a cookie that is `SameSite=Strict`.
_WELCOME = '<!doctype html><html lang="en"><meta charset="utf-8"><title>agentmem</title>'
_WELCOME += '<link rel="icon" href="/static/icon.svg"><meta http-equiv="refresh" content="0; url=/">'
_WELCOME += '<a href="/">Go on</a></html>'


class Guard:
    """Lets a request through to `app` if it may pass, and adds headers to every response.

    Args:
        app: the application.
        token: the secret in the address.
        hosts: what the header Host may be, each with its port.
    """

    def __init__(self, app: ASGIApp, *, token: str, hosts: Collection[str]) -> None:
        self._app = app
        self._token = token
        self._hosts = frozenset(hosts)
        self._secret = token_urlsafe(32)
        # Cookies do not know ports: two of these pages must not overwrite each other's.
        self._cookie = "agentmem_inspect_" + min(self._hosts).rpartition(":")[2]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI calls it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here talks over a websocket
            await send({"type": "websocket.close"})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self._refusal(Request(scope)) or self._app
        await app(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """What to answer instead; None if the request may pass."""
        host = request.headers.get("host", "")
        if host not in self._hosts:
            return PlainTextResponse(f"expected the host {min(self._hosts)}, found another", 421)
        if request.method not in _SAFE and request.headers.get("origin", f"http://{host}") != f"http://{host}":
            return PlainTextResponse("expected a form of this page, found one of another origin", 403)
        if _equal(request.cookies.get(self._cookie), self._secret):
            return None
        if request.method == "GET" and _equal(request.query_params.get("token"), self._token):
            welcome = HTMLResponse(_WELCOME)
            welcome.set_cookie(self._cookie, self._secret, httponly=True, samesite="strict", path="/")
            return welcome
        return PlainTextResponse("Open the address that `agentmem inspect` printed; it holds a token.", 403)


def _equal(found: str | None, secret: str) -> bool:
    """Whether a value is the secret, in a time that says nothing about where they differ."""
    return found is not None and compare_digest(found.encode(), secret.encode())


class Forms:
    """Reads the forms of this page.

    Attributes:
        secret: the value of the hidden field `csrf`.
    """

    def __init__(self) -> None:
        self.secret = token_urlsafe(32)

    async def read(self, request: Request) -> Mapping[str, str]:
        """The fields of a form.

        Raises:
            HTTPException: it is too large, or it is not a form of this page.
        """
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_FORM_BYTES:
                raise HTTPException(413, f"expected a form of at most {_MOST_FORM_BYTES} bytes, found a larger one")
        fields = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
        if not _equal(fields.pop("csrf", None), self.secret):
            raise HTTPException(403, "expected a form of this page; load the page anew and send it again")
        return fields
