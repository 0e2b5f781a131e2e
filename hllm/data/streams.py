"""A raw file as a stream of UTF-8: its compression and its encoding are read off its first bytes.

A name proves nothing: `log.csv.gz` may have been unpacked on its way, `log.csv` may be UTF-16. What cannot be
read is refused with the command that makes it readable.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from hllm.errors import DataError

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
UNPACK = {"gzip": "gzip -dc", "bz2": "bzip2 -dc", "zstd": "zstd -dc", "lz4": "lz4 -dc"}
FOREIGN = {
    b"PK\x03\x04": ("a zip archive", "unzip -p {name} > {plain}"),
    b"PK\x05\x06": ("an empty zip archive", ""),
    b"\xfd7zXZ": ("compressed with xz", "xz -dc {name} > {plain}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x {name}"),
    b"\xd0\xcf\x11\xe0": ("an Excel or Office file", ""),
    b"SQLite format 3": ("a SQLite database", ""),
    b"ORC": ("an ORC file", ""),
    b"Obj\x01": ("an Avro file", ""),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull"),
}
MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32)


def compression_of(path: Path) -> str | None:
    head = beginning(path)
    return next((kind for magic, kind in COMPRESSIONS.items() if head.startswith(magic)), None)


def refuse_foreign(path: Path, name: str) -> None:
    """
    Raises:
        DataError: the file's first bytes are those of another format.
    """
    head = beginning(path)
    for magic, (what, command) in FOREIGN.items():
        if head.startswith(magic):
            command = command.format(name=path.name, plain=f"unpacked-{path.stem}")
            remedy = f"Run: {command}" if command else "Export it as Parquet or CSV."
            raise DataError(f"is {what}", where=name, remedy=remedy)


def open_text(path: Path, name: str) -> pa.NativeFile:
    """The content of a text file, unpacked and in UTF-8 (a mark of UTF-8 at its beginning stays).

    Raises:
        DataError: it is another kind of file, or damaged.
    """
    refuse_foreign(path, name)
    compression = compression_of(path)
    with unpacking(path, name), pa.input_stream(str(path), compression=compression) as file:
        head = file.read(512)
    stream = pa.input_stream(str(path), compression=compression)
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return pa.transcoding_input_stream(stream, encoding, "utf-8")
    _refuse_unmarked_utf16(path, name, head)
    return stream


@contextmanager
def unpacking(path: Path, name: str) -> Iterator[None]:
    """Arrow's errors about a packed stream, as one sentence about the file."""
    try:
        yield
    except OSError as error:
        refuse_damaged(path, name, error)
        raise


def refuse_damaged(path: Path, name: str, error: BaseException) -> None:
    """
    Raises:
        DataError: `error` says that a compressed file cannot be unpacked.
    """
    kind = compression_of(path)
    if kind is None or not isinstance(error, OSError) or isinstance(error, UnicodeError):
        return
    said = " ".join(str(error).split())
    cut = "Truncated" in said
    what = "is cut off" if cut else f"is damaged, or ends in bytes that are not {kind}'s: {said[:200]}"
    remedy = (
        f"Copy it again from its source. `{UNPACK[kind]} {path.name} > /dev/null` tells when it is whole."
    )
    raise DataError(f"{what} ({kind})", where=name, remedy=remedy)


def refuse_other_encoding(path: Path, name: str) -> None:
    """
    Raises:
        DataError: the text is not UTF-8; with the line, the byte, and how to convert it.
    """
    line, decoder = 1, codecs.getincrementaldecoder("utf-8")()
    with open_text(path, name) as file:
        while True:
            try:
                chunk = file.read(1 << 20)
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except OSError as error:
                refuse_damaged(path, name, error)
                raise
            except UnicodeDecodeError as error:
                whole = error.object
                if error.encoding != "utf-8":  # Arrow's own decoder, of UTF-16
                    raise DataError(
                        f"is not {error.encoding} to its end: is it cut off?", where=name
                    ) from None
                line += whole[: error.start].count(b"\n")
                byte = f"line {line:,} holds the byte 0x{whole[error.start]:02x}"
                raise DataError(
                    f"is not UTF-8: {byte}", where=name, remedy=_convert(path, whole, error.start)
                ) from None
            if not chunk:
                return


def _refuse_unmarked_utf16(path: Path, name: str, head: bytes) -> None:
    """
    Raises:
        DataError: every other byte of the beginning is NUL: UTF-16 without its mark.
    """
    if len(head) < 8:
        return
    for start, kind in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        half, other = head[start::2], head[1 - start :: 2]
        if half.count(0) > 0.8 * len(half) and not other.count(0):
            raise DataError(f"is {kind}, not UTF-8", where=name, remedy=f"Convert it: {_iconv(path, kind)}")


def _convert(path: Path, text: bytes, at: int) -> str:
    near = text[max(0, at - 10_000) : at + 10_000]
    try:
        near.decode("cp1252")
        kind = "WINDOWS-1252"
    except UnicodeDecodeError:
        kind = "LATIN1"
    return (
        f"Convert it, if it is Western European text: {_iconv(path, kind)}\n"
        f"  If letters are wrong then, name its own encoding in place of {kind} (`iconv -l` lists them)."
    )


def _iconv(path: Path, kind: str) -> str:
    compression = compression_of(path)
    plain = path.name.removesuffix(path.suffix) if compression else path.name
    target = f"utf8-{plain}"
    if compression:
        return f"{UNPACK[compression]} {path.name} | iconv -f {kind} -t UTF-8 > {target}"
    return f"iconv -f {kind} -t UTF-8 {path.name} > {target}"


def texts(path: Path, name: str, size: int) -> Iterator[str]:
    """The text, `size` bytes at a time.

    Raises:
        DataError: it is damaged or not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open_text(path, name) as file:
        while True:
            try:
                chunk = file.read(size)
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                refuse_other_encoding(path, name)
                raise
            except OSError as error:
                refuse_damaged(path, name, error)
                raise
            if not chunk:
                return
            yield text


def is_parquet_inside(path: Path) -> bool:
    return beginning(path).startswith((b"PAR1", b"PARE"))
