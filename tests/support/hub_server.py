"""A Hugging Face Hub of one folder on the loopback interface: `<root>/<owner>/<name>` holds the files of a model."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class _Handler(BaseHTTPRequestHandler):
    root: Path
    requests: list[str]

    def log_message(self, *arguments: object) -> None: ...

    def _answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, code: int = 200, **headers: str) -> None:
        self._answer(code, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _missing(self, reason: str) -> None:
        self._json({"error": reason}, 404, X_Error_Code=reason)

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlparse(self.path).path.split("/") if part]
        self.requests.append(f"{self.command} {self.path}")
        if parts[:2] == ["api", "models"]:
            folder = self.root / parts[2] / parts[3]
            revision = parts[5] if len(parts) > 5 else "main"
            if not folder.is_dir():
                return self._missing("RepoNotFound")
            if revision not in REVISIONS:
                return self._missing("RevisionNotFound")
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            names = [str(file.relative_to(folder)) for file in files]
            if len(parts) > 4 and parts[4] == "tree":
                return self._json(
                    [
                        {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                        for name, file in zip(names, files, strict=True)
                    ]
                )
            siblings = [{"rfilename": name} for name in names]
            return self._json({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings, "private": False})
        file = self.root.joinpath(*parts[:2], *parts[4:])
        if len(parts) < 5 or not file.is_file():
            return self._missing("EntryNotFound")
        body = file.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:40]}"'
        return self._answer(200, body, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append(f"POST {self.path}")
        parts = [part for part in urlparse(self.path).path.split("/") if part]
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self._json({"error": "Invalid credentials"}, 401)
        if parts == ["api", "repos", "create"]:
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return self._json({"url": f"http://{self.headers['Host']}/{name}"})
        if "preupload" in parts:
            files = [file | {"uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._json({"files": files})
        if "commit" in parts:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    file = self.root.joinpath(*parts[2:4], row["value"]["path"])
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(row["value"]["content"]))
            return self._json(
                {
                    "commitUrl": f"http://{self.headers['Host']}/{parts[2]}/{parts[3]}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                }
            )
        return self._json({})


@contextmanager
def hub_server(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves `root`; yields the address and the list of requests so far."""
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
