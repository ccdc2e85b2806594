"""A double of the Hub on the loopback interface: what huggingface_hub and transformers ask of it, and no more."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


class HubDouble:
    """Context manager. `repos[repo_id]` has the `files` (path -> bytes), `private` and the number of `commits`."""

    def __init__(self, token: str):
        self.token, self.repos, self.blobs = token, {}, {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubDouble

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status: int = 200, **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.headers.get("Content-Length") and self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            return self.answer({"errors": [], "warnings": []} if yaml.safe_load(front) else {"errors": ["empty"]})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        user, name, action, *_ = path.removeprefix("/api/models/").split("/")
        if action == "preupload":
            files = [
                {"path": item["path"], "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular"}
                for item in json.loads(body)["files"]
            ]
            return self.answer({"files": [{**item, "shouldIgnore": False} for item in files]})
        if action == "commit":
            return self.commit(f"{user}/{name}", [json.loads(line) for line in body.splitlines()])
        self.refuse(404, "RepoNotFound")

    def create(self, body: dict) -> None:
        repo_id = f"{body.get('organization') or 'me'}/{body['name']}"
        new = repo_id not in self.hub.repos
        private = body.get("visibility") == "private"
        self.hub.repos.setdefault(repo_id, {"files": {}, "private": private, "commits": 0})
        self.answer({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, 200 if new else 409)

    def commit(self, repo_id: str, lines: list[dict]) -> None:
        repo = self.hub.repos[repo_id]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo["files"][value["path"]]
        repo["commits"] += 1
        url = f"{self.hub.url}/{repo_id}/commit/{repo['commits']:040d}"
        self.answer({"success": True, "commitOid": f"{repo['commits']:040d}", "commitUrl": url, "hookOutput": ""})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.blobs[_oid(content)] = content
        self.answer()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        user, name, *rest = path.removeprefix("/api/models/").strip("/").split("/")
        repo = self.hub.repos.get(f"{user}/{name}")
        if repo is None:
            return self.refuse(404, "RepoNotFound")
        commit = f"{repo['commits']:040d}"
        if not path.startswith("/api/"):
            content = repo["files"].get("/".join(rest[2:]))
            if content is None:
                return self.refuse(404, "EntryNotFound")
            return self.answer(content, ETag=f'"{_oid(content)}"', X_Repo_Commit=commit)
        files = [
            {"type": "file", "path": file, "rfilename": file, "size": len(content), "oid": _oid(content)}
            for file, content in repo["files"].items()
        ]
        if rest[:1] == ["tree"]:
            return self.answer(files) if len(rest) == 2 else self.refuse(404, "EntryNotFound")
        info = {"id": f"{user}/{name}", "sha": commit, "private": repo["private"], "siblings": files, "tags": []}
        self.answer(info)

    do_HEAD = do_GET
