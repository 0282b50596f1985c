"""Writing files so that a killed run leaves either the old file or the new one, and text that every reader takes."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpsearch.errors import FileError, warn

#: Where systems list the open files of a process.
_DESCRIPTORS = re.compile(r"/dev/fd|/proc/(?P<process>\d+)(/task/\d+)?/fd")


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to be written inside; afterwards it is renamed over `path`, once it is on the disk.

    A link is followed: the file that it leads to is replaced. What is no file but takes bytes (a device, a pipe, an open file such as
    `/dev/stdout`) is written to.

    Raises:
        OSError: names `path`, where its folder does not exist, it is a folder itself, or it cannot be written whole.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    streams = _is_stream(path)
    part: Path | None = None
    try:
        handle, name = tempfile.mkstemp(
            dir=None if streams else target.parent, prefix=f".{target.name[:40]}.", suffix=".part"
        )
        os.close(handle)
        part = Path(name)
        yield part
        if streams:
            with _stream(path) as stream, part.open("rb") as file:
                shutil.copyfileobj(file, stream)
        else:
            sync(part)
            part.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
            part.replace(target)
    except OSError as error:
        if error.filename not in (None, str(path), str(part), str(target)):
            raise
        raise named(error, path) from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk.

    Raises:
        OSError: where the disk is full or fails.
    """
    if path.is_dir() and os.name == "nt":  # where folders are not opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse what `write_atomically` cannot write, before any work.

    Raises:
        OSError: for an empty name, a folder, a ring of links, or a file whose folder is not there or may not be written to.
    """
    _check_name(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as error:  # a ring of links, a file in place of a folder
        raise named(error, path) from None
    if stat.S_ISDIR(mode) or (not mode and os.fspath(path).endswith(os.sep)):
        raise _error(errno.EISDIR, path)
    if mode and (not stat.S_ISREG(mode) or _descriptor(path)):
        return
    _check_folder(Path(os.path.realpath(path) if os.path.islink(path) else path).parent)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be written to, or made, before any work.

    Raises:
        OSError: for an empty name, or with what is in the place of a folder.
    """
    _check_name(path)
    place = Path(path)
    if place.is_symlink() and not place.exists():
        raise _error(errno.ENOENT, path)
    _check_folder(next(part for part in (place, *place.absolute().parents) if part.exists()))


def _check_name(path: str | os.PathLike[str]) -> None:
    if not os.fspath(path):
        raise FileNotFoundError(errno.ENOENT, "an empty name, expected one to write to", "''")


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise _error(errno.ENOTDIR if path.exists() else errno.ENOENT, path)
    if not os.access(path, os.W_OK):
        raise _error(errno.EACCES, path)


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """True for what is there to be written to, and not to be replaced."""
    return bool(_descriptor(path)) or (os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode))


def _stream(path: str | os.PathLike[str]) -> io.BufferedWriter:
    descriptor = _descriptor(path)
    if descriptor is None or descriptor[0] not in ("", str(os.getpid())):
        return open(path, "wb")
    sys.stdout.flush()
    return open(os.dup(descriptor[1]), "wb")  # opened by its name, a file would be written from its start again


def _descriptor(path: str | os.PathLike[str]) -> tuple[str, int] | None:
    """Process and number of the open file that a path such as `/dev/stdout` stands for, or None."""
    place = os.path.abspath(path)
    for _ in range(40):  # as many links as systems follow
        folder, name = os.path.realpath(os.path.dirname(place)), os.path.basename(place)
        match = _DESCRIPTORS.fullmatch(folder)
        if match is not None and name.isdigit():
            return match["process"] or "", int(name)
        if not os.path.islink(place):
            return None
        place = os.path.join(folder, os.readlink(place))
    return None


def _error(code: int, path: str | os.PathLike[str]) -> OSError:
    return OSError(code, os.strerror(code), os.fspath(path))


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error of the file that was asked for: a full disk names none, a temporary file is not the user's."""
    code = error.errno or errno.EIO
    return OSError(code, error.strerror or os.strerror(code), os.fspath(path))


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it
    os.umask(mask)
    return mask


#: What formulas begin with.
_FORMULA = ("=", "+", "-", "@")


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    r"""Rows as CSV with lines ended by `\n`; a cell with a line break of any kind is quoted, so that every reader sees one cell.

    Warns:
        UserWarning: of the first name that a spreadsheet would take for a formula; it is written as it is, since other tools read it.

    >>> csv_text([["layer", "bits"], ["a\rb", 4], ["c, d", 8]])
    'layer,bits\n"a\rb",4\n"c, d",8\n'
    """
    text = io.StringIO(newline="")
    formulas: list[str] = []

    def seen() -> Iterator[Iterable[Any]]:
        for row in rows:
            cells = list(row)
            formulas.extend(cell for cell in cells if isinstance(cell, str) and cell.lstrip()[:1] in _FORMULA)
            del formulas[1:]
            yield cells

    csv.writer(_Lines(text), lineterminator="\r\n").writerows(seen())  # what ends lines is quoted in cells
    if formulas:
        warn(f"the name {formulas[0]!r} is written to CSV: a spreadsheet takes it for a formula")
    return text.getvalue()


class _Lines:
    r"""Takes rows that end in `\r\n`, and ends them in `\n`."""

    def __init__(self, text: io.StringIO) -> None:
        self._text = text

    def write(self, row: str) -> None:
        self._text.write(row[:-2] + "\n")


def csv_rows(text: str, first: int = 1) -> list[tuple[int, list[str]]]:
    r"""Rows of CSV with their lines; only `\n`, `\r\n` and `\r` outside quotes end one. Empty lines are left out.

    Args:
        text: of the rows.
        first: number of its first line.

    Raises:
        FileError: for a quote that is not closed, with the line.

    >>> csv_rows('a,b\n"1\u2028","2\n3"\n4,5\n')
    [(1, ['a', 'b']), (2, ['1\u2028', '2\n3']), (4, ['4', '5'])]
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, line = [], first
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = first + reader.line_num
    except csv.Error as error:
        raise FileError(f"line {line}: no CSV ({error})") from None
    return rows


def comment_lines(text: str) -> tuple[list[str], str]:
    """The two lines in front of a CSV file of ours, where the first begins with `#`, and the rest.

    >>> comment_lines("# mpsearch_table: 1\\n# {}\\nlayer,precision\\n")
    (['# mpsearch_table: 1', '# {}'], 'layer,precision\\n')
    """
    if not text.startswith("#"):
        return [], text
    first, _, rest = text.partition("\n")
    second, _, rest = rest.partition("\n")
    return [first.rstrip("\r"), second.rstrip("\r")], rest


def json_text(content: Any) -> str:
    """JSON, where a number that is not finite is null: JSON itself has neither nan nor infinity.

    >>> print(json_text({"gap": float("nan")}))
    {
     "gap": null
    }
    """
    return json.dumps(_finite(content), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
