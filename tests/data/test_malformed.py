"""Files as they arrive: every kind of damage ends in exactly the right rows or in an error with a sentence.

`KINDS` is the table: a name, the file's name and bytes, and either the events that are read from it or what
the refusal says. No kind ends in another exception, hangs, or loses a row.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sqlite3
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from pydantic import ValidationError

from hllm.data.readers import source_fingerprints
from hllm.errors import ConfigError, DataError
from hllm.settings import Settings
from tests.world import TinySource, run_steps, tiny_settings, write_csv

Events = list[tuple[str | None, str | None, int | None]]
T = 1_600_000_000
EVENTS: Events = [("u1", "a", T), ("ü2", "b", T + 1), ("u1", "b", T + 2)]
HEADER = "user_id,item_id,timestamp\n"
BODY = "".join(f"{user},{item},{time}\n" for user, item, time in EVENTS)
CSV = HEADER + BODY
LINES = "".join(
    json.dumps({"user_id": user, "item_id": item, "timestamp": time}, ensure_ascii=False) + "\n"
    for user, item, time in EVENTS
)


@dataclass(frozen=True)
class Kind:
    name: str
    file: str
    content: bytes | Callable[[Path], None]
    """The file's bytes, or what makes it (and others) at its path."""
    ends: Events | str
    """The events that are read, or a pattern of the refusal."""
    sets: dict[str, Any] = field(default_factory=dict)


def encodings() -> Iterator[Kind]:
    for kind, text in (("csv", CSV), ("jsonl", LINES)):
        for encoding in ("utf-8-sig", "utf-16", "utf-32"):
            yield Kind(f"{kind} in {encoding}", f"log.{kind}", text.encode(encoding), EVENTS)
        marked = b"\xfe\xff" + text.encode("utf-16-be")
        yield Kind(f"{kind} in utf-16-be with its mark", f"log.{kind}", marked, EVENTS)
        for encoding in ("utf-16-le", "utf-16-be"):
            says = f"is UTF-16{encoding[-2:].upper()}, not UTF-8[\\s\\S]*iconv -f UTF-16"
            yield Kind(f"{kind} in {encoding} without a mark", f"log.{kind}", text.encode(encoding), says)
        cut = text.encode("utf-16")[:-1]
        yield Kind(
            f"{kind} in utf-16, cut within a letter", f"log.{kind}", cut, "cut off|not UTF-8|not utf-16"
        )
        for name, wrong in {
            "latin-1": "ü".encode("latin-1"),
            "a byte that cp1252 lacks": b"\x81",
            "shift-jis": "ユ".encode("shift-jis"),
            "an overlong sequence": b"\xc0\x80",
            "a surrogate": b"\xed\xa0\xbd",
            "the last byte of a letter missing": "ü".encode()[:1],
        }.items():
            damaged = text.encode().replace("ü".encode(), wrong)
            says = r"is not UTF-8: line \d holds the byte 0x[\s\S]*iconv -f (WINDOWS-1252|LATIN1) -t UTF-8"
            yield Kind(f"{kind} with {name}", f"log.{kind}", damaged, says)
        packed = gzip.compress(text.encode("latin-1"))
        yield Kind(
            f"packed {kind} in latin-1", f"log.{kind}.gz", packed, r"not UTF-8[\s\S]*gzip -dc .* \| iconv"
        )
        yield Kind(f"{kind} of zeros", f"log.{kind}", bytes(5_000), "has no rows|is not JSON")
    yield Kind("csv that ends within a letter", "log.csv", CSV.encode() + b"u,a\xc3", "is not UTF-8")


