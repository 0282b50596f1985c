"""Files of one folder that belong together: all of one saving, or all of the one before."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from mpsearch.errors import PlanError
from mpsearch.files.writing import check_folder, named, sync

#: Folders inside: files that are being written, and those that are written and count.
_BEGUN, _WRITTEN = ".saving.", ".saved"
#: What a killed saving of older versions left behind.
_OLD = ".passes."


def hash_of(data: bytes) -> str:
    """By which a file is known again.

    >>> hash_of(b""), hash_of(b"a") == hash_of(b"b")
    ('cae66941d9efbd404e4d88758ea67670', False)
    """
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class FileSet:
    """The files of one saving in a folder, tied by an index: a JSON object with their hashes under `files`.

    They are written into a folder inside, read back and held against what was to be written; one renaming of that folder makes them
    the ones that count; then they are moved to their places. A run killed before the renaming leaves the files of before, one killed
    after it leaves the new ones, some in their places and the rest where they were written: `place` looks there first, the next
    `write` moves them.

    Args:
        folder: of the files.
        index: name of the file that ties the others, moved last.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = FileSet(folder, "index.json")
    ...     files.write({"a/b": b"1", "index.json": json.dumps({"files": {"a/b": hash_of(b"1")}}).encode()})
    ...     files.read("a/b", {"a/b": hash_of(b"1")}), sorted(os.listdir(folder))
    (b'1', ['a', 'index.json'])
    """

    def __init__(self, folder: str | os.PathLike[str], index: str) -> None:
        self.folder, self.index = Path(folder), index

    def place(self, name: str) -> Path:
        """Where a file is."""
        written = self.folder / _WRITTEN / name
        return written if written.is_file() else self.folder / name

    def read(self, name: str, hashes: Mapping[str, str] | None) -> bytes:
        """Content of a file of this saving.

        Args:
            name: of the file.
            hashes: of all files, as the index has them; None where an older version wrote none.

        Raises:
            PlanError: for a file of another saving, or one that was changed since.
            OSError: where it is missing or cannot be read.
        """
        data = self.place(name).read_bytes()
        if hashes is not None and hashes.get(name) != hash_of(data):
            raise PlanError(
                f"{self.place(name)} was not saved with {self.place(self.index)}: its hash is {hash_of(data)}, expected "
                f"{hashes.get(name)}; the files of two results are mixed, or this one was changed"
            )
        return data

    def write(self, files: Mapping[str, bytes]) -> None:
        """Put files in the place of those of an earlier saving, of which those that there are no more are removed.

        Args:
            files: name -> content, the index among them.

        Raises:
            OSError: names the file that cannot be written, or is not whole; then all files are still those of before.
        """
        check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._move()
        for folder in [*self.folder.glob(f"{_BEGUN}*"), *self.folder.glob(f"{_OLD}*")]:
            shutil.rmtree(folder)
        begun = Path(tempfile.mkdtemp(dir=self.folder, prefix=_BEGUN))
        try:
            for name, data in files.items():
                self._write(begun, name, data)
            for folder in {(begun / name).parent for name in files}:
                sync(folder)
            begun.rename(self.folder / _WRITTEN)
        except BaseException:
            shutil.rmtree(begun, ignore_errors=True)
            raise
        sync(self.folder)
        self._move()

    def _write(self, begun: Path, name: str, data: bytes) -> None:
        place = self.folder / name
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
        try:
            (begun / name).parent.mkdir(parents=True, exist_ok=True)
            (begun / name).write_bytes(data)
            sync(begun / name)
            stored = (begun / name).read_bytes()
        except OSError as error:
            raise named(error, place) from None
        if stored != data:
            raise OSError(
                errno.EIO, f"not whole on the disk: {len(stored)} bytes of {len(data)}, or others", str(place)
            )

    def _move(self) -> None:
        """Bring files that count to their places."""
        written = self.folder / _WRITTEN
        if not written.is_dir():
            return
        if (written / self.index).is_file():  # then the index in its place is that of the saving before
            for name in self._names(self.folder / self.index) - self._names(written / self.index):
                (self.folder / name).unlink(missing_ok=True)
        paths = [path for path in written.rglob("*") if path.is_file()]
        for path in sorted(paths, key=lambda path: path == written / self.index):
            target = self.folder / path.relative_to(written)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        shutil.rmtree(written)

    def _names(self, index: Path) -> set[str]:
        """Files that an index ties, as far as it can be read; none outside the folder."""
        try:
            names = json.loads(index.read_bytes())["files"].keys()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return set()
        return {name for name in names if is_inside(name)}


def is_inside(name: str) -> bool:
    """True for the relative name of a file that lies inside its folder.

    >>> [is_inside(name) for name in ("a/b", "../a", "/a", "")]
    [True, False, False, False]
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not Path(name).drive
