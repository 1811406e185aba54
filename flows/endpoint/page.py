"""The page at `/`, where a person tries the model. It is one file, and contacts this server only."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi.responses import HTMLResponse

_FILE = Path(__file__).with_name("page.html")


def make_response() -> HTMLResponse:
    """Return the page. The browser runs only the script that is in the file, and contacts only this server."""
    text = _FILE.read_text(encoding="utf-8")
    script, style = (_hash_element(text, name) for name in ("script", "style"))
    policy = f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; "
    policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    return HTMLResponse(text, headers={"content-security-policy": policy, "x-content-type-options": "nosniff"})


def _hash_element(text: str, name: str) -> str:
    """Return what a content security policy calls the content of the only element of this name."""
    (content,) = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