def compressions() -> Iterator[Kind]:
    whole, more = CSV.encode(), f"u4,a,{T + 3}\n".encode()
    packers: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
        "gzip": ("gz", gzip.compress),
        "bz2": ("bz2", bz2.compress),
        "zstd": ("zst", lambda data: pa.Codec("zstd").compress(data, asbytes=True)),
        "lz4": ("lz4", lambda data: pa.Codec("lz4").compress(data, asbytes=True)),
    }
    for name, (ending, pack) in packers.items():
        packed, file = pack(whole), f"log.csv.{ending}"
        yield Kind(name, file, packed, EVENTS)
        yield Kind(f"{name} without the name", "log.csv", packed, EVENTS)
        yield Kind(f"{name} in name only", file, whole, EVENTS)
        yield Kind(f"{name} in two members", file, packed + pack(more), [*EVENTS, ("u4", "a", T + 3)])
        yield Kind(f"{name} cut off", file, packed[:-12], rf"is (cut off|damaged).*\({name}\)")
        yield Kind(f"{name} cut to its beginning", file, packed[:6], rf"is (cut off|damaged).*\({name}\)")
        yield Kind(f"{name} with rubbish behind it", file, packed + b"rubbish", rf"is damaged.*\({name}\)")
        broken = packed[:20] + bytes(len(packed[20:-8])) + packed[-8:]
        yield Kind(f"{name} with a damaged middle", file, broken, rf"is (cut off|damaged).*\({name}\)")
    yield Kind("gzip of another checksum", "log.csv.gz", gzip.compress(whole)[:-8] + bytes(8), "is damaged")
    yield Kind("gzip of nothing", "log.csv.gz", gzip.compress(b""), "has no rows")
    yield Kind("gzip within gzip", "log.csv.gz", gzip.compress(gzip.compress(whole)), "not UTF-8|no column")
    yield Kind("json lines in gzip", "log.jsonl.gz", gzip.compress(LINES.encode()), EVENTS)
    yield Kind(
        "json lines in a gzip cut off", "log.jsonl.gz", gzip.compress(LINES.encode())[:-9], "is cut off"
    )


def foreign() -> Iterator[Kind]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("log.csv", CSV)
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE log (user_id)")
    stored = database.serialize()
    database.close()
    for ending in ("csv", "jsonl", "parquet"):
        for name, content, says in (
            ("a zip archive", archive.getvalue(), r"is a zip archive[\s\S]*unzip -p"),
            ("an empty zip archive", empty.getvalue(), "is an empty zip archive"),
            ("xz", lzma.compress(CSV.encode()), r"is compressed with xz[\s\S]*xz -dc"),
            ("a SQLite database", stored, "is a SQLite database"),
            ("an LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", r"LFS[\s\S]*git lfs pull"),
            ("an Office file", b"\xd0\xcf\x11\xe0" + bytes(100), "is an Excel"),
            (
                "a page of HTML",
                b"<!DOCTYPE html><html><b>404</b></html>",
                "no rows|not JSON|cannot be read",
            ),
        ):
            yield Kind(f"{name}, named {ending}", f"log.{ending}", content, says)


def delimited() -> Iterator[Kind]:
    def csv(name: str, text: str | bytes, ends: Events | str, file: str = "log.csv") -> Kind:
        return Kind(f"csv: {name}", file, text.encode() if isinstance(text, str) else text, ends)

    yield csv("empty", "", "is an empty file")
    yield csv("white space", " \n \n", "has no column")
    yield csv("line ends only", "\n\n\n", "has no rows")
    yield csv("a header only", HEADER, "has no rows")
    yield csv("a header without its line end", HEADER.strip(), "has no rows")
    yield csv("no line end behind the last row", CSV.rstrip(), EVENTS)
    for name, other in {"semicolons": ";", "tabs": "\t", "bars": "|"}.items():
        yield csv(name, CSV.replace(",", other), EVENTS)
    yield csv("commas in a tsv", CSV, EVENTS, "log.tsv")
    yield csv("carets", CSV.replace(",", "^"), r"has no column 'user_id'[\s\S]*Its columns: user_id\^item_id")
    for name, other in {"CRLF": "\r\n", "CR": "\r"}.items():
        yield csv(name, CSV.replace("\n", other), EVENTS)
    yield csv("empty lines", CSV.replace("\n", "\n\n"), EVENTS)
    yield csv("a short row", CSV + "u,a\n", "Row #5: Expected 3 columns, got 2")
    yield csv("a long row", CSV + "u,a,b,1\n", "Row #5: Expected 3 columns, got 4")
    yield csv("a comma behind each row", CSV.replace("\n", ",\n"), EVENTS)
    yield csv(
        "a comma behind each row but the header", HEADER + BODY.replace("\n", ",\n"), "Expected 3 columns"
    )
    yield csv("a quote that is never closed", CSV + '"u,a,1\nu,a,2\n', "every quote closed")
    yield csv("a row longer than a block", CSV + f"{'x' * (5 << 20)},a,1\n" * 2, "row longer than 2 MiB")
    quoted = [("a,b", "a", T), ('say "x"', "a", T), ("two\nlines", "a", T)]
    text = f'"a,b",a,{T}\n"say ""x""",a,{T}\n"two\nlines",a,{T}\n'
    yield csv("quoted values", HEADER + text, quoted)
    yield csv("a quote within a value", HEADER + f'say "x",a,{T}\n', [('say "x"', "a", T)])
    yield csv("a quoted header", '"user_id","item_id","timestamp"\n' + BODY, EVENTS)
    yield csv("no header", BODY, "has no column 'user_id'")
    yield csv(
        "a column twice", CSV.replace("\n", ",x\n").replace(",x", ",user_id", 1), "2 columns named 'user_id'"
    )
    yield csv("a name in capitals", CSV.replace("user_id", "USER_ID"), "Did you mean 'USER_ID'")
    yield csv("a name with a space", CSV.replace(",item_id", ", item_id"), "Did you mean ' item_id'")
    yield csv("a name in another style", CSV.replace("item_id", "itemId"), "Did you mean 'itemId'")
    yield csv(
        "a column missing", "user_id,timestamp\nu,1\n", r"has no column 'item_id'[\s\S]*data.columns.item_id"
    )
    yield csv(
        "columns in another order", "".join(",".join(r.split(",")[::-1]) + "\n" for r in CSV.split()), EVENTS
    )
    yield csv("a column without a name", CSV.replace("\n", ",\n"), EVENTS)
    yield csv("JSON inside", LINES, "has no column")
    yield csv("a NUL in an id", HEADER + f"a\0b,a,{T}\n", [("a\0b", "a", T)])
    yield csv("nothing in a cell", HEADER + f",,{T}\n", [(None, None, T)])
    yield csv("names of nothing", HEADER + f"nan,NULL,{T}\n", [("nan", "NULL", T)])
    yield csv("spaces around ids", HEADER + f" u ,a,{T}\n", [(" u ", "a", T)])
    yield csv("an unknown ending", CSV, "neither .parquet nor .csv", "log.txt")
    yield csv("text named parquet", CSV, r"cannot be read as Parquet[\s\S]*name it .csv", "log.parquet")


