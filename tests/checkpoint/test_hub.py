"""Models of the Hub, against a small server of our own that speaks the endpoints huggingface_hub needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
WIDE = save({f"layer.{n:04d}.weight": np.full(40, n, np.float32) for n in range(3000)})
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80",
    "onnx/model.safetensors.index.json": b"{}",
    "onnx/model.safetensors": b"not one",
    "README.md": b"#",
}
REPOS: dict[str, dict[str, bytes]] = {
    "o/one": {**SMALL, "model.safetensors": WIDE},
    "o/shards": {
        **SMALL,
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        ).encode(),
        "model-00001-of-00002.safetensors": save({"a": np.array([1.0])}),
        "model-00002-of-00002.safetensors": save({"b": np.array([2.0])}),
        "consolidated.safetensors": b"never fetched",
    },
    "o/pickle": {"config.json": b"{}", "pytorch_model.bin": b"\x80"},
    "o/hostile": {"model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'},
    "o/lying": {"model.safetensors": (1000).to_bytes(8, "little") + b"{}"},
}


@dataclass
class Hub:
    """The server's address, and what it has been asked for: (method, path, range, token)."""

    url: str = ""
    asked: list[tuple[str, str, str, str]] = field(default_factory=list)
    sent: int = 0

    def names(self, method: str) -> set[str]:
        return {
            path.rsplit("/", 1)[1] for how, path, _, _ in self.asked if how == method and "/resolve/" in path
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.hub.sent += len(body)

    def answer(self) -> None:
        path = self.path.split("?")[0]
        if path == "/api/agent-harnesses":
            return self.reply(404, b"")
        asked_range, token = self.headers.get("Range", ""), self.headers.get("Authorization", "")
        self.hub.asked.append((self.command, path, asked_range, token))
        match = re.fullmatch(r"(/api/models)?/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?", path)
        assert match, path
        repo, rest = match["repo"], match["rest"] or "/revision/main"
        if repo == "o/gated" and token != "Bearer hf_right":
            return self.reply(401 if not token else 403, b"", X_Error_Code="GatedRepo", X_Error_Message="no")
        if repo == "o/broken":
            return self.reply(418, b"", X_Error_Message="I am a teapot")
        files = REPOS.get("o/one" if repo == "o/gated" else repo)
        if files is None:
            return self.reply(401, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        _, kind, revision, *tail = rest.split("/", 3)
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.reply(404, b"", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.reply(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
        if kind == "tree":
            oids = {name: sha256(body).hexdigest()[:40] for name, body in files.items()}
            rows = [{"type": "file", "path": n, "size": len(b), "oid": oids[n]} for n, b in files.items()]
            return self.reply(200, json.dumps(rows).encode())
        assert kind == "resolve", path
        if tail[0] not in files:
            return self.reply(404, b"", X_Error_Code="EntryNotFound")
        return self.file(files[tail[0]], commit, asked_range)

    def file(self, body: bytes, commit: str, asked_range: str) -> None:
        headers = {"ETag": f'"{sha256(body).hexdigest()}"', "X_Repo_Commit": commit}
        if not asked_range:
            return self.reply(200, body, **headers)
        first, last = asked_range.removeprefix("bytes=").split("-")
        part = body[int(first) : int(last or len(body)) + 1]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        return self.reply(206, part, Content_Range=span, **headers)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


PROGRAM = """
import json, sys
from della.checkpoint.source import open_source
from della.errors import DellaError
results = []
for reference, weights, name in json.loads(sys.argv[1]):
    try:
        with open_source(reference, weights=weights) as source:
            results.append({
                "tensors": {t.name: [t.dtype.name, *t.shape] for t in source.tensors.values()},
                "revision": source.revision, "config": source.config, "folder": str(source.folder),
                "side": list(source.side_files()),
                "files": {file.name: [file.size, file.fingerprint] for file in source.files},
                "read": source.tensors[name].read().tolist() if name else None,
            })
    except DellaError as error:
        results.append([error.exit_code, str(error)])
print(json.dumps(results))
"""


def run(home: Path, url: str, *calls: tuple[str, bool, str | None], **env: str) -> list[Any]:
    """Opens references one after another in one new process, so that the environment counts."""
    clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        env={**clean, "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": url, **env},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: list[Any] = json.loads(done.stdout)
    return result


def stored(home: Path) -> set[str]:
    files = [path for path in (home / "hf/hub").glob("models--*/snapshots/*/**/*") if path.is_file()]
    return {str(path).split("/snapshots/")[1].split("/", 1)[1] for path in files}


def test_planning_reads_headers_by_range(hub: Hub, tmp_path: Path) -> None:
    (headers_only,) = run(tmp_path, hub.url, ("o/one", False, None))
    assert hub.sent < len(WIDE)
    refused, shards = run(tmp_path, hub.url, ("o/one", False, "layer.0002.weight"), ("o/shards", False, None))
    assert len(headers_only["tensors"]) == 3000
    assert headers_only["tensors"]["layer.2999.weight"] == ["F32", 40]
    assert (headers_only["revision"], headers_only["config"]) == ("a" * 40, {"model_type": "llama"})
    assert headers_only["side"] == ["tokenizer.json"]
    assert headers_only["files"]["model.safetensors"][0] == len(WIDE)
    path = f"{tmp_path}/hf/hub/models--o--one/snapshots/{'a' * 40}/model.safetensors"
    assert refused == [3, f"{path}: the weights are not here; they were not downloaded, or were moved"]
    assert shards["tensors"] == {"a": ["F64", 1], "b": ["F64", 1]}
    assert stored(tmp_path) == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert 8 + int.from_bytes(WIDE[:8], "little") > 1 << 17, "the header is to need a second request"
    assert all(span for how, name, span, _ in hub.asked if how == "GET" and name.endswith(".safetensors"))


def test_the_weights_are_downloaded_once_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    calls = [("o/one", True, "layer.0007.weight"), ("o/shards@v1", True, "b")]
    online = run(tmp_path, hub.url, *calls)
    assert online[0]["read"] == [7.0] * 40
    assert (online[1]["read"], online[1]["revision"]) == ([2.0], "b" * 40)
    weights = {"model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    small = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert stored(tmp_path) == weights | small
    assert hub.names("GET") == weights | small, "no code, no pickles, no other weights"
    hub.asked.clear()
    planned = [(reference, False, name) for reference, _, name in calls]
    assert run(tmp_path, hub.url, *calls, *planned, HF_HUB_OFFLINE="1") == online + online
    assert hub.asked == []
    assert run(tmp_path, "http://127.0.0.1:9", *calls) == online, "the same where the network is down"
    folder = online[1]["folder"]
    assert run(tmp_path, hub.url, (folder, True, "b"))[0] == online[1], (
        "a snapshot's folder is a reference too"
    )
    assert hub.asked == []


def test_headers_and_weights_give_the_same_fingerprints(hub: Hub, tmp_path: Path) -> None:
    planned, opened = run(tmp_path, hub.url, ("o/one", False, None), ("o/one", True, None))
    assert planned == opened


def test_what_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    missing, revision, gated, broken = run(
        tmp_path,
        hub.url,
        ("o/nix", True, None),
        ("o/one@v9", False, None),
        ("o/gated", True, None),
        ("o/broken", True, None),
    )
    login = "log in with `hf auth login` or set HF_TOKEN"

    assert missing == [
        3,
        f"o/nix: no such model on the Hub, or a private one; check the name, or {login}. "
        f"No such folder either: tried {tmp_path}/o/nix",
    ]
    assert revision == [3, "o/one: no revision 'v9' on the Hub; check the branch, tag or commit"]
    assert gated == [3, f"o/gated: gated on the Hub; accept its terms on its page there, then {login}"]
    assert broken[0] == 3
    assert broken[1].startswith("o/broken: cannot be fetched from the Hub: Client error '418")
    right = run(tmp_path, hub.url, ("o/gated", True, "layer.0001.weight"), HF_TOKEN="hf_right")
    assert right[0]["read"] == [1.0] * 40


@pytest.mark.parametrize("reference", ["o/one", "o/shards"])
def test_offline_and_not_in_the_cache(hub: Hub, tmp_path: Path, reference: str) -> None:
    why = (
        f"{reference}: not, or not wholly, in the hub cache, and the Hub cannot be reached; "
        "go online (HF_HUB_OFFLINE must not be set), or give a folder. "
        f"No such folder either: tried {tmp_path}/{reference}"
    )
    assert run(tmp_path, hub.url, (reference, True, None), HF_HUB_OFFLINE="1") == [[3, why]]
    run(tmp_path, hub.url, (reference, False, None))
    hub.asked.clear()
    both = [(reference, weights, None) for weights in (True, False)]
    assert run(tmp_path, hub.url, *both, HF_HUB_OFFLINE="1") == [[3, why]] * 2
    assert hub.asked == []


@pytest.mark.parametrize("weights", [True, False])
def test_bad_models_on_the_hub(hub: Hub, tmp_path: Path, weights: bool) -> None:
    pickle, hostile, lying = run(
        tmp_path,
        hub.url,
        ("o/pickle", weights, None),
        ("o/hostile", weights, None),
        ("o/lying", weights, None),
    )
    assert (pickle[0], hostile[0], lying[0]) == (3, 3, 3)
    assert "/pytorch_model.bin: a pickle, which can run any code" in pickle[1]
    assert pickle[1].endswith(
        "; download the folder yourself, give that, and allow it with allow_pickle=True, which needs torch"
    )
    assert "model.safetensors.index.json: names '../../x.safetensors', which is not" in hostile[1]
    assert "truncated: the header alone takes 1,008 bytes, found 10" in lying[1]
    assert "pytorch_model.bin" not in hub.names("GET")


def test_what_stands_in_subfolders_is_downloaded_by_the_list(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [{"path": ""}, {"path": "2_Dense"}]
    small = {
        "modules.json": json.dumps(modules).encode(), "2_Dense/config.json": b"{}",
        "additional_chat_templates/tool.jinja": b"x",
    }  # fmt: skip
    dense = {"2_Dense/model.safetensors": save({"w": np.ones(1)})}
    others = {
        "2_Dense/run.py": b"",
        "3_Other/config.json": b"{}",
        "onnx/model.onnx": b"",
        "2_Dense/pytorch_model.bin": b"",
    }
    monkeypatch.setitem(
        REPOS, "o/embedder", {**small, **dense, **others, "model.safetensors": save({"a": np.ones(1)})}
    )
    (planned,) = run(tmp_path, hub.url, ("o/embedder", False, None))
    assert set(planned["side"]) == set(small)
    (merged,) = run(tmp_path, hub.url, ("o/embedder", True, "a"))
    assert set(merged["side"]) == set(small | dense)
    assert stored(tmp_path) == {*small, *dense, "model.safetensors"}
    assert run(tmp_path, hub.url, ("o/embedder", True, "a"), HF_HUB_OFFLINE="1") == [merged]
