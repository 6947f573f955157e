"""Lines of text, streamed: from plain, compressed and Parquet files, one or many, or a data set of the hub."""

import gzip
import importlib
import io
import re
import zlib
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from xdistil.files import hash_file

KINDS = (".tsv", ".txt", ".gz", ".zst", ".parquet")  # what is read of a folder
HUB = re.compile(r"hub:([^:/]+(?:/[^:/]+)?)(?:/([^:/]+))?(?::(\w+(?:\[[^]]*\])?))?(?::(.+))?")
AT_ONCE = 10_000  # rows that are taken out of a Parquet file or data set together
TEXT = re.compile(r"(large_)?string(_view)?|dictionary<values=(large_)?string.*")  # types of columns


class DataError(ValueError):
    """A data file is missing, empty or malformed; the message names file and line."""


def files_of(path) -> list[Path]:
    """The files that a path names, sorted: itself, those of KINDS in a folder, or those that match a glob. What starts
    with "hub:" is one. Raises DataError if a folder or glob has none."""
    path, found = Path(path), []
    if path.is_dir():
        found = [x for x in path.iterdir() if x.suffix in KINDS and x.is_file() and not x.name.startswith(".")]
    elif path.exists() or HUB.fullmatch(str(path)) or not set(str(path)) & set("*?["):
        return [path]
    found = sorted(found or (x for x in map(Path, glob(str(path), recursive=True)) if x.is_file()))
    if not found:
        raise DataError(f"{path}: no file there; expected one or more of {', '.join(KINDS)}")
    return found


def facts_of(path) -> list[dict]:
    """Name, bytes and sha256 (16 hex digits) of each file that a path names; of a data set of the hub its name, which
    stands for its text. Raises DataError if one is absent."""
    facts = []
    for file in files_of(path):
        if HUB.fullmatch(str(file)):
            return [{"file": str(file)}]
        if not file.is_file():
            next(read_lines(file))
        facts.append({"file": file.name, "bytes": file.stat().st_size, "sha256": hash_file(file)})
    return facts


def read_lines(path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without their ends, of one file of any kind; "-" is stdin. A row of a Parquet file
    or data set is a line `text[<TAB>language]`: of its column `text`, or its only text column, and its column
    `language`. Raises DataError if it is missing, damaged, cut short or not UTF-8, and for want of a package."""
    path, number = Path("/dev/stdin" if str(path) == "-" else path), 0
    if hub := HUB.fullmatch(str(path)):
        yield from enumerate(_data_set(str(path), *hub.groups()), 1)
        return
    if not path.exists() or path.is_dir():
        there = sorted(p.name for p in path.parent.glob("*.tsv"))
        raise DataError(f"{path}: no such file; {path.parent} holds {there or 'no .tsv file'}")
    try:
        if path.suffix == ".parquet":
            for number, line in enumerate(_parquet(path), 1):  # noqa: B007
                yield number, line
            return
        with _open(path) as handle:
            for number, line in enumerate(handle, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: invalid UTF-8 at byte {error.start + 1} of the line; save the file as "
                        "UTF-8") from None
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: Arrow's
        raise DataError(f"{path}:{number + 1}: not readable from here on ({error}); the file is damaged, cut short or "
                        "gone, fetch it again") from None


def _need(module: str, source, extra: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise DataError(f"{source}: reading it needs {package}; pip install xdistil[{extra}]") from None


def _open(path: Path):
    if path.suffix == ".zst":  # Arrow's reader, unlike others, tells where a frame is cut short
        return io.BufferedReader(_need("pyarrow", path, "parquet").input_stream(str(path), compression="zstd"))
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _text_column(source, types: dict[str, str], asked: str | None = None) -> str:
    texts = [name for name, kind in types.items() if TEXT.fullmatch(kind) and name != "language"]
    column = asked or ("text" if "text" in texts or len(texts) != 1 else texts[0])
    if column not in texts:
        raise DataError(f"{source}: no text column {column!r}, it has {types}; expected one named text, or only one")
    return column


def _parquet(path: Path) -> Iterator[str]:
    with _need("pyarrow.parquet", path, "parquet").ParquetFile(path) as file:
        types = {field.name: str(field.type) for field in file.schema_arrow}
        column = _text_column(path, types)
        for batch in file.iter_batches(AT_ONCE, columns=[column, *{"language"} & set(types)]):
            yield from _as_lines(batch.to_pydict(), column)


def _data_set(source: str, name: str, config: str | None, split: str | None, column: str | None) -> Iterator[str]:
    datasets = _need("datasets", source, "hub")
    try:
        rows = datasets.load_dataset(name, config, split=split or "train")  # downloaded once, then read from disk
    except Exception as error:
        raise DataError(f"{source}: {type(error).__name__}: {error}; expected hub:NAME[/CONFIG][:SPLIT[:COLUMN]] of a "
                        "data set that the hub, or its cache here, has") from None
    column = _text_column(source, {name: getattr(x, "dtype", "") for name, x in rows.features.items()}, column)
    for start in range(0, len(rows), AT_ONCE):
        yield from _as_lines(rows[start : start + AT_ONCE], column)


def _as_lines(columns: dict[str, list], column: str) -> Iterator[str]:
    """Rows as lines: white space within a text, tabs and ends of lines too, becomes single spaces."""
    texts = (" ".join((text or "").split()) for text in columns[column])
    languages = columns.get("language") or [""] * len(columns[column])
    return (f"{text}\t{language}" if language else text for text, language in zip(texts, languages, strict=True))