def written(**columns: Any) -> bytes:
    whole = {
        "user_id": ["u1", "ü2", "u1"],
        "item_id": ["a", "b", "b"],
        "timestamp": [T, T + 1, T + 2],
    } | columns
    return table(pa.table(whole))


def table(content: pa.Table, **how: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(content, file, **how)
    return file.getvalue()


def parquets() -> Iterator[Kind]:
    def file(name: str, content: bytes, ends: Events | str, named: str = "log.parquet", **sets: Any) -> Kind:
        return Kind(f"parquet: {name}", named, content, ends, sets)

    whole = written()
    yield file("whole", whole, EVENTS)
    yield file("named csv", whole, EVENTS, "log.csv")
    yield file("empty", b"", "is an empty file")
    for share in (0.01, 0.3, 0.6, 0.9, 0.999):
        cut = whole[: max(4, int(len(whole) * share))]
        yield file(f"{share:.1%} of it", cut, "cannot be read as Parquet")
    yield file("its first bytes gone", whole[4:], "cannot be read as Parquet: it begins with")
    yield file("its last bytes gone", whole[:-4] + b"XXXX", "cannot be read as Parquet")
    yield file(
        "a footer of another length", whole[:-8] + b"\xff\xff\xff\x7fPAR1", "cannot be read as Parquet"
    )
    yield file("rubbish in the middle", whole[:60] + b"\xff" * 80 + whole[140:], "cannot be read as Parquet")
    yield file(
        "an encrypted footer", whole[:-4] + b"PARE", r"cannot be read as Parquet[\s\S]*without encryption"
    )
    nothing = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    yield file("no rows", table(nothing.empty_table()), "has no rows")
    bare = io.BytesIO()
    parquet.ParquetWriter(bare, nothing).close()
    yield file("no row groups", bare.getvalue(), "has no rows")
    strings = pa.StringArray.from_buffers(
        3,
        pa.array([b"u1", b"\xff\xfe", b"u1"]).buffers()[1],
        pa.array([b"u1", b"\xff\xfe", b"u1"]).buffers()[2],
    )
    yield file(
        "bytes that are not UTF-8", written(user_id=strings), "column user_id: is not UTF-8 somewhere in rows"
    )
    twice = pa.table([[1], [2], ["a"], [T]], names=["user_id", "user_id", "item_id", "timestamp"])
    yield file("a column twice", table(twice), "2 columns named 'user_id'")
    yield file(
        "a column in capitals",
        table(pa.table({"User_ID": ["u"], "item_id": ["a"], "timestamp": [T]})),
        "Did you mean 'User_ID'",
    )
    numbers = [("1", "a", T), ("2", "b", T + 1), ("1", "b", T + 2)]
    for kind in ("int8", "int64", "uint32", "float16", "float32", "float64", "string", "large_string"):
        column = pa.array([1, 2, 1] if "string" not in kind else ["1", "2", "1"]).cast(kind)
        yield file(f"ids as {kind}", written(user_id=column), numbers)
    decimals = [Decimal(1), Decimal(2), Decimal(1)]
    yield file("ids as decimals", written(user_id=pa.array(decimals, pa.decimal128(38, 0))), numbers)
    yield file(
        "ids as decimals with places", written(user_id=pa.array(decimals, pa.decimal128(20, 4))), numbers
    )
    yield file("ids as a dictionary", written(user_id=pa.array(["1", "2", "1"]).dictionary_encode()), numbers)
    yield file("ids as bytes", written(user_id=[b"1", b"2", b"1"]), numbers)
    for name, column, says in (
        ("float16 beyond its integers", pa.array([2049.0, 1.0, 1.0]).cast(pa.float16()), r"2\^11"),
        ("float32 beyond its integers", pa.array([2.0**24, 1, 1], pa.float32()), r"2\^24"),
        ("float64 beyond its integers", [2.0**53, 1.0, 1.0], r"2\^53"),
        ("fractions", [1.5, 2.0, 1.0], "with a fraction"),
        ("decimals with a fraction", [Decimal("1.5"), Decimal(1), Decimal(1)], "with a fraction"),
        ("infinity", [float("inf"), 1.0, 1.0], r"2\^53"),
        ("truth values", [True, False, True], "holds bool"),
        ("dates", [date(2024, 1, 1)] * 3, "holds date32"),
        ("times", [datetime(2024, 1, 1, tzinfo=UTC)] * 3, "holds timestamp"),
        ("durations", pa.array([1, 2, 3], pa.duration("s")), "holds duration"),
        ("lists", [["u"]] * 3, "holds list"),
        ("structs", [{"id": 1}] * 3, "holds struct"),
        ("fixed bytes", pa.array([bytes(16)] * 3, pa.binary(16)), r"fixed_size_binary[\s\S]*CAST"),
        ("bytes that are no text", [b"\xff"] * 3, "not UTF-8"),
    ):
        yield file(f"ids that are {name}", written(user_id=column), says)
    yield file("no id at all", written(user_id=pa.nulls(3)), [(None, item, time) for _, item, time in EVENTS])
    seconds = pa.array([T, T + 1, T + 2])
    for unit in ("s", "ms", "us", "ns"):
        typed = seconds.cast(pa.timestamp("s")).cast(pa.timestamp(unit))
        yield file(f"times typed as {unit}", written(timestamp=typed), EVENTS)
        many = [time * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit] for time in (T, T + 1, T + 2)]
        yield file(f"times in {unit}", written(timestamp=many), EVENTS, **{"data.timestamp_unit": unit})
    decimals = [Decimal(T), Decimal(T + 1), Decimal(T + 2)]
    yield file("times as decimals", written(timestamp=pa.array(decimals, pa.decimal128(38, 0))), EVENTS)
    far = [(user, item, T * 10**6) for user, item, _ in EVENTS]
    yield file(
        "nanoseconds typed as milliseconds",
        written(timestamp=pa.array([T * 10**9] * 3, pa.timestamp("ms"))),
        far,
    )
    yield file("times as floats", written(timestamp=[float(T), T + 1.0, T + 2.0]), EVENTS)
    yield file("times as truth values", written(timestamp=[True] * 3), "holds bool, not times")
    yield file("times as lists", written(timestamp=[[1]] * 3), "holds list.*not times")
    yield file("no time at all", written(timestamp=pa.nulls(3)), "no timestamp that can be read in any row")


