"""The hub: a model is pushed and loaded by the real client, against a stand-in for the hub's HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
from huggingface_hub import constants

import fxgraft
from fxgraft.io import hub
from fxgraft.models import build_model

COMMIT = "a" * 40
REPO = "owner/model"


class StandIn(BaseHTTPRequestHandler):
    """Repositories in memory; what goes wrong is said by their names."""

    files: dict[str, dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if length is not None:
            self.close_connection = True

    def say(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "secret" in self.path or b"secret" in body:
            self.answer(401, b'{"error": "Invalid credentials"}')
        elif self.path == "/api/repos/create":
            self.say({"url": f"http://{self.headers['Host']}/{REPO}", "id": REPO})
        elif self.path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.say(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    kept = self.files.setdefault(REPO, {})
                    kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.say(
                {"commitUrl": f"http://{self.headers['Host']}/{REPO}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self.answer(500)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        repo, name = "/".join(parts[:2]), parts[-1]
        if "secret" in repo:
            self.answer(401, b"{}")
            return
        known = "owner/half" if repo == "owner/half" else repo
        content = self.files.get(REPO if known == "owner/half" else repo)
        if content is None:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif parts[3] not in ("main", COMMIT):
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        elif name not in content:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            body = content[name]
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            cut = body[: len(body) // 2] if repo == "owner/half" and self.command == "GET" else body
            self.answer(200, cut, len(body), ETag=etag, X_Repo_Commit=COMMIT)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    StandIn.files = {"owner/other": {"model.safetensors": b"1"}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


CLIENT = """
import json, sys, timm, torch, fxgraft
import huggingface_hub.file_download as client
torch.manual_seed(0)
client.time.sleep = lambda *_: None  # between attempts
model = fxgraft.patch(timm.create_model("test_resnet", num_classes=3), "rsc:layer=layer4 + selfnorm")
said = [fxgraft.push_to_hub(model, "owner/model", evidence="Two points better.", token="hf_x")]
loaded = fxgraft.load("hf-hub:owner/model")
said.append([graft.name for graft in fxgraft.grafts(loaded)])
said.append(all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values())))
for act in (
    lambda: fxgraft.load("hf-hub:owner/gone"),
    lambda: fxgraft.load("hf-hub:owner/model@v9"),
    lambda: fxgraft.load("hf-hub:owner/other"),
    lambda: fxgraft.load("hf-hub:owner/secret"),
    lambda: fxgraft.load("hf-hub:owner/half"),
    lambda: fxgraft.load("hf-hub:a/b/c/d"),
    lambda: fxgraft.push_to_hub(model, "owner/secret", token="hf_x"),
):
    try:
        act()
        said.append(None)
    except fxgraft.RecipeError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def client(code: str, tmp_path: Path, **environment: str) -> Any:
    source = str(Path(fxgraft.__file__).parents[1])
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_client_against_a_stand_in(tmp_path: Path, endpoint: str) -> None:
    said = client(CLIENT, tmp_path, HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1")
    assert said[:3] == [f"{endpoint}/{REPO}/commit/{COMMIT}", ["rsc", "selfnorm"], True]
    wanted = [
        "'hf-hub:owner/gone' cannot be fetched: there is no such repository",
        "there is no such repository or revision",
        "'owner/other' has no file 'fxgraft.safetensors'",
        "the hub asks who you are, or says no (401)",
        "cannot be fetched: ",
        "A repository is named owner/name",
        "The model cannot be pushed to 'owner/secret': the hub asks who you are",
    ]
    for text, words in zip(said[3:], wanted, strict=True):
        assert words in text
        assert len(text.splitlines()) >= 3
    assert sorted(StandIn.files[REPO]) == ["README.md", "fxgraft.safetensors"]
    assert "Two points better." in StandIn.files[REPO]["README.md"].decode()
    assert "owner/secret" not in StandIn.files


def test_without_a_network(tmp_path: Path) -> None:
    code = """
import json, fxgraft
try:
    fxgraft.load("hf-hub:owner/model")
except fxgraft.RecipeError as error:
    print(json.dumps(str(error)))
"""
    said = client(code, tmp_path, HF_HUB_OFFLINE="1")
    assert "the hub is not reached, and there is no copy on this machine" in said
    assert said.splitlines()[-1].endswith("pass its path to fxgraft.load.")


def test_the_card_names_grafts_options_evidence_and_citations() -> None:
    model = fxgraft.patch(timm.create_model("test_resnet", num_classes=3), "rsc:layer=layer4,name=late")
    text = hub.card(model, REPO)
    assert text.startswith("---\nlibrary_name: fxgraft\n")
    for words in (
        "# model\n",
        "**late**: ",
        "`layers='layer4'`",
        "None was given",
        fxgraft.RSC.paper,
        f'"hf-hub:{REPO}"',
    ):
        assert words in text
    assert (
        hub.card(model, REPO, "Measured.", "{{ grafts }}|{{ evidence }}|{{ citations }}").count("|Measured.|")
        == 1
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ grafts }} {{ citations }}", r"leaves out evidence\.\n.*\nAdd {{ evidence }}"),
        ("nothing", "leaves out citations, evidence, grafts"),
        ("{{ grafts", r"cannot be read: .*\nIt is text with {{ grafts }}"),
    ],
)
def test_a_template_that_leaves_something_out(template: str, message: str) -> None:
    model = fxgraft.patch(timm.create_model("test_resnet", num_classes=3), "rsc")
    with pytest.raises(fxgraft.ConfigError, match=message):
        fxgraft.push_to_hub(model, REPO, template=template)


def test_without_a_network_what_is_not_on_disk_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_address(*_: object) -> None:
        raise OSError("Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr("time.sleep", lambda *_: pytest.fail("tried again"))
    with pytest.raises(
        fxgraft.ConfigError, match=r"could not fetch 'resnet10t'(.|\n)*--weights FILE on the command"
    ):
        build_model("resnet10t", pretrained=True)
    with pytest.raises(fxgraft.ConfigError, match="could not fetch 'hf-hub:timm/gone'"):
        build_model("hf-hub:timm/gone")
    with pytest.raises(
        fxgraft.RecipeError, match="the hub is not reached, and there is no copy on this machine"
    ):
        fxgraft.load("hf-hub:owner/model")
    assert not constants.HF_HUB_OFFLINE
    assert build_model("resnet10t", 3) is not None, "what needs no network works"
