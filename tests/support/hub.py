"""A hub on the loopback device: real HTTP with ranges and redirects to another host, and whatever can go wrong."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the commit all repositories here are at").hexdigest()


@dataclass
class Hub:
    """What it serves, how it fails, and what it was asked.

    `faults` are by a part of the path: a status, or `(status, headers)`, or `cut`, `slow`, `no-range`. One that is
    a list is used up answer by answer. `token` is what gated repositories take.
    """

    repositories: dict[str, Path] = field(default_factory=dict)
    faults: dict[str, Any] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_of_the_test"
    asked: list[str] = field(default_factory=list)
    storage_tokens: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    url: str = ""
    storage_url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub while it answers, and the storage on another port, which files of weights are redirected to."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, storage)) for storage in (False, True)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _handler(hub: Hub, storage: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            if storage:
                hub.storage_tokens.append(self.headers.get("authorization", ""))
            with suppress(ConnectionError):  # the client has what it wants
                self._answer(path, self._fault(path))

        def _fault(self, path: str) -> Any:
            found = next((key for key in hub.faults if key in path), None)
            fault = hub.faults.get(found) if found else None
            if isinstance(fault, list):
                fault = fault.pop(0) if fault else None
            return fault

        def _answer(self, path: str, fault: Any) -> None:
            if isinstance(fault, int | tuple):
                status, headers = fault if isinstance(fault, tuple) else (fault, {})
                self._send(status, b"", headers)
            elif storage:
                self._file(Path(path), fault)
            elif path.startswith("/api/models/"):
                self._list(path.removeprefix("/api/models/"), fault)
            elif "/resolve/" not in path:
                self._send(404, b"")  # huggingface_hub 2.4 has questions of its own (`/api/agent-harnesses`)
            else:
                self._resolve(path.removeprefix("/"), fault)

        def _list(self, path: str, fault: Any) -> None:
            repo_id, _, revision = path.partition("/revision/")
            folder = hub.repositories.get(repo_id)
            if folder is None:
                self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                files = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
                self._send(200, json.dumps({"id": repo_id, "sha": COMMIT, "siblings": files}).encode(), fault=fault)

        def _resolve(self, path: str, fault: Any) -> None:
            repo_id, _, rest = path.partition("/resolve/")
            file = hub.repositories[repo_id] / rest.partition("/")[2]
            if repo_id in hub.gated and self.headers.get("authorization") != f"Bearer {hub.token}":
                code = "GatedRepo" if "authorization" not in self.headers else ""
                self._send(401 if code else 403, b"", {"X-Error-Code": code} if code else {})
            elif not file.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif file.suffix == ".safetensors":
                self._send(302, b"", {"Location": hub.storage_url + str(file)})
            else:
                self._file(file, fault)

        def _file(self, file: Path, fault: Any) -> None:
            size = file.stat().st_size
            first, last = self.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")
            if int(first) >= size:
                self._send(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            ranged = fault != "no-range" and "range" in self.headers
            end = min(int(last or size - 1), size - 1) if ranged else size - 1
            told = {"Content-Range": f"bytes {first}-{end}/{size}"} if ranged else {}
            with file.open("rb") as opened:
                opened.seek(int(first))
                self._send(206 if ranged else 200, opened, told, length=end - int(first) + 1, fault=fault)

        def _send(self, status: int, body: Any, headers: Any = None, *, length: int = -1, fault: Any = None) -> None:
            length = len(body) if length < 0 else length
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            left = length // 2 if fault == "cut" else length
            while left:
                size = min(left, 1 if fault == "slow" else 1 << 16)
                piece = body.read(size) if hasattr(body, "read") else body[length - left :][:size]
                self.wfile.write(piece)
                left, hub.sent_bytes = left - len(piece), hub.sent_bytes + len(piece)
                time.sleep(0.05 if fault == "slow" else 0)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    return Handler


def save_sparse(profile_name: str, folder: Path, shards: Callable[[str], int]) -> Path:
    """The repository that a bundled profile is of, in its full size: true configurations and headers, and holes in
    place of weights, which take no room on the disk. `shards` says in how many files a component is."""
    from vramplan.pipeline.build import build_weightless, component_class
    from vramplan.profiles.catalogue import load_pipeline_profile

    profile = load_pipeline_profile(profile_name)
    index: dict[str, Any] = {"_class_name": profile.pipeline, "_diffusers_version": "0.42.1"}
    for name, part in profile.components.items():
        index[name] = [part.library, part.class_name]
        place = folder / name
        place.mkdir(parents=True)
        if part.parameters is None and "tokenizer" in name:
            (place / "tokenizer_config.json").write_text(json.dumps({"model_max_length": part.model_max_length}))
            (place / "tokenizer.json").write_bytes(b" " * (2 << 20))
        elif part.parameters is None:
            component_class(part.library, part.class_name).from_config(part.config).save_pretrained(place)
        else:
            module = build_weightless(part.library, part.class_name, part.config)
            config = module if part.library == "diffusers" else module.config
            (config.save_config if part.library == "diffusers" else config.save_pretrained)(place)
            stem = "diffusion_pytorch_model" if part.library == "diffusers" else "model"
            _save_holes(module, place, stem, shards(name))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save_holes(module: Any, place: Path, stem: str, count: int) -> None:
    unique = {id(tensor): (name, tensor) for name, tensor in reversed(module.state_dict(keep_vars=True).items())}
    tensors = sorted(unique.values(), key=lambda item: item[0])
    names = [f"{stem}-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    weight_map = {}
    for number, file in enumerate(names):
        share = tensors[number * len(tensors) // count : (number + 1) * len(tensors) // count]
        write_header(place / file, {name: (list(tensor.shape), "BF16", 2) for name, tensor in share})
        weight_map |= {name: file for name, _ in share}
    if count > 1:
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_header(path: Path, tensors: dict[str, tuple[list[int], str, int]]) -> None:
    """A safetensors file of these shapes, dtypes and element sizes, whose data is a hole."""
    header, end = {}, 0
    for name, (shape, dtype, width) in tensors.items():
        size = width
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