def json_lines() -> Iterator[Kind]:
    def lines(name: str, text: str, ends: Events | str) -> Kind:
        return Kind(f"json lines: {name}", "log.jsonl", text.encode(), ends)

    def one(user: str, more: str = "") -> str:
        return f'{{"user_id": {user}, "item_id": "a", "timestamp": {T}{more}}}\n'

    yield lines("whole", LINES, EVENTS)
    yield lines("one array", "[" + ",".join(LINES.split("\n")[:-1]) + "]", EVENTS)
    yield lines("one object after another without a line end", LINES.replace("\n", ""), EVENTS)
    yield lines("empty lines", LINES.replace("\n", "\n\n"), EVENTS)
    yield lines("CR", LINES.replace("\n", "\r"), EVENTS)
    yield lines("commas behind the lines", LINES.replace("\n", ",\n"), "is not JSON")
    yield lines("cut off", LINES[:-6], "is not JSON")
    yield lines("an array cut off", "[" + ",".join(LINES.split("\n")[:-1]), "is not JSON")
    yield lines("an array with something behind it", "[" + one('"u"') + "] x", "something follows")
    yield lines("an empty array", "[]", "has no rows")
    yield lines("white space", " \n", "has no rows")
    yield lines("numbers", "1\n2\n", "record 1 is not a JSON object")
    yield lines("arrays", '["u", "a", 1]\n', "record 1 is not a JSON object")
    yield lines(
        "a record without a field", one('"u"') + '{"user_id": "v"}', [("u", "a", T), ("v", None, None)]
    )
    yield lines("no record with a field", '{"user_id": "u", "item_id": "a"}', "has no column 'timestamp'")
    yield lines(
        "a field in a later record only",
        '{"item_id": "a"}\n' + one('"u"'),
        [(None, "a", None), ("u", "a", T)],
    )
    yield lines("a field twice", one('"u"', ', "user_id": "v"'), "names a field twice")
    yield lines("a null", one("null"), [(None, "a", T)])
    yield lines("a number", one("7") + one("7.0") + one("70e-1") + one('"7"'), [("7", "a", T)] * 4)
    yield lines("a number that lost digits", one("1.5e18") + one("1"), "may be lost")
    yield lines("a number of 17 digits", one("12345678901234567"), [("12345678901234567", "a", T)])
    yield lines("a number of 5,000 digits", one("9" * 5000), [("9" * 5000, "a", T)])
    yield lines("a truth value", one("true"), [("true", "a", T)])
    yield lines("an object as an id", one('{"id": 1}'), "holds objects, not text")
    yield lines("deep arrays", one("[" * 5000 + "]" * 5000), "nested too deeply")
    yield lines("NaN", one("NaN"), "NaN is no JSON value")
    yield lines("Infinity", one("-Infinity"), "-Infinity is no JSON value")
    yield lines("half a character", one('"\\ud83d"'), "half a character")
    yield lines("a whole character in two escapes", one('"\\ud83d\\ude42"'), [("🙂", "a", T)])
    yield lines("a NUL", one('"a\\u0000b"'), [("a\0b", "a", T)])
    yield lines("a line break in a text", one('"a\nb"'), "is not JSON: Invalid control character")
    yield lines("single quotes", "{'user_id': 'u'}", "is not JSON")
    yield lines("a comment", "// log\n" + LINES, "is not JSON")
    yield lines("names without quotes", "{user_id: 1}", "is not JSON")
    yield lines("rubbish in the middle", LINES + "rubbish\n" + LINES, "is not JSON")
    yield lines("csv inside", CSV, "is not JSON")


