"""A data set repository on 127.0.0.1 that speaks as much of the hub's API as streaming a data set takes."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(
    repo: str, files: dict[str, bytes], fail: Callable[[str], int | None] = lambda request: None
) -> Iterator[tuple[str, list[str]]]:
    """Serves ``files`` (path in the repository to content) and yields the endpoint and the log of requests.

    ``fail`` gets each request as the log has it; a number it returns is the HTTP status of a failure.

    The log holds one ``"<method> <path>"`` each; with a range, ``"<method> <path> bytes=<first>-<last>"``.
    """
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            log.append(" ".join(filter(None, [self.command, path, self.headers.get("Range")])))
            if status := fail(log[-1]):
                self.send(status, b"", {})
                return
            api = f"/api/datasets/{re.escape(repo)}"
            if re.fullmatch(rf"{api}(/revision/[^/]+)?", path):
                self.send_json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
            elif match := re.fullmatch(rf"{api}/tree/[^/]+/?(.*)", path):
                self.send_json([entry(name) for name in children(match[1])])
            elif (match := re.fullmatch(rf"/datasets/{re.escape(repo)}/resolve/[^/]+/(.+)", path)) and match[
                1
            ] in files:
                self.send_file(files[match[1]])
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound" if repo in path else "RepoNotFound"})

        do_HEAD = do_GET

        def send_file(self, content: bytes):
            first, last = 0, len(content) - 1
            if wanted := self.headers.get("Range"):
                first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            part = content[first : last + 1]
            headers = {"X-Repo-Commit": COMMIT, "ETag": '"0"', "Accept-Ranges": "bytes"}
            if wanted:
                headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            self.send(206 if wanted else 200, part, headers)

        def send_json(self, content):
            self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, body: bytes, headers: dict[str, str]):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    def children(folder: str) -> list[str]:
        prefix = f"{folder}/" if folder else ""
        below = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
        return sorted({prefix + name.split("/")[0] for name in below})

    def entry(name: str) -> dict:
        if name in files:
            return {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}
        return {"type": "directory", "path": name, "oid": "0" * 40}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
