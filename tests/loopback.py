"""A web server on the loopback address, for tests of downloads: no test goes further than 127.0.0.1."""
import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Site:
    "What the server answers: path -> bytes. `requests` lists the paths that were asked for."
    def __init__(self, url):
        self.url, self.files, self.requests, self.cut, self.chunked = url, {}, [], 0, False

    def __truediv__(self, path):
        return f"{self.url}/{path}"


@contextlib.contextmanager
def serve():
    "A `Site` on a free port. `site.cut` bytes are promised and not sent; `site.chunked` breaks off a chunked answer."
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            site.requests.append(self.path)
            body = site.files.get(self.path.split("?")[0])
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.close_connection = True
            if site.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % len(body) + body[:len(body) // 2])
            else:
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:len(body) - site.cut])

        def log_message(self, *args):
            "Nothing on stderr: a test looks there for the progress bar."

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def not_http():
    "The URL of a server that answers every request in another language."
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1000)
                        connection.sendall(b"220 mail ready\r\n")
        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def nobody():
    "A URL on which nobody listens."
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def use_cache(monkeypatch, folder):
    "Let PyTorch download into `folder`; the folder of the files is returned."
    monkeypatch.setenv("TORCH_HOME", str(folder))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # what torch.hub.set_dir sets: it would win over TORCH_HOME
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder / "hub" / "checkpoints"
