# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of reports and of states: written atomically, and read as untrusted input."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec

from tracer.model.errors import MsrtraceError
from tracer.model.text import printable
from tracer.report import report, state_file
from tracer.report.report import Report
from tracer.report.state_file import StateFile

#: A report of 8,192 kinds of calls takes 2 MB.
SIZE_LIMIT = 32 << 20
#: What some editors and shells of Windows put in front of UTF-8.
BOM = b"\xef\xbb\xbf"
#: How compressed files begin, and what undoes it.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"PK\x03\x04": ("zip", "unzip"),
}


_T = TypeVar("_T", Report, StateFile)


@dataclass(frozen=True)
class Kind(Generic[_T]):
    """A kind of file: its schema with the major version, the type that defines it, and what it is called.

    `smaller`: how a user gets a smaller one.
    """

    schema: str
    type: type[_T]
    noun: str
    smaller: str


REPORT = Kind(report.SCHEMA, Report, "report", "trace one process (--pid)")
STATE = Kind(state_file.SCHEMA, StateFile, "state", "select VMs (--vm, --pid), or write text")
KINDS: tuple[Kind[Any], ...] = (REPORT, STATE)


class _Head(msgspec.Struct):
    schema: str


def encode(content: Report | StateFile) -> bytes:
    """The content as the text of a JSON file; indented, unless it could not be read back then.

    Raises MsrtraceError if it could not be read back at all.
    """
    compact = msgspec.json.encode(content)
    text = msgspec.json.format(compact, indent=1) + b"\n"
    if len(text) > SIZE_LIMIT:
        text = compact + b"\n"
    if len(text) > SIZE_LIMIT:
        kind = next(kind for kind in KINDS if isinstance(content, kind.type))
        size = f"{-(-len(text) >> 20)} MB as JSON, and files of more than {SIZE_LIMIT >> 20} MB cannot be read"
        raise MsrtraceError(f"the {kind.noun} takes {size}: {kind.smaller}")
    return text


def write(path: Path, text: bytes) -> None:
    """Write the file atomically: a reader sees the old content or the new, never a part.

    What exists and is not a regular file (a pipe, /dev/stdout) is written to directly. Raises MsrtraceError.
    """
    try:
        _refuse_planted(path)
        if _is_stream(path):
            with path.open("ab") as stream:  # standard output may be a file with something in it
                stream.write(text)
            return
        target = _resolved(path)  # a link stays one
        temporary = target.with_name(f".{target.name[:50]}.{token_hex(4)}")
        try:
            _write_new(temporary, text, target)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise _unwritable(path, error) from None


