"""A folder on an address of this machine, for tables that are read from far away: ``python -m … FOLDER``.

It prints its address and serves until its input ends. It knows what reading rows needs: ranges of bytes, and nothing of
access or encryption.
"""

import os
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Files(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without this an answer of head and body waits for the client's delayed acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    server: "FileServer"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.server.find(urllib.parse.unquote(self.path))
        if path is None:
            self._send(404, {}, b"")
            return
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            asked = self.headers.get("Range", "").removeprefix("bytes=").split("-")
            if not with_body:
                self._send(200, {"Accept-Ranges": "bytes"}, b"", size)
            elif len(asked) == 2 and asked[0].isdigit():
                first = int(asked[0])
                last = min(int(asked[1]) if asked[1].isdigit() else size - 1, size - 1)
                if first > last:
                    self._send(416, {"Content-Range": f"bytes */{size}"}, b"")
                    return
                file.seek(first)
                body = file.read(last + 1 - first)
                self._send(206, {"Content-Range": f"bytes {first}-{last}/{size}"}, body)
            else:
                self._send(200, {}, file.read())

    def _send(self, status: int, headers: dict[str, str], body: bytes, size: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(body) if size is None else size)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep no log."""


class FileServer(ThreadingHTTPServer):
    """The files of one folder on a free port of this machine."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Files)
        self._files = {f"/{path.name}": path for path in folder.iterdir() if path.is_file()}

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def find(self, path: str) -> Path | None:
        """The file at a path of the address; None where there is none."""
        return self._files.get(path)


def main() -> None:
    """Serve the folder that is named until the input ends."""
    server = FileServer(Path(sys.argv[1]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
