"""Downloads: once, whole, resumed, from the first mirror that answers, and refused when they differ."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from scvi_cradle.datasets import _download
from scvi_cradle.datasets._download import data_folder, locate
from scvi_cradle.datasets._sources import Source


def hdf5_bytes(folder: Path, seed: int = 0) -> bytes:
    """Some 40 kB that no compression shrinks."""
    file = folder / f"made_{seed}.h5"
    with h5py.File(file, "w") as out:
        out["values"] = np.random.default_rng(seed).random(5000)
    return file.read_bytes()


@dataclass
class Server:
    """What a local server serves, how it behaves, and what it was asked for."""

    files: dict[str, bytes]
    ranges: bool = True
    etag: str | None = '"first"'
    lengths: bool = True
    cuts: list[int] = field(default_factory=list)  # numbers of bytes after which the next answers break off
    statuses: list[int] = field(default_factory=list)  # statuses of the next answers
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range header
    port: int = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    @property
    def offsets(self) -> list[str | None]:
        return [span for _, span in self.asked]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    setup_of: Server

    def do_GET(self) -> None:
        state = self.setup_of
        span = self.headers.get("Range")
        state.asked.append((self.path[1:], span))
        self.close_connection = True
        content = state.files.get(self.path[1:])
        if state.statuses or content is None:
            self.send_response(state.statuses.pop(0) if state.statuses else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", span).group(1)) if span else 0
        same = self.headers.get("If-Range") in (None, state.etag)
        if span and state.ranges and same and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        partial = bool(span) and state.ranges and same
        body = content[start:] if partial else content
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if state.lengths:
            self.send_header("Content-Length", str(len(body)))
        if state.etag:
            self.send_header("ETag", state.etag)
        self.end_headers()
        self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_download, "_CHUNK", 1000)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    target = tmp_path / "data"
    monkeypatch.setenv("SCVI_CRADLE_DATA", str(target))
    return target


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = Server({"a.h5ad": hdf5_bytes(tmp_path), "other.h5ad": hdf5_bytes(tmp_path, 1)})
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"setup_of": state}))
    state.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def fetch(*sources: Source, known_hash: str | None = None, path: Path | None = None) -> Path:
    return locate("screen", sources, path=path, known_hash=known_hash, progress=False)


def closed_url(name: str) -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/{name}"


def left_over(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {".lock"}


def test_second_call_downloads_nothing(server: Server, folder: Path) -> None:
    source = Source(server.url("a.h5ad"), "a.h5ad")
    file = fetch(source)
    assert file == folder / "a.h5ad"
    assert file.read_bytes() == server.files["a.h5ad"]
    assert fetch(source) == file
    assert server.asked == [("a.h5ad", None)]
    assert left_over(folder) == {"a.h5ad", "a.h5ad.sha256"}
    digest = hashlib.sha256(server.files["a.h5ad"]).hexdigest()
    assert (folder / "a.h5ad.sha256").read_text() == f"{digest}  a.h5ad\n"  # what sha256sum --check reads


def test_a_broken_download_goes_on_in_the_same_call(server: Server, folder: Path) -> None:
    server.cuts = [15_000, 10_000]
    file = fetch(Source(server.url("a.h5ad"), "a.h5ad"))
    assert server.offsets == [None, "bytes=15000-", "bytes=25000-"]
    assert file.read_bytes() == server.files["a.h5ad"]
    assert left_over(folder) == {"a.h5ad", "a.h5ad.sha256"}


def test_a_broken_download_goes_on_in_a_later_call(server: Server, folder: Path) -> None:
    server.cuts = [15_000, 0]
    source = Source(server.url("a.h5ad"), "a.h5ad")
    with pytest.raises(ConnectionError, match="a.h5ad"):
        fetch(source)
    assert left_over(folder) == {"a.h5ad.part", "a.h5ad.part.json"}  # a part is never taken for the file
    server.statuses = [503]
    with pytest.raises(ConnectionError, match="HTTP status 503"):
        fetch(source)
    assert (folder / "a.h5ad.part").stat().st_size == 15_000
    server.asked.clear()
    assert fetch(source).read_bytes() == server.files["a.h5ad"]
    assert server.offsets == ["bytes=15000-"]


def test_a_whole_part_is_not_asked_for_again(server: Server, folder: Path) -> None:
    size = len(server.files["a.h5ad"])
    server.cuts = [size - 1000, 0]
    source = Source(server.url("a.h5ad"), "a.h5ad")
    with pytest.raises(ConnectionError):
        fetch(source)
    (folder / "a.h5ad.part").write_bytes(server.files["a.h5ad"])
    server.asked.clear()
    assert fetch(source).read_bytes() == server.files["a.h5ad"]
    assert server.asked == []


@pytest.mark.parametrize("change", ["etag", "length", "no ranges", "shorter"])
def test_a_part_of_another_file_is_thrown_away(server: Server, folder: Path, tmp_path: Path, change: str) -> None:
    server.cuts = [30_000, 0]
    if change in {"length", "shorter"}:
        server.etag = None
    source = Source(server.url("a.h5ad"), "a.h5ad")
    with pytest.raises(ConnectionError):
        fetch(source)
    if change == "etag":
        server.etag, server.files["a.h5ad"] = '"second"', server.files["other.h5ad"]
    elif change == "length":
        server.files["a.h5ad"] = server.files["other.h5ad"] + b"more"
    elif change == "shorter":
        with h5py.File(tmp_path / "short.h5", "w") as out:
            out["x"] = 1
        server.files["a.h5ad"] = (tmp_path / "short.h5").read_bytes()
    else:
        server.ranges = False
    server.asked.clear()
    assert fetch(source).read_bytes() == server.files["a.h5ad"]
    at_once = change in {"etag", "no ranges"}  # the server sends the whole file by itself
    assert server.offsets == ["bytes=30000-"] + [None] * (not at_once)


def test_a_part_from_another_mirror_is_not_continued(server: Server, folder: Path) -> None:
    server.cuts = [15_000, 0]
    first, second = Source(server.url("a.h5ad"), "x.h5ad"), Source(server.url("other.h5ad"), "x.h5ad")
    assert fetch(first, second).read_bytes() == server.files["other.h5ad"]
    assert server.asked[-1] == ("other.h5ad", None)


def test_a_short_answer_of_unknown_length_is_refused(server: Server, folder: Path) -> None:
    server.lengths, server.cuts = False, [20_000]
    with pytest.raises(ConnectionError, match="neither a whole HDF5 file"):
        fetch(Source(server.url("a.h5ad"), "a.h5ad"))
    assert left_over(folder) == set()


def test_a_short_answer_is_noticed_whatever_the_client_says(tmp_path: Path) -> None:
    """Older versions of urllib3 take the end of a connection for the end of a file."""
    answer = SimpleNamespace(iter_content=lambda _: iter([b"half"]))
    downloader = _download._Resuming(tmp_path / "a.h5ad.part", progress=False)
    with pytest.raises(_download._NotReceivedError, match="after 4 of 8 bytes"):
        downloader._write(answer, 0, 8)
    downloader._write(answer, 4, 8)  # continued


def test_a_web_page_is_not_a_data_set(server: Server, folder: Path) -> None:
    server.files["page"] = b"<html>Sign in to this network</html>"
    with pytest.raises(ConnectionError, match="neither a whole HDF5 file nor a zip archive"):
        fetch(Source(server.url("page"), "a.h5ad"))
    assert left_over(folder) == set()


def test_mirrors_are_tried_in_order(server: Server, folder: Path) -> None:
    sources = [
        Source(closed_url("a.h5ad"), "a.h5ad"),
        Source(server.url("missing"), "a.h5ad"),
        Source(server.url("other.h5ad"), "other.h5ad"),
        Source(server.url("a.h5ad"), "a.h5ad"),
    ]
    assert fetch(*sources) == folder / "other.h5ad"
    assert [path for path, _ in server.asked] == ["missing", "other.h5ad"]
    assert fetch(*sources) == folder / "other.h5ad"
    assert len(server.asked) == 2


def test_a_changed_file_is_refused(server: Server, folder: Path) -> None:
    source = Source(server.url("a.h5ad"), "a.h5ad")
    file = fetch(source)
    file.write_bytes(server.files["other.h5ad"])
    with pytest.raises(ValueError, match="downloaded first.*a.h5ad.sha256"):
        fetch(source)
    # removed and downloaded again, it still has to be the first one
    file.unlink()
    server.files["a.h5ad"] = server.files["other.h5ad"]
    with pytest.raises(ValueError, match="its hash is not"):
        fetch(source)
    assert left_over(folder) == {"a.h5ad.sha256"}
    (folder / "a.h5ad.sha256").unlink()
    assert fetch(source).read_bytes() == server.files["other.h5ad"]


def test_known_hash(server: Server, folder: Path) -> None:
    digest = hashlib.sha256(server.files["a.h5ad"]).hexdigest()
    sources = Source(server.url("other.h5ad"), "x.h5ad"), Source(server.url("a.h5ad"), "x.h5ad")
    with pytest.raises(ValueError, match="its hash is not"):
        fetch(sources[0], known_hash=f"sha256:{digest}")
    assert left_over(folder) == set()
    file = fetch(*sources, known_hash=f"sha256:{digest}")  # the second mirror has it
    assert file.read_bytes() == server.files["a.h5ad"]
    fetch(*sources, known_hash=digest.upper())
    fetch(path=file, known_hash="md5:" + hashlib.md5(server.files["a.h5ad"]).hexdigest())
    for arguments in ({}, {"path": file}):
        with pytest.raises(ValueError, match=r"known_hash.*received.*x\.h5ad"):
            fetch(*sources, known_hash="0" * 64, **arguments)


@pytest.mark.parametrize("given", ["foo:12", "sha256:12", "md5:" + "0" * 64, "", "x" * 64, "sha1:" + "0" * 40])
def test_what_is_no_hash(server: Server, folder: Path, given: str) -> None:
    own = folder / "own.h5ad"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_bytes(server.files["a.h5ad"])
    for arguments in ({}, {"path": own}):
        with pytest.raises(ValueError, match="`known_hash` must be 'sha256:...'.*received " + repr(given)):
            fetch(Source(server.url("a.h5ad"), "a.h5ad"), known_hash=given, **arguments)


def test_offline(folder: Path) -> None:
    urls = [closed_url("a.h5ad"), closed_url("b.h5ad")]
    with pytest.raises(ConnectionError) as caught:
        fetch(Source(urls[0], "a.h5ad"), Source(urls[1], "b.h5ad"))
    for part in (*urls, "'a.h5ad'", "'b.h5ad'", "'screen.h5ad'", str(folder), "SCVI_CRADLE_DATA", "`path=`"):
        assert part in str(caught.value)
    assert caught.value.__cause__ is not None


def test_files_of_the_user(folder: Path, tmp_path: Path) -> None:
    content = hdf5_bytes(tmp_path)
    folder.mkdir()
    source = Source(closed_url("a.h5ad"), "a.h5ad")
    (folder / "a.h5ad").write_bytes(content)
    assert fetch(source) == folder / "a.h5ad"
    assert (folder / "a.h5ad.sha256").is_file()  # from now on it has to stay the same
    (folder / "screen.h5ad").write_bytes(content)
    assert fetch(source) == folder / "screen.h5ad"
    assert not (folder / "screen.h5ad.sha256").exists()
    mine = tmp_path / "mine.h5ad"
    mine.write_bytes(content)
    assert fetch(source, path=mine) == mine
    assert not (tmp_path / "mine.h5ad.sha256").exists()
    with pytest.raises(FileNotFoundError, match=r"`path` must name a file; received .*absent\.h5ad"):
        fetch(source, path=tmp_path / "absent.h5ad")
    (tmp_path / "text.h5ad").write_text("no data")
    with pytest.raises(ValueError, match="neither"):
        fetch(source, path=tmp_path / "text.h5ad")


def test_archives(server: Server, folder: Path, tmp_path: Path) -> None:
    def archive(**members: bytes) -> bytes:
        with zipfile.ZipFile(tmp_path / "made.zip", "w") as out:
            for name, content in members.items():
                out.writestr(f"folder/{name}.h5ad", content)
            out.writestr("folder/notes.txt", "notes")
        return (tmp_path / "made.zip").read_bytes()

    server.files["a.zip"] = archive(cells=server.files["a.h5ad"])
    source = Source(server.url("a.zip"), "a.zip")
    file = fetch(source)
    assert file == folder / "a.unpacked.h5ad"
    assert file.read_bytes() == server.files["a.h5ad"]
    file.write_bytes(b"half")  # what a stopped process could have left
    assert fetch(source).read_bytes() == server.files["a.h5ad"]
    assert len(server.asked) == 1
    server.files["two.zip"] = archive(one=server.files["a.h5ad"], two=server.files["a.h5ad"])
    with pytest.raises(ValueError, match=r"one \.h5ad or \.h5mu file"):
        fetch(Source(server.url("two.zip"), "two.zip"))


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCVI_CRADLE_DATA", "~/screens")
    assert data_folder() == Path.home() / "screens"
    monkeypatch.delenv("SCVI_CRADLE_DATA")
    assert data_folder().name == "scvi_cradle"


def test_progress(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, shown in (("a.h5ad", True), ("other.h5ad", False)):
        locate(name, [Source(server.url(name), name)], path=None, known_hash=None, progress=shown)
        assert (f"{name}: 100%" in capsys.readouterr().err) == shown


def test_a_record_is_not_needed_in_a_folder_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    folder.mkdir()
    (folder / "a.h5ad").write_bytes(hdf5_bytes(tmp_path))
    monkeypatch.setattr(_download, "_record", refuse)
    assert fetch(Source(closed_url("a.h5ad"), "a.h5ad")) == folder / "a.h5ad"