def places() -> Iterator[Kind]:
    def folder(name: str, ends: Events | str, file: str = "log", **files: bytes | str) -> Kind:
        def make(path: Path) -> None:
            base = path.parent if "*" in path.name or "?" in path.name else path
            for inside, content in files.items():
                target = base / inside.replace("__", "/").replace("_dot_", ".")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content if isinstance(content, bytes) else content.encode())
            base.mkdir(exist_ok=True)

        return Kind(f"folder: {name}", file, make, ends)

    first, rest = HEADER + BODY.split("\n")[0] + "\n", HEADER + "\n".join(BODY.split("\n")[1:])
    yield folder("of csv parts", EVENTS, part2_dot_csv=rest, part1_dot_csv=first)
    yield folder("of partitions", EVENTS, dt1__p_dot_csv=first, dt2__p_dot_csv=rest)
    yield folder("of parquet", EVENTS * 2, a_dot_parquet=written(), b_dot_parquet=written())
    yield folder("named like a file", EVENTS, "log.csv", a_dot_csv=CSV)
    yield folder("with marks of Spark", EVENTS, a_dot_csv=CSV, _SUCCESS="", _dot_a_dot_csv_dot_crc="x")
    yield folder("of json lines", EVENTS, a_dot_jsonl=LINES)
    yield folder(
        "by a pattern", EVENTS, "part*.csv", part1_dot_csv=first, part2_dot_csv=rest, README_dot_md="x"
    )
    yield folder("by a pattern without a match", "matches no file", "part*.csv", other_dot_csv=CSV)
    yield folder("without files", "without any file of data")
    yield folder("with another file", r"neither Parquet.*1 of 2.*README", a_dot_csv=CSV, README_dot_md="x")
    yield folder("of two kinds", "several kinds", a_dot_csv=CSV, a_dot_parquet=written())
    yield folder("with an empty part", "b.csv: is an empty file", a_dot_csv=CSV, b_dot_csv="")
    yield folder(
        "whose second part lacks a column", "b.csv: has no column", a_dot_csv=CSV, b_dot_csv="user_id\nu\n"
    )
    yield folder(
        "whose second part is cut off",
        "b.parquet: cannot",
        a_dot_parquet=written(),
        b_dot_parquet=written()[:99],
    )
    mixed = [("1", "a", T), ("2", "b", T + 1), ("1", "b", T + 2)]
    yield folder(
        "whose ids become floats",
        mixed * 2,
        a_dot_parquet=written(user_id=[1, 2, 1]),
        b_dot_parquet=written(user_id=[1.0, 2.0, 1.0]),
    )
    yield folder(
        "whose ids begin with nothing",
        [(None, i, t) for _, i, t in EVENTS] + mixed,
        a_dot_parquet=written(user_id=pa.nulls(3)),
        b_dot_parquet=written(user_id=[1, 2, 1]),
    )

    yield Kind("no file", "log.csv", lambda path: None, "no such file")
    yield Kind(
        "a file as a folder",
        "log.csv/x.csv",
        lambda path: path.parent.write_text(CSV) and None,
        "no such file",
    )  # type: ignore[func-returns-value]
    yield Kind(
        "a link to itself", "log.csv", lambda path: path.symlink_to(path), "cannot be opened|no such file"
    )
    yield Kind("a link to nothing", "log.csv", lambda path: path.symlink_to("nowhere"), "no such file")
    yield Kind("a link to a file", "log.csv", _linked, EVENTS)
    yield Kind("a folder that holds itself", "log", _holds_itself, "links to folders")
    yield Kind("a pipe", "log.csv", lambda path: os.mkfifo(path), "is not a regular file")
    long = "is longer than a file system allows"
    yield Kind("a name that is too long", "x" * 300 + ".csv", lambda path: None, long)
    yield Kind("a NUL in the name", "a\0.csv", lambda path: None, "holds a (NUL|control) character")