def _write_new(path: Path, text: bytes, like: Path) -> None:
    """Write a new file with the owner and the mode that the file `like` has, or would get. Raises OSError.

    Where the file system can do that, it has no name before it is whole: a process that is killed leaves nothing.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC
    with suppress(OSError), os.fdopen(os.open(path.parent, flags | os.O_TMPFILE, 0o600), "wb") as file:
        _fill(file, text, like)
        here = os.open("/proc/self/fd", os.O_PATH | os.O_CLOEXEC)  # with a directory, Python follows the link
        try:
            os.link(str(file.fileno()), path, src_dir_fd=here, follow_symlinks=True)
        finally:
            os.close(here)
        return
    with os.fdopen(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        _fill(file, text, like)


def _fill(file: BinaryIO, text: bytes, like: Path) -> None:
    file.write(text)
    # By its descriptor: whoever may write to the directory may put something else in the file's place.
    if like.exists():
        before = like.stat()
        with suppress(OSError):  # under sudo a user's file stays the user's
            os.fchown(file.fileno(), before.st_uid, before.st_gid)
        os.fchmod(file.fileno(), before.st_mode & 0o777)
    else:
        os.fchmod(file.fileno(), 0o666 & ~_umask())
    file.flush()
    os.fsync(file.fileno())


def check_writable(path: Path) -> None:
    """Raise the MsrtraceError that `write` would, as far as can be known before there is something to write."""
    try:
        _refuse_planted(path)
        if _is_stream(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        elif not (directory := _resolved(path).parent).is_dir():
            raise MsrtraceError(f"cannot write {path}: there is no directory {directory}")
        else:
            tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise _unwritable(path, error) from None


def _refuse_planted(path: Path) -> None:
    """Refuse what another user has put there, in a directory like /tmp: a link, a pipe, a file that would stay theirs.

    So do fs.protected_symlinks and fs.protected_regular where a file is opened for writing, which it is not here.
    Raises MsrtraceError, or OSError.
    """
    with suppress(FileNotFoundError):
        directory, found = path.parent.stat(), path.lstat()
        everybodys = directory.st_mode & stat.S_ISVTX and directory.st_mode & stat.S_IWOTH
        if everybodys and found.st_uid not in (os.geteuid(), directory.st_uid):
            raise MsrtraceError(
                f"cannot write {path}: it belongs to another user, and everybody may create files in {path.parent}"
            )


def _resolved(path: Path) -> Path:
    """The path without links, as the kernel follows them. Raises OSError, also for a loop of them."""
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:  # or a link to what is not there
        return Path(os.path.realpath(path))
    try:
        return Path(os.readlink(f"/proc/self/fd/{opened}"))
    finally:
        os.close(opened)


def _is_stream(path: Path) -> bool:
    """Whether the path is there and not a regular file, or names an open one, as /dev/stdout and /proc/self/fd/1 do."""
    if not path.exists():
        return False
    directory = path.parent.resolve()
    return not path.is_file() or directory == Path("/dev") or Path("/proc") in directory.parents


def _unwritable(path: Path, error: OSError) -> MsrtraceError:
    return MsrtraceError(f"cannot write {path}: {error.strerror or error}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: Path) -> Report:
    """The report in a file, as `read_as`."""
    return read_as(REPORT, path)


def read_as(kind: Kind[_T], path: Path) -> _T:
    """What is in a file of a kind, or on standard input if the path is `-`.

    Unknown fields are ignored. Raises MsrtraceError, in one line, for anything but that kind in this major version.
    """
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(SIZE_LIMIT + 1)
        else:
            with path.open("rb") as file:
                data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise MsrtraceError(f"cannot read {path}: {error.strerror}") from None
    try:
        return decode_as(kind, data)
    except MsrtraceError as error:
        raise MsrtraceError(f"{'standard input' if str(path) == '-' else path} {error}") from None


def decode(data: bytes) -> Report:
    """The report in a JSON text, as `decode_as`."""
    return decode_as(REPORT, data)


def decode_as(wanted: Kind[_T], data: bytes) -> _T:
    """What is in a JSON text of a kind. Raises MsrtraceError, whose message is to follow the name of the file."""
    noun = wanted.noun
    if len(data) > SIZE_LIMIT:
        raise MsrtraceError(f"is larger than any {noun} ({SIZE_LIMIT >> 20} MB)")
    data = data.removeprefix(BOM)
    if not data.strip():
        raise MsrtraceError("is empty")
    if encoding := _other_encoding(data):
        raise MsrtraceError(f"is {encoding} text, and {noun}s are UTF-8: convert it with iconv -f {encoding} -t UTF-8")
    if other := _other_kind(data, noun):
        raise MsrtraceError(other)
    try:
        schema = msgspec.json.decode(data, type=_Head).schema
    except msgspec.ValidationError as error:
        raise MsrtraceError(f"is not an msrtrace {noun}: {_plain(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = "" if data.lstrip().startswith((b"{", b"[")) else f"; {noun}s are read in JSON (-o NAME.json)"
        raise MsrtraceError(f"is not JSON: {_plain(error)}{hint}") from None
    (kind, _, major), (own, _, own_major) = schema.partition("/"), wanted.schema.partition("/")
    other = next((one.noun for one in KINDS if one is not wanted and one.schema.partition("/")[0] == kind), "")
    if other:
        raise MsrtraceError(f"is not an msrtrace {noun} but a {other} ({_short(schema)})")
    if kind != own:
        raise MsrtraceError(f"is not an msrtrace {noun}: its schema is {_short(schema)}")
    if major != own_major:
        raise MsrtraceError(f"is a {noun} of another version ({_short(schema)}); this msrtrace reads {wanted.schema}")
    try:
        return msgspec.json.decode(data, type=wanted.type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MsrtraceError(f"is a damaged {noun}: {_plain(error)}") from None


def _other_encoding(data: bytes) -> str | None:
    """The name of the encoding of a JSON text that is not UTF-8, as PowerShell's `>` writes UTF-16; else None."""
    encoding = json.detect_encoding(data)
    try:
        known = data[: 1 << 10].decode(encoding)  # a whole number of characters
    except UnicodeDecodeError:
        return None
    if encoding.startswith("utf-8") or not known.lstrip().startswith("{"):
        return None
    return encoding.upper().replace("-LE", "LE").replace("-BE", "BE")


def _other_kind(data: bytes, noun: str) -> str:
    """What a file is that is recognisably no JSON, as the end of a sentence; else ""."""
    for start, (name, undo) in _COMPRESSED.items():
        if data.startswith(start):
            return f"is compressed ({name}): use {undo} first"
    if data[: 1 << 10].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return f"is an HTML page: {noun}s are read in JSON (-o NAME.json)"
    return ""


def _plain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return _short(" ".join(str(error).split()), 300)


def _short(text: str, limit: int = 60) -> str:
    """Text from a file, made printable and cut."""
    return printable(text, limit)


def schema(kind: Kind[Any] = REPORT) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a kind of file, made from its types."""
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": kind.schema}
    made: dict[str, Any] = title | _normalized(msgspec.json.schema(kind.type))
    return made


def _normalized(part: Any) -> Any:
    """A part of a schema as every msgspec and every Python makes it: alternatives sorted, docstrings not indented."""
    if isinstance(part, list):
        return [_normalized(item) for item in part]
    if not isinstance(part, dict):
        return part
    made = {name: _normalized(value) for name, value in part.items()}
    if "anyOf" in made:
        made["anyOf"].sort(key=json.dumps)
    if isinstance(made.get("description"), str):
        made["description"] = re.sub(r"\n +", "\n", made["description"])
    return made


if __name__ == "__main__":
    print(json.dumps(schema(STATE if "state" in sys.argv[1:] else REPORT), indent=1))
