"""Files of published data sets: where they lie, how they get there, and whether they are still the same."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import pooch
from filelock import FileLock
from tqdm.auto import tqdm

from scvi_cradle.datasets._sources import Source

if TYPE_CHECKING:
    from requests import Response

FOLDER_VARIABLE = "SCVI_CRADLE_DATA"
_CHUNK = 1 << 16
_TIMEOUT = 30.0
_OK, _PARTIAL, _BEYOND_THE_END = 200, 206, 416
_HDF5_MEMBERS = (".h5ad", ".h5mu")
_HEX_DIGITS = {"sha256": 64, "md5": 32}


def data_folder() -> Path:
    """Return the folder of downloads: ``SCVI_CRADLE_DATA``, else pooch's cache folder of this package."""
    return Path(os.environ.get(FOLDER_VARIABLE) or pooch.os_cache("scvi_cradle")).expanduser().absolute()


def locate(
    name: str, sources: Sequence[Source], *, path: str | os.PathLike[str] | None, known_hash: str | None, progress: bool
) -> Path:
    """Return the HDF5 file of a data set: the user's own, one in the data folder, or a download.

    Parameters
    ----------
    name
        Name of the data set; a file ``<name>.h5ad`` or ``<name>.h5mu`` in the data folder is taken first.
    sources
        Addresses, tried in this order.
    path
        File of the user; then nothing is looked for or downloaded.
    known_hash
        ``"sha256:..."``, ``"md5:..."`` or a bare SHA-256.
    progress
        Whether to show a progress bar on terminals and in notebooks.

    Raises
    ------
    FileNotFoundError
        If there is no file at ``path``.
    ConnectionError
        If the file is not there and no address answers with it.
    ValueError
        If ``known_hash`` is no hash, or the file differs from it or from the one that was downloaded first.
    """
    _check_form(known_hash)
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            msg = f"`path` must name a file; received {str(path)!r}, which is not one: mend the path or leave it out to download the file."
            raise FileNotFoundError(msg)
        _check_hash(file, known_hash)
    else:
        folder = data_folder()
        own = [folder / f"{name}{suffix}" for suffix in _HDF5_MEMBERS]
        found = [file for file in (*own, *(folder / source.file_name for source in sources)) if file.is_file()]
        file = found[0] if found else _download(name, sources, folder, known_hash, progress=progress)
        if found:
            _check_hash(file, known_hash)
            _check_recorded(file, own)
    if h5py.is_hdf5(file):
        return file
    if not zipfile.is_zipfile(file):
        msg = f"The file must be an .h5ad or .h5mu file or a zip archive with one; received {str(file)!r}, which is neither: pass the `path=` of another one."
        raise ValueError(msg)
    return _unpacked(file)


def _download(name: str, sources: Sequence[Source], folder: Path, known_hash: str | None, *, progress: bool) -> Path:
    """Try the sources in order; the first file that arrives whole is kept and its SHA-256 recorded beside it."""
    failures: list[str] = []
    refused = False
    cause: Exception | None = None
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for source in sources:
            file = folder / source.file_name
            if file.is_file():  # another process was faster
                _check_hash(file, known_hash)
                return file
            expected = known_hash or _recorded(file)
            downloader = _Resuming(_beside(file, ".part"), progress=progress)
            try:
                pooch.retrieve(source.url, known_hash=expected, fname=file.name, path=folder, downloader=downloader)
            except _NotReceivedError as error:
                cause = error
                failures.append(f"{source.url} as {file.name!r} ({error})")
            except ValueError as error:
                cause, refused = error, True
                failures.append(f"{source.url} as {file.name!r} (its hash is not {expected!r})")
            else:
                _record(file, pooch.file_hash(str(file)))
                return file
    msg = (
        f"The data set {name!r} must lie in the folder {str(folder)!r} or be downloaded; received it from none of "
        f"{'; '.join(failures)}: put the file into the folder under such a name or as '{name}.h5ad', name another "
        f"folder with the environment variable {FOLDER_VARIABLE}, or pass `path=`."
    )
    raise (ValueError if refused else ConnectionError)(msg) from cause


class _NotReceivedError(Exception):
    """An address did not give the file; the text says why in few words."""


