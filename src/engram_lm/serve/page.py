"""The page's files: read from the package, never from elsewhere, with the token filled into index.html.

files = PageFiles(PAGE)
files.index(token)                      # text of index.html
files.file("look.js")                   # (bytes, media type, tag); Refusal 404
"""

import hashlib
import html
import os
from pathlib import Path

from engram_lm.serve.http_errors import Refusal

PAGE = Path(__file__).parent / "page"
TOKEN = "{{token}}"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
LOGIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>engram-lm</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="/static/style.css"></head>
<body><main><h1>engram-lm</h1>
<p>This server wants a key. <span lang="zh">此服务需要密钥。</span></p>{told}
<form method="post" action="/login"><label for="key">Key <span lang="zh">密钥</span></label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button type="submit">Log in <span lang="zh">登录</span></button></form></main></body></html>
"""


class PageFiles:
    """The files of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def index(self, token: str) -> str:
        """index.html with the token of this start."""
        try:
            text = (self.directory / "index.html").read_text(encoding="utf8")
        except OSError:
            raise Refusal(404, "This build has no page; the endpoints are in /api/openapi.json.") from None
        return text.replace(TOKEN, html.escape(token))

    def file(self, name: str) -> tuple[bytes, str, str]:
        """Refusal 404 for what is not a file of the page: nothing else can be named."""
        path = self.directory / name
        if (
            path.suffix not in KINDS
            or name == "index.html"
            or name not in os.listdir(self.directory)
            or not path.is_file()
            or path.resolve().parent != self.directory.resolve()
        ):
            raise Refusal(404, "The page has no such file.")
        data = path.read_bytes()
        return data, KINDS[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:20]}"'


def login(told: str = "") -> str:
    """The form for the key."""
    return LOGIN.format(told=f'<p role="alert">{html.escape(told)}</p>' if told else "")