def _linked(path: Path) -> None:
    path.with_name("real.csv").write_text(CSV)
    path.symlink_to("real.csv")


def _holds_itself(path: Path) -> None:
    path.mkdir()
    (path / "a.csv").write_text(CSV)
    (path / "again").symlink_to(path, target_is_directory=True)


def text_ids() -> Iterator[Kind]:
    def users(name: str, given: list[str], ends: list[str] | str) -> Kind:
        rows = "".join(f"{user},a,{T}\n" for user in given)
        found: Events | str = ends if isinstance(ends, str) else [(user, "a", T) for user in ends]
        return Kind(f"text ids: {name}", "log.csv", (HEADER + rows).encode(), found, {"data.batch_rows": 2})

    yield users("floats", ["1.0", "2.0"], ["1", "2"])
    yield users("floats midway", ["1", "2", "3", "1.0"], ["1", "2", "3", "1"])
    yield users("floats first", ["1.0", "2.0", "1", "2"], ["1", "2", "1", "2"])
    yield users("exponents", ["1e5", "1E+5", "100000", "1.0E5"], ["100000"] * 4)
    yield users("large exponents", ["1.5e+18", "1"], "may be lost")
    yield users("as spreadsheets round", ["1.23457E+11", "1"], "may be lost")
    yield users("large floats", ["9007199254740993.0", "1"], "may be lost")
    yield users("large floats midway among names", ["x", "y", "z", "1.5e+18"], "may be lost")
    yield users("17 digits", ["12345678901234567", "1"], ["12345678901234567", "1"])
    yield users("40 digits", ["9" * 40, "1.0"], ["9" * 40, "1"])
    yield users("leading zeros", ["007", "7", "07", "0"], ["007", "7", "07", "0"])
    yield users("leading zeros and floats", ["007", "8", "9.0", "1"], ["007", "8", "9.0", "1"])
    yield users("signs", ["+5", "5", "-5", "-0"], ["+5", "5", "-5", "-0"])
    yield users("hexadecimal", ["0x1F", "31", "1e5", "deadbeef"], ["0x1F", "31", "1e5", "deadbeef"])
    yield users("versions", ["1.0", "1.1", "2.0"], ["1.0", "1.1", "2.0"])
    yield users("versions midway", ["1.0", "2.0", "3.0", "1.1"], ["1.0", "2.0", "3.0", "1.1"])
    yield users("one number twice among names", ["x", "y", "1", "1.0"], "written in two ways")
    yield users("grouped digits", ["1_000", "1000", "1 000"], ["1_000", "1000", "1 000"])
    yield users("other digits", ["١٢", "12"], ["١٢", "12"])


