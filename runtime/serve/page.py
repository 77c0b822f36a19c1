"""The page at ``/``: a chat in one file, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse


@functools.cache
def _parts() -> tuple[str, str]:
    """Return the page, and the policy that lets a browser run its own script and style and nothing else."""
    text = files(__package__).joinpath("page.html").read_text("utf-8")

    def allowed(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

    own = f"script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; img-src data:"
    return text, f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


async def page(request: Request) -> HTMLResponse:
    """Return the page."""
    text, policy = _parts()
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)
