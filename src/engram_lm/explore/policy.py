"""What the page may ask for: nothing that another machine would have to be asked."""

from typing import Any

_RULES = (
    "default-src 'self'",
    # Gradio writes its configuration into the page as a script, and makes a function of this page's own.
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "font-src 'self' data:",
    "object-src 'none'",
    "base-uri 'self'",
    "form-action 'self'",
)
_HEADERS = {
    "Content-Security-Policy": "; ".join(_RULES),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class ContentPolicy:
    """Lets every answer of an ASGI application forbid the browser to ask another machine for anything.

    Source: W3C, Content Security Policy Level 3. Frames are not spoken of, because a Space is shown in one.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, with the headers of the policy."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)