def text_times() -> Iterator[Kind]:
    def times(name: str, cell: str, ends: int | str | None, unit: str = "iso") -> Kind:
        good = str(T) if unit != "iso" else "2020-09-13T12:26:40Z"
        content = f"{HEADER}u,a,{good}\nu,a,{cell}\n".encode()
        found: Events | str = ends if isinstance(ends, str) else [("u", "a", T), ("u", "a", ends)]
        return Kind(f"times: {name}", "log.csv", content, found, {"data.timestamp_unit": unit})

    for name, cell in {
        "Z": "2020-09-13T12:26:40Z",
        "a space": "2020-09-13 12:26:40",
        "UTC": "2020-09-13 12:26:40 UTC",
        "UTC and a fraction": "2020-09-13 12:26:40.250000 UTC",
        "GMT": "2020-09-13 12:26:40 GMT",
        "an offset": "2020-09-13T14:26:40+02:00",
        "an offset without a colon": "2020-09-13T14:26:40+0200",
        "an offset and a zone": "2020-09-13T14:26:40+02:00[Europe/Berlin]",
        "nanoseconds": "2020-09-13T12:26:40.123456789Z",
        "spaces around": "  2020-09-13T12:26:40Z ",
    }.items():
        yield times(name, cell, T)
    for cell in (
        "2020-09-13 14:26:40 CEST",
        "13.09.2020",
        "09/13/2020",
        "soon",
        "2020-02-30",
        "0000-00-00",
        "",
    ):
        yield times(f"iso: {cell or 'nothing'}", cell, None)
    for cell in ("soon", "inf", "1e400", "9" * 30, "0x10", "0X10", "", "NaN"):
        yield times(f"seconds: {cell or 'nothing'}", cell, None, "s")
    yield times("seconds with a fraction", f"{T}.75", T, "s")
    yield times("seconds with an exponent", "1.6e9", T, "s")
    for unit, cells, says in (
        ("s", ["2020-09-13 12:28:20 UTC"], r'set data.timestamp_unit = "iso"'),
        ("iso", ["1600000000"], r'seconds: set data.timestamp_unit = "s"'),
        ("iso", ["1600000000000"], r'milliseconds: set data.timestamp_unit = "ms"'),
        ("iso", ["1600000000000000000"], r'nanoseconds: set data.timestamp_unit = "ns"'),
        ("iso", ["13.09.2020"], r"Write them as ISO 8601"),
        ("s", ["13.09.2020 12:00"], r"Write them as ISO 8601"),
        ("s", ["1e999"], r"right column"),
    ):
        content = (HEADER + "".join(f"u,a,{cell}\n" for cell in cells)).encode()
        yield Kind(f"advice: {cells[0]} as {unit}", "log.csv", content, says, {"data.timestamp_unit": unit})


KINDS = [
    kind
    for group in (
        *(encodings, compressions, foreign, delimited, parquets, json_lines, places, text_ids, text_times),
    )
    for kind in group()
]


