"""A stand-in for Hugging Face's hub on loopback: the requests that huggingface_hub makes for the files of a model."""

import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Server(ThreadingHTTPServer):
    """A server that says nothing of connections which clients close."""

    def handle_error(self, request, client_address):
        """Print a traceback unless the client has closed the connection.

        In Python 3.11, a traceback uses ast.parse, which fails if another thread, such as a test's, uses it, too.
        """
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """A hub with models, {name: {file: content}}: .url, and .requests, a list of (method, path, token)."""

    def __init__(self, models, token=None, gated=(), fault=None):
        self.models, self.token, self.gated, self.fault = models, token, gated, fault
        self.requests = []

    def answer(self, handler):
        """Answer a GET or a HEAD."""
        path, token = handler.path.partition("?")[0], handler.headers.get("Authorization")
        self.requests.append((handler.command, path, token))
        if self.fault == "never answers":
            time.sleep(30)
        if self.fault == "is busy":
            return self.send(handler, 503)
        match = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?|/(.+)/resolve/([^/]+)/(.+)", path)
        name = match and (match[1] or match[3])
        if name not in self.models or (self.token and token != f"Bearer {self.token}"):
            return self.send(handler, 401, error="RepoNotFound")
        files, revision = self.models[name], match[2] or match[4] or "main"
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.send(handler, 404, error="RevisionNotFound")
        if match[1]:
            siblings = [{"rfilename": file} for file in files]
            return self.send(handler, 200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        if name in self.gated:
            return self.send(handler, 403, error="GatedRepo")
        if match[5] not in files:
            return self.send(handler, 404, error="EntryNotFound", commit=commit)
        return self.send(handler, 200, files[match[5]], commit=commit)

    def send(self, handler, status, body=b"", error="", commit=""):
        """Send a response."""
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        headers = {"X-Error-Code": error, "X-Repo-Commit": commit, "ETag": etag, "Content-Length": str(len(body))}
        handler.send_response(status)
        for name, value in headers.items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)


@contextlib.contextmanager
def serving(models, **options):
    """Serve a `Hub` while the block runs."""
    hub = Hub(models, **options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 - http.server's name
            hub.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()
