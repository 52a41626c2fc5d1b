"""Grafana's HTTP API, as far as dashboards need it: the only module that knows a client library.

grafana-api is from 2020. Its methods for folders and dashboards still fit; data sources are addressed by
uid through its plain verbs, because Grafana has given up the numeric ids that its own methods use. To take
grafana-client (its maintained continuation) instead, change this file: the classes have the same methods
under another import name.
"""

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from grafana_api.grafana_api import GrafanaClientError, GrafanaException
from grafana_api.grafana_face import GrafanaFace

T = TypeVar("T")
Json = dict[str, Any]

_TIMEOUT_S = 30.0
_NOT_FOUND = 404


class GrafanaError(Exception):
    """One line that says what Grafana refused, or that it is not there."""


class Grafana:
    """One Grafana, one token. Every method may be repeated: what is as it should be is left alone."""

    def __init__(self, url: str, token: str) -> None:
        """Raises GrafanaError for a URL without http(s) and host."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GrafanaError(f"{url!r} is no address such as https://grafana.example")
        path = parts.path.strip("/")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._face = GrafanaFace(
            token,
            host=host,
            port=parts.port,
            url_path_prefix=f"{path}/" if path else "",
            protocol=parts.scheme,
            timeout=_TIMEOUT_S,
        )

    def ensure_folder(self, uid: str, title: str) -> bool:
        """Create the folder, or give it its title. Returns whether anything changed."""
        folder = self._find(lambda: self._face.folder.get_folder(uid))
        if folder is None:
            self._do(f"create folder {title!r}", lambda: self._face.folder.create_folder(title, uid))
        elif folder["title"] != title:
            what = f"rename folder {folder['title']!r}"
            self._do(what, lambda: self._face.folder.update_folder(uid, title, folder["version"]))
        else:
            return False
        return True

    def ensure_prometheus(self, uid: str, name: str, url: str) -> bool:
        """Create the data source, or point it to `url`. Returns whether anything changed."""
        wanted = {"name": name, "type": "prometheus", "url": url, "access": "proxy", "uid": uid}
        source = self._find(lambda: self._face.api.GET(f"/datasources/uid/{uid}"))
        if source is None:
            self._do(f"create data source {name!r}", lambda: self._face.datasource.create_datasource(wanted))
        elif any(source.get(key) != value for key, value in wanted.items()):
            # The rest is as an operator has set it.
            changed = {**source, **wanted}
            what = f"change data source {name!r}"
            self._do(what, lambda: self._face.api.PUT(f"/datasources/uid/{uid}", json=changed))
        else:
            return False
        return True

    def ensure_dashboard(self, dashboard: Json, folder_uid: str) -> bool:
        """Save the dashboard into the folder. Returns whether anything changed: no new version otherwise."""
        uid, title = dashboard["uid"], dashboard["title"]
        found = self._find(lambda: self._face.dashboard.get_dashboard(uid))
        if found is not None:
            # Grafana adds its own number and version.
            known = {k: v for k, v in found["dashboard"].items() if k not in ("id", "version")}
            if known == dashboard and found["meta"].get("folderUid") == folder_uid:
                return False
        body = {
            "dashboard": {**dashboard, "id": None},
            "folderUid": folder_uid,
            "overwrite": True,
            "message": "peregrine dashboards push",
        }
        self._do(f"save dashboard {title!r}", lambda: self._face.dashboard.update_dashboard(body))
        return True

    def _find(self, get: Callable[[], Json]) -> Json | None:
        """None where there is none."""
        try:
            return self._call(get)
        except GrafanaClientError as error:
            if error.status_code == _NOT_FOUND:
                return None
            raise GrafanaError(str(error)) from None
        except GrafanaException as error:
            raise GrafanaError(str(error)) from None

    def _do(self, what: str, work: Callable[[], Json]) -> Json:
        try:
            return self._call(work)
        except GrafanaException as error:
            raise GrafanaError(f"cannot {what}: {error}") from None

    def _call(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except requests.JSONDecodeError:
            raise GrafanaError("the answer is no JSON: is this Grafana's address?") from None
        except requests.RequestException as error:
            raise GrafanaError(f"not reachable: {error}") from None