def test_the_table_is_long_and_says_everything_once() -> None:
    names = [kind.name for kind in KINDS]
    assert len(names) >= 150
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_file_is_read_exactly_or_refused(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    log = tmp_path / "in" / kind.file
    if callable(kind.content):
        kind.content(log)
    else:
        log.write_bytes(kind.content)
    items = write_csv(tmp_path / "items.csv", ["item_id", "title"], [("a", "A"), ("b", "B")])
    sets = {"data.columns": {"texts": ["title"]}} | kind.sets
    source = TinySource(items, log, [], [])
    if isinstance(kind.ends, str):
        with pytest.raises((DataError, ConfigError, ValidationError), match=kind.ends) as error:
            read(tiny_settings(tmp_path, source, **sets))
        assert "Traceback" not in str(error.value)
    else:
        assert read(tiny_settings(tmp_path, source, **sets)) == kind.ends


def read(settings: Settings) -> Events:
    """What `hllm ingest` does, the key of its output included."""
    source_fingerprints(settings.data)
    output = run_steps(settings, "ingest")
    found = parquet.read_table(output / "interactions.parquet", columns=["user_id", "item_id", "timestamp"])
    return [tuple(row.values()) for row in found.to_pylist()]  # type: ignore[misc]


AMAZON = {
    "a number of 5,000 digits": ('{"u": [' + "9" * 5000 + ', "3"]}', 2),
    "a huge exponent": ('{"u": [1e99999999999999999999]}', "not whole"),
    "a large exponent": ('{"u": [1e999]}', "may be lost"),
    "a float that lost digits": ('{"u": [1.5e18]}', "may be lost"),
    "a fraction": ('{"u": [1.5]}', "not whole"),
    "a truth value": ('{"u": [true]}', "true or false where an item's id"),
    "an array in an array": ('{"u": [["3"]]}', "an array where an item's id"),
    "an object in an array": ('{"u": [{"id": 3}]}', "an object where an item's id"),
    "a null": ('{"u": [null, "3"]}', 2),
    "deep arrays": ('{"u": ' + "[" * 20_000 + "]" * 20_000 + "}", "nested too deeply"),
    "deep objects": ('{"u": ' + '{"a":' * 20_000 + "1" + "}" * 20_000 + "}", "nested too deeply"),
    "deep arrays that end in nothing": ('{"u": ' + "[" * 500_000, "nested too deeply"),
    "NaN": ('{"u": [NaN]}', "NaN is no JSON value"),
    "half a character": ('{"u": ["\\ud83d"]}', "half a character"),
    "half a character in a user": ('{"\\ud83d": ["3"]}', "half a character"),
    "a user of nothing": ('{"": ["3"]}', 1),
    "a mark of UTF-8": ('\ufeff{"u": ["3"]}', 1),
    "JSON lines": ('{"u": ["3"]}\n{"v": ["3"]}\n', r"JSON lines[\s\S]*data.source"),
    "something behind it": ('{"u": ["3"]} x', "something follows"),
    "a comma too many": ('{"u": ["3",]}', "is not JSON"),
    "no quotes": ('{u: ["3"]}', "is not JSON"),
    "cut off": ('{"u": ["3"', "is not JSON"),
    "white space": ("  \n", "holds nothing"),
    "an array": ("[1]", "JSON array, not an object"),
    "a number": ("1", "is not JSON"),
    "nothing for a user": ('{"u": [], "v": ["3"]}', 1),
    "an empty object": ("{}", "has no rows"),
}


@pytest.mark.parametrize("name", AMAZON)
def test_an_amazon_log_is_read_exactly_or_refused(name: str, tmp_path: Path) -> None:
    log, ends = AMAZON[name]
    source = tmp_path / "toys"
    source.mkdir()
    (source / "Toys.inter.json").write_text(log)
    (source / "Toys.item.json").write_text('{"3": {"title": "Bear"}}')
    settings = Settings.model_validate(
        {"run": {"root": str(tmp_path / "runs")}, "data": {"source": "amazon", "path": str(source)}}
    )
    if isinstance(ends, str):
        with pytest.raises(DataError, match=ends):
            read(settings)
    else:
        assert len(read(settings)) == ends


def test_json_is_read_the_same_through_windows_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hllm.data.json_values import pairs

    whole = {f'k"{n}\\': ["ü🙂" * n, 10**n, {"a": [None, True, -1.5e-7]}] for n in range(12)}
    path = tmp_path / "x.json"
    for ascii_only in (True, False):
        path.write_text(json.dumps(whole, ensure_ascii=ascii_only, indent=1))
        for size in (1, 2, 3, 7, 64, 1 << 20):
            monkeypatch.setattr("hllm.data.json_values.WINDOW_BYTES", size)
            found = list(pairs(path, "x"))
            assert [key for key, _ in found] == list(whole)
            assert [value[0] for _, value in found] == [value[0] for value in whole.values()]
            assert [int(value[1]) for _, value in found] == [value[1] for value in whole.values()]
