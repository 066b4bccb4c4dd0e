"""A server on this machine that answers like the Hugging Face hub, as far as uploads and downloads of a run go."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_a_token_of_the_tests"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """Repositories in memory; the first `failures` requests get an error, every answer takes `delay` seconds."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}  # "repo/path" -> content
        self.private: dict[str, bool] = {}  # repo -> whether only its owner sees it
        self.failures = 0
        self.status = 503
        self.delay = 0.0
        self.requests: list[str] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Nothing: tests read the screen."""

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                path = unquote(urlparse(self.path).path)
                stand_in.requests.append(f"{self.command} {path}")
                time.sleep(stand_in.delay)
                status, headers, content = stand_in.answer(
                    self.command, path, body, self.headers.get("Authorization", "")
                )
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        self.wfile.write(content)

            do_GET = do_HEAD = do_POST = _answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[HubStandIn]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def answer(self, method: str, path: str, body: bytes, authorization: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, content) of the answer to one request."""
        if not path.startswith(("/api/repos", "/api/models", "/api/datasets")) and path.startswith("/api"):
            return 404, {}, b"{}"  # what the library asks beside
        if self.failures:
            self.failures -= 1
            return self.status, {}, b"{}"
        if authorization != f"Bearer {TOKEN}":
            return 401, {}, b'{"error": "Invalid username or password."}'
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/api/"):
            _, _, _, owner, name, action, *_ = path.split("/")
            return self._of_repository(f"{owner}/{name}", action, body)
        owner, name, _, _, file = path.strip("/").split("/", 4)
        content = self.files.get(f"{owner}/{name}/{file}")
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, content

    def _create(self, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        repo = f"{request.get('organization') or 'me'}/{request['name']}"
        if repo in self.private:
            return 409, {}, json.dumps({"url": f"{self.endpoint}/{repo}", "error": "exists"}).encode()
        self.private[repo] = request.get("visibility") == "private" or bool(request.get("private"))
        return _json({"url": f"{self.endpoint}/{repo}", "name": repo, "id": repo})

    def _of_repository(self, repo: str, action: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if repo not in self.private:
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        if action == "preupload":
            files = json.loads(body)["files"]
            return _json(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        if action == "commit":
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    self.files[f"{repo}/{item['value']['path']}"] = content
            url = f"{self.endpoint}/{repo}/commit/{COMMIT}"
            return _json({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        names = [name.removeprefix(f"{repo}/") for name in self.files if name.startswith(f"{repo}/")]
        if action == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(self.files[f"{repo}/{name}"]), "oid": COMMIT}
                for name in names
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        siblings = [{"rfilename": name} for name in names]
        return _json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": self.private[repo]})


def _json(content: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
