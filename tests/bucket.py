"""A bucket of Google's on this machine: as much of its JSON interface as gcsfs and tensorstore use. `environment(port)` sends
both libraries there."""

import email.parser
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


def environment(port: int) -> dict[str, str]:
    url = f"http://127.0.0.1:{port}"
    plain = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # no question about the kind of the bucket, which wants a login
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url} | plain


class Server(ThreadingHTTPServer):
    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.files, self.generation, self.lock, self.uploads = {}, 0, threading.Lock(), {}

    def handle_error(self, *_) -> None:
        """A client that hangs up before the answer is whole has what it wanted."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece

    def answer(self, code: int, body=b"", **headers) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def meta(self, name: str) -> dict:
        data, generation = self.server.files[name]
        about = {"kind": "storage#object", "name": name, "bucket": "bucket", "size": str(len(data)), "md5Hash": ""}
        return about | {"generation": str(generation), "updated": "2026-01-01T00:00:00Z", "timeCreated": "2026-01-01T00:00:00Z"}

    def put(self, name: str, data: bytes, query) -> None:
        with self.server.lock:
            now = self.server.files.get(name, (b"", 0))[1]
            wanted = query.get("ifGenerationMatch", [None])[0]
            if wanted is not None and int(wanted) != now:
                return self.answer(412, {"error": {"code": 412, "message": "another generation"}})
            self.server.generation += 1
            self.server.files[name] = (data, self.server.generation)
        self.answer(200, self.meta(name), Content_Type="application/json")

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query, parts = parse_qs(url.query, keep_blank_values=True), url.path.strip("/").split("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if parts[0] in ("upload", "resumable"):
            return self.upload(query, body)
        where = parts[parts.index("b") + 1 :] if "b" in parts else []
        name = unquote(where[2]) if len(where) > 2 else ""
        if len(where) == 1:
            return self.answer(403, {"error": {"code": 403, "message": "this account may read and write objects, and no more"}})
        if where and where[1] == "storageLayout":
            return self.answer(200, {"bucket": "bucket", "locationType": "region", "hierarchicalNamespace": {"enabled": False}})
        if not name and self.command == "GET":
            return self.listing(query)
        if len(where) > 4 and where[3] in ("rewriteTo", "copyTo"):
            to = unquote(where[7])
            if name not in self.server.files:
                return self.answer(404, {"error": {"code": 404, "message": "no such object"}})
            with self.server.lock:
                self.server.generation += 1
                self.server.files[to] = (self.server.files[name][0], self.server.generation)
            return self.answer(200, {"done": True, "resource": self.meta(to), "objectSize": self.meta(to)["size"]})
        if name not in self.server.files:
            return self.answer(404, {"error": {"code": 404, "message": f"no such object: {name}"}})
        if self.command == "DELETE":
            with self.server.lock:
                self.server.files.pop(name, None)
            return self.answer(204)
        if self.command in ("GET", "HEAD"):
            return self.content(name) if query.get("alt") == ["media"] else self.answer(200, self.meta(name))
        self.answer(501, {"error": {"code": 501, "message": f"{self.command} {self.path}"}})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any

    def content(self, name: str) -> None:
        data, generation = self.server.files[name]
        about = {"X_Goog_Generation": generation, "Content_Type": "application/octet-stream"}
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes="):
            return self.answer(200, data, **about)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self.answer(416, b"", **about)
        self.answer(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **about)

    def listing(self, query) -> None:
        def of(key, default=""):
            return query.get(key, [default])[0]

        prefix, between, first, last = of("prefix"), of("delimiter"), of("startOffset"), of("endOffset")
        found, folders = [], set()
        with self.server.lock:
            for name in sorted(self.server.files):
                if not name.startswith(prefix) or name < first or (last and name >= last):
                    continue
                inner = name[len(prefix) :]
                if between and between in inner:
                    folders.add(prefix + inner.partition(between)[0] + between)
                else:
                    found.append(self.meta(name))
        self.answer(200, {"kind": "storage#objects", "items": found, "prefixes": sorted(folders)})

    def upload(self, query, body: bytes) -> None:
        how, name = query["uploadType"][0], unquote(query.get("name", [""])[0])
        if how == "media":
            return self.put(name, body, query)
        if how == "multipart":
            text = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body
            about, content = email.parser.BytesParser().parsebytes(text).get_payload()
            raw = body.split(b"\r\n\r\n", 2)[2] if b"\r\n\r\n" in body else body.split(b"\n\n", 2)[2]
            ending = raw.rindex(b"--" + self.headers.get_param("boundary", header="Content-Type").encode())
            raw = raw[:ending].removesuffix(b"\n").removesuffix(b"\r")
            return self.put(json.loads(about.get_payload())["name"], raw, query)
        if "upload_id" in query:
            started = self.server.uploads[query["upload_id"][0]]
            started[1].append(body)
            total = self.headers.get("Content-Range", "").rpartition("/")[2]
            if total != "*":
                return self.put(started[0], b"".join(started[1]), query)
            return self.answer(308, Range=f"bytes=0-{sum(map(len, started[1])) - 1}")
        number = str(len(self.server.uploads))
        self.server.uploads[number] = (name or json.loads(body)["name"], [])
        host = self.headers["Host"]
        self.answer(200, Location=f"http://{host}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={number}")

    def log_message(self, *_) -> None:
        pass