class _Resuming:
    """Downloader for pooch that keeps what arrived in ``part`` and continues there, now or in a later call.

    Beside ``part`` lie the address and the ETag or date that the server gave: a part of another file is thrown away.
    """

    def __init__(self, part: Path, *, progress: bool) -> None:
        self.part = part
        self.notes = _beside(part, ".json")
        self.progress = progress

    def __call__(self, url: str, output_file: str, _: object) -> None:
        while True:
            before = self._size()
            try:
                self._transfer(url)
                break
            except _NotReceivedError:
                if self._size() <= before:  # without new bytes there is no use in asking again
                    raise
        if not _is_data_file(self.part):
            self._discard()
            msg = "the answer is neither a whole HDF5 file nor a zip archive"
            raise _NotReceivedError(msg)
        self.notes.unlink(missing_ok=True)
        self.part.replace(output_file)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def _origin(self, url: str) -> dict[str, Any]:
        """Return what is known about the part; a part from another address is thrown away."""
        try:
            notes = json.loads(self.notes.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            notes = None
        if isinstance(notes, dict) and notes.get("url") == url:
            return notes
        self._discard()
        return {}

    def _transfer(self, url: str) -> None:
        import requests  # here, because importing it changes the filters of warnings

        notes, offset = self._origin(url), self._size()
        if offset and offset == notes["total"]:  # all had arrived when an earlier call was stopped
            return
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if notes["validator"]:
                headers["If-Range"] = notes["validator"]
        try:
            with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
                status = answer.status_code
                if status == _OK:
                    plain = answer.headers.get("Content-Encoding", "identity") == "identity"
                    total = int(answer.headers.get("Content-Length", 0)) if plain else 0  # 0: not known
                    self._discard()
                    self.notes.write_text(json.dumps({"url": url, "validator": _validator(answer), "total": total}))
                    self._write(answer, 0, total)
                    return
                if offset and status == _PARTIAL and _content_range(answer) == (offset, notes["total"]):
                    self._write(answer, offset, notes["total"])
                    return
        except requests.Timeout as error:
            msg = f"no answer within {_TIMEOUT:.0f} s"
            raise _NotReceivedError(msg) from error
        except requests.RequestException as error:
            text = str(error)
            msg = "not reachable" if "Max retries exceeded" in text else text
            raise _NotReceivedError(msg) from error
        if not (offset and status in (_PARTIAL, _BEYOND_THE_END)):
            msg = f"HTTP status {status}"
            raise _NotReceivedError(msg)
        self._discard()  # the file on the server is another one by now
        self._transfer(url)

    def _write(self, answer: Response, offset: int, total: int) -> None:
        size = {"total": total or None, "initial": offset, "unit": "B", "unit_scale": True}
        with (
            self.part.open("ab" if offset else "wb") as out,
            tqdm(desc=self.part.stem, disable=not self.progress, **size) as bar,
        ):
            for chunk in answer.iter_content(_CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
        if total and self._size() != total:
            msg = f"the connection ended after {self._size()} of {total} bytes"
            raise _NotReceivedError(msg)


def _is_data_file(file: Path) -> bool:
    """Whether a file is a zip archive or an HDF5 file with the length that its head states."""
    try:
        h5py.File(file, "r").close()
    except OSError:
        return zipfile.is_zipfile(file)
    return True


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _validator(answer: Response) -> str:
    """Return what makes a server notice that its file has changed; a weak ETag does not serve for ranges."""
    etag = answer.headers.get("ETag", "")
    return answer.headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag


def _content_range(answer: Response) -> tuple[int, int]:
    """Return start and total of ``Content-Range: bytes start-end/total``; anything else gives (-1, -1)."""
    unit, _, values = answer.headers.get("Content-Range", "").partition(" ")
    span, _, total = values.partition("/")
    start = span.partition("-")[0]
    return (int(start), int(total)) if unit == "bytes" and start.isdigit() and total.isdigit() else (-1, -1)


def _check_form(known_hash: str | None) -> None:
    """Raise ``ValueError`` for a hash that no file can have."""
    if known_hash is None:
        return
    algorithm, _, value = str(known_hash).rpartition(":")
    if len(value) != _HEX_DIGITS.get(algorithm or "sha256") or not set(value.lower()) <= set("0123456789abcdef"):
        msg = f"`known_hash` must be 'sha256:...', 'md5:...' or a bare SHA-256, with 64 or 32 hexadecimal digits; received {known_hash!r}."
        raise ValueError(msg)


def _check_hash(file: Path, known_hash: str | None) -> None:
    if known_hash is None:
        return
    algorithm, _, value = known_hash.rpartition(":")
    actual = pooch.file_hash(str(file), alg=algorithm or "sha256")
    if actual.lower() != value.lower():
        msg = f"The file must have the hash given as `known_hash`, {known_hash!r}; received {str(file)!r} with {actual!r}: remove the file or mend the hash."
        raise ValueError(msg)


def _record(file: Path, sha256: str) -> None:
    """Write the line that ``sha256sum --check`` reads."""
    _beside(file, ".sha256").write_text(f"{sha256}  {file.name}\n")


def _recorded(file: Path) -> str | None:
    record = _beside(file, ".sha256")
    return record.read_text().split()[0] if record.is_file() else None


def _check_recorded(file: Path, own: Sequence[Path]) -> None:
    """Compare a file with its record; without one it is written now, unless the name is the user's own."""
    recorded = _recorded(file)
    if recorded is None and file in own:
        return
    actual = pooch.file_hash(str(file))
    if recorded is None:
        with contextlib.suppress(OSError):  # a shared folder may be read-only
            _record(file, actual)
    elif actual != recorded:
        msg = (
            f"The file must be the one that was downloaded first, with the SHA-256 {recorded}; received {str(file)!r}, "
            f"which differs: remove it to download it again, or remove {_beside(file, '.sha256').name!r} if the change is meant."
        )
        raise ValueError(msg)


def _unpacked(archive: Path) -> Path:
    """Return the only data file of a zip archive, unpacked beside it once."""
    with zipfile.ZipFile(archive) as content:
        members = [info for info in content.infolist() if info.filename.endswith(_HDF5_MEMBERS)]
        if len(members) != 1:
            names = [info.filename for info in members]
            msg = f"An archive must hold one .h5ad or .h5mu file; received {str(archive)!r} with {names}: unpack it and pass `path=`."
            raise ValueError(msg)
        (member,) = members
        file = archive.with_name(f"{archive.stem}.unpacked{Path(member.filename).suffix}")
        newer = file.is_file() and file.stat().st_mtime >= archive.stat().st_mtime
        if not newer or file.stat().st_size != member.file_size:
            part = _beside(file, ".part")
            with content.open(member) as source, part.open("wb") as out:
                while chunk := source.read(_CHUNK):
                    out.write(chunk)
            part.replace(file)
    return file
