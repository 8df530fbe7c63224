"""The hub, both ways, against a server that speaks what is needed of its protocol: no network, no account."""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from pnlac_fast.cli import main
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.neurons import NeuronSet, load_sets, save_sets
from pnlac_fast.publishing import publish
from pnlac_fast.slice_file import merge_slices, save_slices
from pnlac_fast.slices import slice_neurons

TOKEN = "hf_" + "secretsecret" * 3


class Hub(ThreadingHTTPServer):
    """Repositories as files by name; whoever comes without the token is turned away when writing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.bodies: list[bytes] = []
        self.commits = 0
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """What huggingface_hub asks for."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.bodies.append(body)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repositories:
                self.answer(409, {"error": "exists", "url": f"{self.server.address}/{name}"})
                return
            self.server.repositories[name] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            self.answer(200, {"url": f"{self.server.address}/{name}", "name": name})
        elif "/preupload/" in self.path:
            given = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": file["path"], **given} for file in json.loads(body)["files"]]})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        else:
            name = re.fullmatch(r"/api/models/(.+/.+)/commit/main", self.path)
            assert name, self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[name[1]][line["value"]["path"]] = content
            self.server.commits += 1
            oid = f"{self.server.commits:040x}"
            url = f"{self.server.address}/{name[1]}/commit/{oid}"
            self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        files = self.server.repositories.get(asked[1]) if asked else None
        if asked is None or files is None or asked[3] not in files:
            error = "RepoNotFound" if files is None else "EntryNotFound"
            self.answer(404, {"error": "not found"}, {"X-Error-Code": error, "X-Repo-Commit": "0" * 40})
            return
        content = files[asked[3]]
        commit = f"{self.server.commits:040x}"
        headers = {"ETag": f'"{hash(content) & 0xFFFFFFFF:x}"', "X-Repo-Commit": commit}
        self.answer(200, content, headers)

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def neurons(tmp_path: Path) -> Path:
    member = np.zeros((3, 48), bool)
    member[0, :3] = member[2, 5:7] = True
    base = {"source": "user/base", "sha256": "a" * 64}
    found = {"score": "rms", "top": 0.05, "tokens": "last"}
    sets = [NeuronSet("race/general", "general", member, model="race", base=base, found=found)]
    save_sets(sets, tmp_path / "sets.json")
    return tmp_path / "sets.json"


def test_neurons_go_to_the_hub_and_come_back(
    hub: Hub, neurons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert main(["publish", str(neurons), "--repo", "user/name", "--private", "--json"]) == 0
    said = capfd.readouterr()
    record = json.loads(said.out)
    assert record == {"repository": f"{hub.address}/user/name", "address": "hf://user/name"}
    assert hub.private == {"user/name"}
    files = hub.repositories["user/name"]
    assert files.keys() == {"neurons.json", "README.md"}
    assert files["neurons.json"] == neurons.read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "pnlac-fast"
    assert card.data.base_model == "user/base"
    assert "| race/general | general | mlp_mid | 5 | 3.47% | score rms, top 0.05, tokens last |" in card.text
    for address in ("hf://user/name", "hf://user/name/neurons.json", "hf://user/name@main/neurons.json"):
        back = load_sets(address)["race/general"]
        assert np.array_equal(back.member, load_sets(neurons)["race/general"].member)
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    logged = " ".join(f"{r.getMessage()} {r.args}" for r in caplog.records if r.name.startswith("pnlac"))
    for place in (written, b"".join(hub.bodies), said.out.encode(), said.err.encode(), logged.encode()):
        assert TOKEN.encode() not in place


def test_a_card_of_someone_else_stays_and_our_own_is_renewed(hub: Hub, neurons: Path) -> None:
    publish(neurons, "user/name")
    hub.repositories["user/name"]["README.md"] = b"---\nlibrary_name: pnlac-fast\n---\nold\n"
    publish(neurons, "user/name")
    assert b"old" not in hub.repositories["user/name"]["README.md"]
    for foreign in (b"---\nlibrary_name: peft\n---\nmine\n", b"mine\n"):
        hub.repositories["user/name"]["README.md"] = foreign
        publish(neurons, "user/name")
        assert hub.repositories["user/name"]["README.md"] == foreign


def test_slices_go_to_the_hub_and_into_a_copy_of_the_base(
    hub: Hub, neurons: Path, model_paths: dict[str, Path], tmp_path: Path
) -> None:
    base, other = (load_model(model_paths["llama"], dtype="float32", device="cpu") for _ in range(2))
    member = load_sets(neurons)["race/general"].member
    slices = slice_neurons(base, NeuronSet("some", "specific", member))
    for parameter in slices.parameters():
        parameter.data += 1
    save_slices(slices, tmp_path / "mine.safetensors", base=base.origin)
    slices.merge()
    publish(tmp_path / "mine.safetensors", "user/slices")
    assert "neuron_slices.safetensors" in hub.repositories["user/slices"]
    merged = merge_slices(other, "hf://user/slices")
    assert np.array_equal(merged.member, member)
    for one, two in zip(base.hf.parameters(), other.hf.parameters(), strict=True):
        assert one.equal(two)
    fresh = load_model(model_paths["llama"], dtype="float32", device="cpu")
    tuned = load_tuned(fresh, "hf://user/slices/neuron_slices.safetensors")
    for one, two in zip(base.hf.parameters(), tuned.hf.parameters(), strict=True):
        assert one.equal(two)


def test_a_report_goes_as_it_is_and_nothing_else_of_its_folder(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    (folder / "tables").mkdir(parents=True)
    (folder / "figures" / "narrow").mkdir(parents=True)
    for name in ("index.html", "tables/overlap.csv", "figures/layers.png", "figures/narrow/layers.png", ".env"):
        (folder / name).write_text(name)
    (folder / "model_card.md").write_text("## Political stance of race\n")
    publish(folder, "user/report")
    files = hub.repositories["user/report"]
    assert files.keys() == {
        *("index.html", "tables/overlap.csv", "figures/layers.png", "figures/narrow/layers.png"),
        *("model_card.md", "README.md"),
    }
    assert "## Political stance of race" in files["README.md"].decode()
    assert "`tables/overlap.csv`" in files["README.md"].decode()


def test_what_cannot_be_published_or_fetched_is_a_sentence(
    hub: Hub, neurons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is no report"):
        publish(tmp_path, "user/name")
    with pytest.raises(UserError, match="no neuron file"):
        publish(tmp_path / "nothing.json", "user/name")
    with pytest.raises(UserError, match="cannot be fetched"):
        load_sets("hf://user/nothing")
    with pytest.raises(UserError, match=r"cannot be written on the hub.*hf auth login") as refused:
        publish(neurons, "user/name", token="hf_" + "wrong" * 7)
    assert "wrong" not in str(refused.value)
    with pytest.raises(UserError, match="cannot be written on the hub"):
        publish(neurons, "no user/no name/at all")
    assert hub.repositories == {}
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="cannot be written on the hub"):
        publish(neurons, "user/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be written on the hub.*offline"):
        publish(neurons, "user/name")
