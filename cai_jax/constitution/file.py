"""TOML into checked tables: what a file must hold, and the words for what it does not."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from cai_jax.errors import InputError

LARGEST = 5_000_000  # bytes of a file that a person wrote


def read_text(path: str | Path, wanted: str, largest: float = LARGEST) -> str:
    """A text file of at most so many bytes. Raises InputError that names it; wanted: what it should have been."""
    path = Path(path)
    if not path.is_file():
        what = f"{path} is a folder, a device or the like" if path.exists() else f"missing file: {path}"
        raise InputError(f"{what}; wanted {wanted}; paths are relative to where the command is run")
    if path.stat().st_size > largest:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes; wanted {wanted} of at most {largest:,}")
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); wanted {wanted}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); wanted {wanted} in UTF-8") from None


def read(path: str | Path) -> dict:
    """A file of TOML. Raises InputError that names it, and the line where it is not TOML."""
    try:
        return tomllib.loads(read_text(path, "a TOML file"))
    except RecursionError:
        raise InputError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # also of numbers with thousands of digits
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid TOML: {error}") from None


def texts(where: str, table: object, wanted: Sequence[str], others: Sequence[str] = ()) -> dict[str, str]:
    """The `wanted` keys of a TOML table as stripped text: all there, none empty, and no key besides them and `others`."""
    keys = (*wanted, *others)
    if not isinstance(table, dict):
        raise InputError(f"{where} is {shown(table)}; wanted a table with the keys {', '.join(keys)}")
    for key in table:
        if key not in keys:
            raise InputError(f"{where}: unknown key {key!r}{hint(key, keys)}; keys are {', '.join(keys)}")
    for key in wanted:
        if key not in table:
            raise InputError(f"{where}: key {key!r} is missing; wanted {', '.join(wanted)}")
        if not isinstance(table[key], str):
            raise InputError(f"{where}: {key} is {shown(table[key])}; wanted text in quotes")
        if not table[key].strip():
            raise InputError(f"{where}: {key} is empty; wanted text")
    return {key: table[key].strip() for key in wanted}


def tables(path: str | Path, doc: dict, name: str) -> list:
    """The `[[name]]` tables of a document, one or more."""
    found = doc.get(name, [])
    if not isinstance(found, list):
        raise InputError(f"{path}: {name} is {shown(found)}; wanted a list of tables, each headed [[{name}]]")
    if not found:
        raise InputError(f"{path}: no [[{name}]] table; wanted one or more")
    return found


def rows(path: str | Path, doc: dict, name: str, cls: type) -> list[dict[str, str]]:
    """The `[[name]]` tables of a document, each with exactly the fields of the dataclass `cls`."""
    labelled = ((f"{path}: {name} {i}{id_of(row)}", row) for i, row in enumerate(tables(path, doc, name), 1))
    return [texts(where, row, tuple(cls.__dataclass_fields__)) for where, row in labelled]


def id_of(row: object) -> str:
    return f" ({row['id']!r})" if isinstance(row, dict) and "id" in row else ""


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    if not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    try:
        text = repr(value[:60] if isinstance(value, str) else value)
    except ValueError:  # thousands of digits
        text = "of very many digits"
    return f"{type(value).__name__} {text if len(text) < 80 else text[:80] + ' ...'}"


def hint(key: str, known: Sequence[str] | Mapping) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
