"""A web server for the tests, run in a process of its own: `python file_server.py FOLDER`.

It serves the folder with ranges, unless --whole is given. --rate limits it to so many bytes a second. With --breaks and
--every, every so many-th answer breaks off after so many bytes. With --hub HASH it acts as a model hub whose only
repository is the folder and whose large files have that hash.

It prints its port, then a line for each answer: path and first byte.
"""

import argparse
import itertools
import json
import re
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 1 << 16


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if given.hub and self.path.startswith("/api/"):
            self.tell(self.tree() if "/tree/" in self.path else {"id": "org/repo", "sha": "0" * 40})
            return
        self.path = re.sub("^/org/repo/resolve/main/", "/", self.path)
        path = Path(self.translate_path(self.path))
        if path.is_dir() or not path.exists():
            super().do_GET()
            return
        size, first = path.stat().st_size, 0
        last = size - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and not given.whole:
            first, last = int(asked[1]), min(int(asked[2]), size - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        print(self.path, first, flush=True)
        breaks = given.breaks if next(answers) % given.every == 0 else 0
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        sent, to_send = 0, last + 1 - first
        with path.open("rb") as file:
            file.seek(first)
            while sent < to_send:
                if breaks and sent >= breaks:
                    self.close_connection = True
                    return
                piece = file.read(min(PIECE, to_send - sent))
                self.wfile.write(piece)
                sent += len(piece)
                time.sleep(len(piece) / given.rate if given.rate else 0)

    def tree(self) -> list[dict[str, Any]]:
        files = sorted(path for path in Path(given.folder).iterdir() if path.is_file())
        return [
            {"type": "file", "path": path.name, "size": size, "oid": "0" * 40}
            | ({"lfs": {"oid": given.hub, "size": size, "pointerSize": 130}} if size > PIECE else {})
            for path in files
            for size in (path.stat().st_size,)
        ]

    def tell(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: standard error belongs to the test."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--rate", type=float, default=0)
    parser.add_argument("--breaks", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--hub", default="")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    answers = itertools.count()
    with ThreadingHTTPServer(("127.0.0.1", given.port), lambda *a: Handler(*a, directory=given.folder)) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
