"""A hub on loopback that answers huggingface_hub: one repository, with a token, a gate and downloads that break off if asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@dataclass
class Hub:
    """``repositories``: files by name. ``requests``: what was asked for. ``token``: what a client has to show."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    break_off_after: int | None = None
    url: str = ""

    def add(self, repository: str, folder: Path) -> None:
        """Publish the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[repository] = files

    def response(self, target: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        """Code, headers and content for a path and its query."""
        parts = target.partition("?")[0].strip("/").split("/")
        asks = parts[0] == "api"
        repository = "/".join(parts[2:4] if asks else parts[:2])
        revision = (parts[5:6] if asks else parts[3:4]) or ["main"]
        files = self.repositories.get(repository)
        if files is None or (self.token is not None and authorization != f"Bearer {self.token}"):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if revision[0] not in ("main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if asks:
            siblings = [{"rfilename": name} for name in files]
            return 200, {}, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
        content = files.get("/".join(parts[4:]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            code, headers, content = hub.response(self.path, self.headers.get("Authorization"))
            if code == 200:
                self.send(headers, content, body)
                return
            self.send_response(code)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def send(self, headers: dict[str, str], content: bytes, body: bool) -> None:
            asked = self.headers.get("Range")
            first = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            for name, value in {**headers, "Content-Length": str(len(content) - first)}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                stop = hub.break_off_after if "ETag" in headers else None
                self.wfile.write(content[first:][:stop])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
