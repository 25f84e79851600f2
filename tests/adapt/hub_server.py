"""As much of the Hugging Face Hub as its own client asks for: repositories, branches, commits, trees and files."""

import base64
import hashlib
import json
import re
import urllib.parse
from http.server import BaseHTTPRequestHandler

import yaml

TOKEN = "hf_writer"


class Hub(BaseHTTPRequestHandler):
    """``server.repositories`` is name → branch → list of commits, each file name → bytes; ``server.requests`` a log;
    ``server.claimed_sizes`` file name → what is said of its size."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self):
        self.serve()

    def do_GET(self):
        self.serve()

    def do_POST(self):
        self.serve()

    def serve(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        self.server.requests.append(f"{self.command} {path}")
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        for pattern, answer in (
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>.+)", self.branch),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>.+)", self.tree),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", self.about),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", self.preupload),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", self.commit),
            (r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", self.resolve),
        ):
            if found := re.fullmatch(pattern, path):
                if found["repo"] not in self.server.repositories:
                    return self.refuse(404, "RepoNotFound", "Repository not found")
                return answer(body=body, **found.groupdict())
        return self.refuse(404, "", f"this hub has no {path}")

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def create(self, asked):
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.server.repositories:
            return self.send(409, {"error": "You already created this repo", "url": f"{self.server.address}/{repo}"})
        self.server.repositories[repo] = {"main": [{}]}
        self.server.created.append(asked)
        return self.send(200, {"url": f"{self.server.address}/{repo}", "name": repo, "id": repo})

    def validate(self, text):
        header = yaml.safe_load(text.split("---")[1])
        wrong = [] if isinstance(header, dict) else [{"message": "no header"}]
        return self.send(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def branch(self, repo, revision, body):
        branches = self.server.repositories[repo]
        if revision in branches:
            return self.send(409, {"error": "Reference already exists"})
        branches[revision] = list(branches["main"])
        return self.send(200, {})

    def files(self, repo, revision):
        """Name and files of a commit, or None where there is no such revision."""
        for branch, commits in self.server.repositories[repo].items():
            for commit in [commits[-1]] if branch == revision else commits:
                number = hashlib.sha1(json.dumps({k: v.hex() for k, v in commit.items()}).encode()).hexdigest()
                if revision in (branch, number):
                    return number, commit
        return None

    def tree(self, repo, revision, body):
        if (found := self.files(repo, revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        blobs = [
            {"type": "file", "path": name, "size": len(data), "oid": _tag(data)} for name, data in found[1].items()
        ]
        return self.send(200, blobs)

    def about(self, repo, revision, body):
        if repo in self.server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if (found := self.files(repo, revision or "main")) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return self.send(200, {"id": repo, "sha": found[0], "siblings": [{"rfilename": name} for name in found[1]]})

    def preupload(self, repo, revision, body):
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
        ]
        return self.send(200, {"files": files})

    def commit(self, repo, revision, body):
        commits = self.server.repositories[repo][revision]
        files = dict(commits[-1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commits.append(files)
        number = self.files(repo, revision)[0]
        url = f"{self.server.address}/{repo}/commit/{number}"
        return self.send(200, {"success": True, "commitOid": number, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo, revision, name, body):
        if repo in self.server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if (found := self.files(repo, revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        number, files = found
        if name not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": number})
        data = files[name]
        size = self.server.claimed_sizes.get(name, len(data))
        return self.answer(200, {"X-Repo-Commit": number, "ETag": f'"{_tag(data)}"'}, data, size)

    def refuse(self, status, code, message, headers=None):
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}, b"{}")

    def send(self, status, values):
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(values).encode())

    def answer(self, status, headers, body, size=None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body) if size is None else size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _tag(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
