"""A TEST DOUBLE of Grafana's HTTP API (versions 10 to 12), as far as Peregrine calls it.

It refuses what Grafana refuses, with its status codes and bodies: a wrong token, a body that is no JSON, a
uid or name in use, a stale version, a data source addressed by number. Any other call is a 404 and stays
in `unknown`.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "glsa_test"
_UID = re.compile(r"[a-zA-Z0-9_-]{1,40}")


class Refused(Exception):
    def __init__(self, code: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status, self.body = code, {"message": message, **more}


class GrafanaDouble:
    def __init__(self, prefix: str = "", *, may_administrate: bool = True) -> None:
        self.prefix, self.may_administrate = prefix, may_administrate
        self.folders: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.unknown: list[str] = []

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append(f"{method} {path}")
        for pattern, allowed, handler in (
            (r"/api/folders", "POST", self._create_folder),
            (r"/api/folders/([^/]+)", "GET", self._get_folder),
            (r"/api/folders/([^/]+)", "PUT", self._rename_folder),
            (r"/api/datasources", "POST", self._create_source),
            (r"/api/datasources/uid/([^/]+)", "GET", self._get_source),
            (r"/api/datasources/uid/([^/]+)", "PUT", self._change_source),
            (r"/api/dashboards/uid/([^/]+)", "GET", self._get_dashboard),
            (r"/api/dashboards/db", "POST", self._save_dashboard),
        ):
            match = re.fullmatch(self.prefix + pattern, path)
            if match and allowed == method:
                arguments = [*match.groups(), *([body] if method in ("POST", "PUT") else [])]
                try:
                    return 200, handler(*arguments)
                except Refused as refused:
                    return refused.status, refused.body
        self.unknown.append(f"{method} {path}")
        return 404, {"message": "Not found"}

    def _get_folder(self, uid: str) -> Any:
        if uid not in self.folders:
            raise Refused(404, "folder not found", status="not-found")
        return self.folders[uid]

    def _create_folder(self, body: Any) -> Any:
        self._check_keys(body, {"title"}, {"uid", "parentUid", "description"})
        uid = body.get("uid", f"generated{len(self.folders)}")
        if not _UID.fullmatch(uid):
            raise Refused(400, "uid contains illegal characters")
        if uid in self.folders:
            raise Refused(412, "a folder with the same uid already exists", status="version-mismatch")
        if any(f["title"] == body["title"] for f in self.folders.values()):
            raise Refused(409, "a folder with the same name already exists", status="name-exists")
        self.folders[uid] = {"id": len(self.folders) + 1, "uid": uid, "title": body["title"], "version": 1}
        return self.folders[uid]

    def _rename_folder(self, uid: str, body: Any) -> Any:
        folder = self._get_folder(uid)
        if not body.get("overwrite") and body.get("version") != folder["version"]:
            raise Refused(412, "the folder has been changed by someone else", status="version-mismatch")
        folder.update(title=body["title"], version=folder["version"] + 1)
        return folder

    def _get_source(self, uid: str) -> Any:
        if uid not in self.sources:
            raise Refused(404, "Data source not found", messageId="", traceID="")
        return self.sources[uid]

    def _create_source(self, body: Any) -> Any:
        self._need_administrator()
        self._check_keys(
            body, {"name", "type", "access"}, {"url", "uid", "jsonData", "isDefault", "basicAuth"}
        )
        if any(s["name"] == body["name"] or s["uid"] == body.get("uid") for s in self.sources.values()):
            raise Refused(409, "data source with the same name already exists")
        source = {
            "id": len(self.sources) + 1,
            "orgId": 1,
            "jsonData": {},
            "readOnly": False,
            "version": 1,
            **body,
        }
        self.sources[source["uid"]] = source
        return {"datasource": source, "id": source["id"], "message": "Datasource added", "name": body["name"]}

    def _change_source(self, uid: str, body: Any) -> Any:
        self._need_administrator()
        source = self._get_source(uid)
        if "version" in body and body["version"] != source["version"]:
            raise Refused(409, "datasource has already been updated by someone else")
        source.update(body, version=source["version"] + 1)
        return {
            "datasource": source,
            "id": source["id"],
            "message": "Datasource updated",
            "name": source["name"],
        }

    def _get_dashboard(self, uid: str) -> Any:
        if uid not in self.dashboards:
            raise Refused(404, "Dashboard not found")
        return self.dashboards[uid]

    def _save_dashboard(self, body: Any) -> Any:
        self._check_keys(body, {"dashboard"}, {"folderUid", "folderId", "overwrite", "message"})
        dashboard, folder = body["dashboard"], body.get("folderUid", "")
        if not dashboard.get("title"):
            raise Refused(400, "Dashboard title cannot be empty", status="empty-name")
        uid = dashboard.get("uid", "")
        if not _UID.fullmatch(uid):
            raise Refused(400, "uid contains illegal characters")
        if folder and folder not in self.folders:
            raise Refused(400, "folder not found", status="not-found")
        known = self.dashboards.get(uid)
        if dashboard.get("id") is not None and known is None:
            raise Refused(404, "Dashboard not found", status="not-found")
        if known and not body.get("overwrite") and dashboard.get("version") != known["dashboard"]["version"]:
            raise Refused(412, "The dashboard has been changed by someone else", status="version-mismatch")
        version = known["dashboard"]["version"] + 1 if known else 1
        number = known["dashboard"]["id"] if known else len(self.dashboards) + 1
        self.dashboards[uid] = {
            "meta": {"type": "db", "folderUid": folder, "version": version},
            "dashboard": {**dashboard, "id": number, "version": version},
        }
        return {"id": number, "uid": uid, "status": "success", "version": version, "url": f"/d/{uid}"}

    def _need_administrator(self) -> None:
        if not self.may_administrate:
            message = "You'll need additional permissions to perform this action."
            raise Refused(403, message, title="Access denied", accessErrorId="ACE1")

    @staticmethod
    def _check_keys(body: Any, required: set[str], optional: set[str]) -> None:
        if not isinstance(body, dict) or not required <= body.keys() <= required | optional:
            raise Refused(400, "bad request data")


@contextmanager
def serving(double: GrafanaDouble) -> Iterator[str]:
    """The double on loopback; its address."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            status, body = self._answer(raw)
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def _answer(self, raw: bytes) -> tuple[int, Any]:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return 401, {"message": "Invalid API key", "messageId": "api-key.invalid"}
            body = None
            if self.command in ("POST", "PUT"):
                if self.headers.get("Content-Type") != "application/json":
                    return 415, {"message": "unsupported media type"}
                try:
                    body = json.loads(raw)
                except ValueError:
                    return 400, {"message": "bad request data"}
            return double.answer(self.command, self.path, body)

        do_GET = do_POST = do_PUT = do_DELETE = _handle

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}{double.prefix}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
