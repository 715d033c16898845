"""Records survive a kill at any byte, errors name the line, and nothing vanishes uncounted."""

import json

import pytest

from cai_jax import records
from cai_jax.errors import InputError
from cai_jax.records import Drops, Journal

ITEMS = [
    {"key": "a/0", "text": "plain"},
    {"key": "a/1", "text": "two\nlines\r\n and \u2028 a separator, {braces}, <b>, é and 漢字"},
    {"key": "b/0", "text": "", "p": 0.73},
]


def read_error(path, required=()):
    with pytest.raises(InputError) as e:
        records.read(path, required)
    return str(e.value)


def test_write_then_read_gives_the_same_records_one_a_line(tmp_path):
    path = tmp_path / "x.jsonl"
    records.write(path, ITEMS)
    assert records.read(path) == ITEMS
    assert path.read_bytes().count(b"\n") == len(ITEMS)
    assert "漢字".encode() in path.read_bytes()  # readable as it lies


def test_empty_lines_and_windows_line_ends_are_no_records(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "a"}\r\n\n  \n{"id": "b"}')
    assert records.read(path) == [{"id": "a"}, {"id": "b"}]


def test_a_missing_file_is_named(tmp_path):
    assert f"missing file: {tmp_path / 'x.jsonl'}" in read_error(tmp_path / "x.jsonl")


def test_every_truncation_of_a_file_names_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    records.write(path, ITEMS)
    whole = path.read_bytes()
    second, third = (i + 1 for i, byte in enumerate(whole[:-1]) if byte == 10)
    for cut in range(second + 1, third - 1):  # also in the middle of a character of several bytes
        path.write_bytes(whole[:cut])
        message = read_error(path)
        assert message.startswith(f"{path}:2: not a JSON record") and "truncated?" in message


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("[1, 2]", ":2: wanted a JSON object, got list"),
        ('"text"', ":2: wanted a JSON object, got str"),
        ("{'id': 1}", ":2: not a JSON record"),
        ('{"other": 1}', ":2: the record lacks 'id'; it has ['other']"),
        ("\udcff", ":2: not a JSON record (not UTF-8)"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, wanted):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a"}\n' + line + "\n", encoding="utf-8", errors="surrogateescape")
    assert f"{path}{wanted}" in read_error(path, ("id",))


# The journal


def process(path, items) -> dict:
    """What one process does that is killed after it added the items it did not find. -> what it found."""
    journal = Journal(path)
    found = dict(journal.done)
    journal.add([i for i in items if i["key"] not in found])
    assert journal.done.keys() == found.keys() | {i["key"] for i in items}
    journal._file.close()  # what the end of a process does
    return found


def test_a_journal_read_again_holds_what_was_added(tmp_path):
    path = tmp_path / "stage" / "journal.jsonl"
    assert process(path, ITEMS[:2]) == {}
    assert list(process(path, ITEMS).values()) == ITEMS[:2]
    assert process(path, []) == {i["key"]: i for i in ITEMS}
    Journal(path).remove()
    assert not path.exists() and process(path, []) == {}


def test_what_was_added_is_in_the_file_at_once(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(ITEMS)
    assert records.read(journal.path) == ITEMS  # a kill may come now
    journal.remove()


def test_lesson_12_a_journal_cut_at_any_byte_keeps_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "journal.jsonl"
    process(path, ITEMS)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = process(path, ITEMS)  # what was cut is done again
        assert list(found.values()) == ITEMS[: whole[:cut].count(b"\n")]
        assert path.read_bytes() == whole  # no line twice, none half, in the order of the work


# Counting


def test_lesson_17_kept_and_dropped_add_up_by_reason():
    drops = Drops()
    kept = [x for x in range(10) if drops.keep(x % 3 > 0, "multiple of three") and drops.keep(x < 8, "too large")]
    assert kept == [1, 2, 4, 5, 7]
    assert drops.counts(10, 5) == {"given": 10, "kept": 5, "dropped": {"multiple of three": 4, "too large": 1}}
    assert json.loads(json.dumps(drops.counts(10, 5))) == drops.counts(10, 5)


@pytest.mark.parametrize("given, kept", [(11, 5), (10, 6), (10, 4)])
def test_lesson_17_a_record_that_vanishes_uncounted_stops_the_stage(given, kept):
    drops = Drops()
    for _ in range(5):
        drops.keep(False, "empty")
    with pytest.raises(AssertionError, match=f"{given} in, {kept} kept, .*'empty': 5"):
        drops.counts(given, kept)
