"""Serve an output folder over HTTP with several threads: the request has an image's bytes, the response its class.

python examples/serve.py OUTPUT [PORT]
curl --data-binary @image.raw http://127.0.0.1:PORT      # one byte per pixel and channel, in the order (c, h, w)
"""

import json
import math
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from mpcompile import Artifact, MpcompileError


def server(folder: str, port: int = 0) -> ThreadingHTTPServer:
    """Returns an HTTP server on 127.0.0.1; port 0 selects a free port. Raises MpcompileError."""
    artifact = Artifact.open(folder)
    artifact.verify()  # raises if a file was changed after compilation
    engine = artifact.load("onnx", threads=1)  # one thread per request, so that requests do not wait for each other
    source = artifact.report.model
    mean, std = (np.array(values)[:, None, None] for values in (source.mean, source.std))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if len(body) != math.prod(source.size):
                needed = "x".join(map(str, source.size))
                self.send_error(400, f"the request has {len(body)} bytes; an image has {needed} bytes")
                return
            pixels = np.frombuffer(body, np.uint8).reshape(1, *source.size)
            [logits] = engine(((pixels / 255 - mean) / std).astype(np.float32))
            best = int(logits.argmax())
            label = source.labels[best] if source.labels else str(best)
            answer = json.dumps({"class": label, "logits": logits.tolist()}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class has this name)
            """Logs nothing; by default, each request is logged to stderr."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    try:
        http_server = server(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    except MpcompileError as failure:
        raise SystemExit(str(failure)) from None
    print(f"http://127.0.0.1:{http_server.server_port}", flush=True)
    http_server.serve_forever()
