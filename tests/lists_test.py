"""List files, as people and programs write them: what is in one is read as it was meant, or told."""

import os
import re
import unicodedata
from pathlib import Path

import pytest
from helpers import listed, tree, written
from hypothesis import given, settings
from hypothesis import strategies as st

from mfm_jax.data import list_text, listing
from mfm_jax.data.listing import Problem
from mfm_jax.errors import UserError

BOM = "\ufeff"


def refusal(root: Path, text: str | bytes, name: str = "train.txt") -> str:
    """Returns the one line that a list is refused with, without the folder's path."""
    with pytest.raises(UserError) as caught:
        listing.lists(root, written(root, text, name))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{root}/", "").replace(str(root), "pets")


def outcome(root: Path, text: str | bytes, name: str = "train.csv") -> listing.Listing | str:
    """Returns the listing of a list, or why it is refused."""
    try:
        return listing.lists(root, written(root, text, name))
    except UserError as error:
        return str(error)


def told(found: listing.Listing) -> dict[str, str]:
    return {path.removeprefix("train."): reason for path, reason in found.problems}


# What a list may look like


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfcat/a.jpg 0\ndog/a.jpg 1\n",
        b"cat/a.jpg 0\r\n\r\n  \r\ndog/a.jpg 1\r\n",
        b"cat/a.jpg 0\rdog/a.jpg 1\r",
        b"cat/a.jpg 0\r\r\ndog/a.jpg 1\r\r\n",
        b"# made by hand\n# path label\ncat/a.jpg 0\ndog/a.jpg 1",
        b"\n\ncat/a.jpg 0\n# the dogs\n#\n## all of them\ndog/a.jpg 1",
        "cat/a.jpg 0\ndog/a.jpg 1\n".encode("utf-16"),
        (BOM + "cat/a.jpg 0\ndog/a.jpg 1\n").encode("utf-16-le"),
        (BOM + "cat/a.jpg 0\r\ndog/a.jpg 1\r\n").encode("utf-16-be"),
        (BOM + "cat/a.jpg 0\n" + BOM + "dog/a.jpg 1\n").encode(),
        b"./cat//a.jpg 0\ndog/../dog/a.jpg 1\n",
        b"cat\\a.jpg 0\n.\\dog\\a.jpg 1\n",
        b"\tcat/a.jpg\t0\t\n  dog/a.jpg   1  \n",
        b"cat/a.jpg 0,\ndog/a.jpg 1,\n",
        b'"cat/a.jpg" "0"\n"dog/a.jpg" 1\n',
        b'path,label\n"cat/a.jpg",0\ndog/a.jpg,1\n',
        b"path,label\rcat/a.jpg,0\rdog/a.jpg,1",
        b"\n\n# by hand\n\npath,label\ncat/a.jpg,0\n# dogs, all of them\n,\ndog/a.jpg,1\n",
        b"sep=;\r\npath;label\r\ncat/a.jpg;0\r\ndog/a.jpg;1\r\n",
        b'"sep=|"\npath|label\ncat/a.jpg|0\ndog/a.jpg|1\n',
        b"SEP=\t\nlabel\tpath\n0\tcat/a.jpg\n1\tdog/a.jpg\n",
        b"path,label,\ncat/a.jpg,0,\ndog/a.jpg,1,,,\n",
        b"\xef\xbb\xbfLabel;Path\r\n0;cat/a.jpg\r\n1;dog/a.jpg\r\n",
        b"path\tlabel\ncat/a.jpg\t0\ndog/a.jpg\t1\n",
        b' LABEL , "Path"\n0, "cat/a.jpg"\n 1 ,dog/a.jpg\n',
        b'note,label,path\n"a, ""fine"" one",0,cat/a.jpg\n"5"" wide",1,dog/a.jpg\n',
        b'"note, long";path;label\n"a; b";cat/a.jpg;0\na, b;dog/a.jpg;1\n',
        b"#,path,label\n1,cat/a.jpg,0\n2,dog/a.jpg,1\n",
        b"path,label,notes\ncat/a.jpg,0,gr\xfcn\ndog/a.jpg,1,\n",
        "path,label\ncat/a.jpg,0\ndog/a.jpg,1\n".encode("utf-16"),
    ],
)
def test_lists_as_programs_write_them(pets, text):
    found = listing.lists(pets, written(pets, text))
    assert listed(found) == [("cat/a.jpg", "cat", "train"), ("dog/a.jpg", "dog", "train")]
    assert found.problems == ()


CSV = "path,label,note\ncat/a.jpg,cat,\ncat/b.jpg,cat,\ndog/a.jpg,dog,\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CSV + "dog/b.jpg,dog,nice, big\n", "csv:5: 4 cells under 3 columns; a cell with ',' in it needs quotes"),
        (CSV + "dog/b.jpg,nice, big,dog\n", "csv:5: 4 cells under 3 columns"),
        (CSV + 'dog/b.jpg,dog,"nice" big\n', "csv:5: a quote within a quoted cell; write it twice"),
        (CSV + 'dog/b.jpg,dog",\n', "csv:5: a quote without its pair"),
        (CSV + 'dog/b"1.jpg,dog,\n', "csv:5: a quote without its pair"),
        (CSV + "dog/b.jpg\n", "csv:5: not understood: no label"),
        (CSV + ",dog,\n", "csv:5: not understood: no path"),
        (CSV + "#dog/b.jpg,dog,\n", "csv:5: no such file: #dog/b.jpg; a comment has a space after its #"),
        (CSV + "Dog/B.jpg,dog,\n", "csv:5: no such file: Dog/B.jpg; is dog/b.jpg meant?"),
        (CSV + "dog/b.JPG,dog,\n", "csv:5: no such file: dog/b.JPG; is dog/b.jpg meant?"),
        (CSV + "C:\\dog\\b.jpg,dog,\n", "csv:5: no such file: C:\\dog\\b.jpg; paths are relative to data.root"),
        (CSV + "..\\dog\\b.jpg,dog,\n", "csv:5: leaves data.root: ..\\dog\\b.jpg"),
        (
            CSV.encode() + b"dog/\xfc.jpg,dog,\n",
            "csv:5: no such file: dog/\udcfc.jpg; the line is not written in UTF-8",
        ),
        (CSV + "dog/./a.jpg,dog,\n", "csv:5: dog/a.jpg is listed a second time: train.csv:4"),
        (CSV + "/".join("a" * 2000) + ",dog,\n", "csv:5: no such file: a/a"),
        (CSV + "a" * 5000 + ".jpg,dog,\n", "csv:5: no such file: aa"),
    ],
)
def test_a_row_that_may_be_meant_otherwise_is_told(pets, text, reason):
    found = listing.lists(pets, written(pets, text, "train.csv"))
    last = found.problems[-1]
    assert f"{last.path}: {last.reason}".startswith(f"train.{reason}")
    assert "dog/b.jpg" not in found.paths
    assert len(found.paths) + len(found.problems) == 4


def test_in_a_plain_list_the_label_is_the_last_word(tmp_path):
    root = tree(tmp_path, "a b/c d.jpg", "e/f.jpg", "g.jpg")
    found = listing.lists(root, written(root, "a b/c d.jpg 0\ne/f.jpg\t1\ng.jpg great auk\n"))
    assert found.paths == ("a b/c d.jpg", "e/f.jpg")
    assert told(found)["txt:3"].endswith("of several words needs a CSV file")


def test_a_hash_may_begin_a_path(tmp_path):
    root = tree(tmp_path, "a.jpg", "#b.jpg")
    assert listing.lists(root, written(root, "#b.jpg 1\n# names\na.jpg 0\n#\n")).paths == ("#b.jpg", "a.jpg")


def test_a_backslash_may_be_part_of_a_name(tmp_path):
    root = tree(tmp_path, "a\\b.jpg", "a/b.jpg")
    assert listing.lists(root, written(root, "a\\b.jpg 0\na/b.jpg 1")).paths == ("a/b.jpg", "a\\b.jpg")


def test_absolute_paths_inside_the_root_are_fine(pets):
    found = listing.lists(pets, written(pets, f"{pets}/cat/a.jpg 0\ndog/a.jpg 1"))
    assert found.paths == ("cat/a.jpg", "dog/a.jpg")


def test_the_root_may_be_reached_by_another_name(pets, tmp_path):
    (tmp_path / "link").symlink_to(pets)
    found = listing.lists(tmp_path / "link", written(pets, f"{pets}/cat/a.jpg 0\n{tmp_path}/link/dog/a.jpg 1"))
    assert found.paths == ("cat/a.jpg", "dog/a.jpg")


# What is refused

NO_FILE = "data.train_list = 'train.txt': "
NO_CSV = "data.train_list = 'train.csv': "
COLUMNS = "; a CSV file needs the columns path and label"
ENCODING = " is not written in UTF-8; save the list as UTF-8"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", NO_FILE + "holds no line of the form `path label`"),
        ("# nothing\n\n", NO_FILE + "holds no line of the form `path label`"),
        ("", NO_CSV + "holds no line of the form `path label`"),
        ("path,label\n", NO_CSV + "holds no line of the form `path label`"),
        (
            "cat/a.jpg\ndog/a.jpg",
            NO_FILE + "holds no line of the form `path label`; not usable: 2, the first train.txt:1: not understood: no"
            " label",
        ),
        ("file,label\ncat/a.jpg,0", NO_CSV + "its first line is 'file,label'" + COLUMNS),
        ("\n# x\ncat/a.jpg,0", NO_CSV + "its first line is 'cat/a.jpg,0'" + COLUMNS),
        ("sep=;\ncat/a.jpg;0", NO_FILE + "its first line is 'cat/a.jpg;0'" + COLUMNS),
        ("sep=;\npath,label\n", NO_FILE + "its first line is 'path,label'" + COLUMNS),
        ("path,label,Path\n", NO_CSV + "line 1: two columns are called path; rename one of them"),
        ("\nlabel;label;path\n", NO_CSV + "line 2: two columns are called label; rename one of them"),
        ("group,path,label,GROUP\n", NO_CSV + "line 1: two columns are called group; rename one of them"),
        (
            "kat/a.jpg 0\nhond/a.jpg 1",
            "data.root = 'pets': none of the 2 listed pictures is there; not usable: 2, the first train.txt:1: no such"
            " file: kat/a.jpg",
        ),
        ("cat/a.jpg 0\ncat/b.jpg 0", NO_FILE + "names fewer than two classes"),
        (
            "cat/a.jpg 0\nhond/a.jpg 1",
            NO_FILE + "names fewer than two classes; not usable: 1, the first train.txt:2: no such file: hond/a.jpg",
        ),
        ("path,label\n" + "x" * 200_000 + ",0", NO_CSV + "line 2: field larger than field limit (131072)"),
        ("cat/a.jpg cat\ndog/a.jpg gr\xfcn".encode("latin-1"), NO_FILE + "line 2: 'gr\xfcn'" + ENCODING),
        ("path,label,group\n\ncat/a.jpg,cat,\xe9t\xe9\n".encode("latin-1"), NO_CSV + "line 3: '\xe9t\xe9'" + ENCODING),
        (
            "cat/a.jpg 0\ndog/a.jpg 1\n".encode("utf-16-le"),
            NO_FILE + "line 1: a null character, as in UTF-16 without a byte order mark or in what is no text; save the"
            " list as UTF-8",
        ),
        ((BOM + "cat/a.jpg 0").encode("utf-16-be") + b"\x00", NO_FILE + "begins as UTF-16, but goes on"),
        ((BOM + "cat/a.jpg 0\n").encode("utf-32"), NO_FILE + "line 1: a null character"),
        (b"cat/a.jpg 0\n\0\0\0\0\0\0\0\ndog/a.jpg 1", NO_FILE + "line 2: a null character"),
        (b"PK\x03\x04\x14\0\x06\0", NO_CSV + "line 1: a null character"),
    ],
)
def test_what_a_list_does_not_tell_is_refused(pets, text, reason):
    said = refusal(pets, text, "train.csv" if reason.startswith(NO_CSV) else "train.txt")
    assert said == reason if not reason.endswith(("goes on", "character")) else said.startswith(reason)


def test_a_latin_1_list_of_folders_is_blamed_and_not_the_folder(tmp_path):
    root = tree(tmp_path, "gr\xfcn/a.jpg", "rot/a.jpg")
    found = listing.lists(root, written(root, "gr\xfcn/a.jpg 0\nrot/a.jpg 1".encode("latin-1")))
    assert told(found)["txt:1"] == (
        "no such file: gr\udcfcn/a.jpg; the line is not written in UTF-8: save the list as UTF-8"
    )


def test_a_list_that_is_not_there_is_refused(pets):
    with pytest.raises(UserError, match=r"data\.val_list = '.*none.txt': No such file or directory"):
        listing.lists(pets, {**written(pets, "cat/a.jpg 0\ndog/a.jpg 1"), "val": pets / "none.txt"})


# Quotes

QUOTED = ("path", "label", "group", "note")
ROWS = [{"path": f"c{i % 3}/{i:03}.jpg", "label": f"c{i % 3}", "group": f"g{i}", "note": "fine"} for i in range(120)]


def as_csv(rows: list[dict[str, str]], columns: tuple[str, ...] = QUOTED, separator: str = ",", end: str = "\n") -> str:
    return end.join([separator.join(columns), *(separator.join(row[name] for name in columns) for row in rows), ""])


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return tree(tmp_path_factory.mktemp("many"), *(row["path"] for row in ROWS))


@pytest.mark.parametrize("column", QUOTED)
@pytest.mark.parametrize("columns", [QUOTED, QUOTED[::-1], ("note", "label", "path", "group")])
@pytest.mark.parametrize("form", [(",", "\n"), (";", "\r\n"), ("\t", "\r")])
def test_a_quote_that_is_left_open_is_refused_with_its_line(many, column, columns, form):
    rows = [dict(row) for row in ROWS]
    rows[30][column] = '"' + rows[30][column]
    reason = "line 32: a quote opens a cell that does not end on this line; close it, and write each row in one line"
    assert refusal(many, as_csv(rows, columns, *form), "train.csv") == NO_CSV + reason
    rows[60][column] += '"'  # closes it: the rows between would be one cell
    assert refusal(many, as_csv(rows, columns, *form), "train.csv") == NO_CSV + reason


def test_a_quote_that_is_left_open_in_a_header_is_refused(many):
    text = 'path,label,"note' + as_csv(ROWS, QUOTED[:2])[len("path,label") :].replace("c0\n", 'c0,"\n', 1)
    assert ": line 1: a quote opens a cell" in refusal(many, text, "train.csv")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_every_row_is_read_or_told_whatever_marks_it_meets(many, data):
    """A list with up to four marks at random places is refused, or each of its rows is used, or named by its line."""
    rows = ROWS[:12]
    text = as_csv(rows, tuple(data.draw(st.permutations(QUOTED))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(text.index("\n") + 1, len(text)))
        text = text[:place] + data.draw(st.sampled_from(['"', '""', ",", ';"', '",', "\t", " ", "#"])) + text[place:]
    found = outcome(many, text)
    if isinstance(found, str):
        assert re.search(r": line \d+: a quote opens a cell", found)
        return
    lines = {int(problem.path.rpartition(":")[2]) for problem in found.problems if ":" in problem.path}
    lines |= {i for i, line in enumerate(text.split("\n"), 1) if re.match(r"#(\s|#|$)", line)}
    for number, row in enumerate(rows, 2):
        assert row["path"] in found.paths or number in lines, (text, number)


LINES = st.text(st.sampled_from('ab"",,;#\t \u00e9\u2028\x0b\x1c\x85'), max_size=8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(LINES, max_size=8), st.sampled_from(["\n", "\r", "\r\n"]), st.sampled_from(["path,label,note", ""]))
def test_lines_add_up(many, lines, end, header):
    """Of any text: a line is what is read, or blank, or a comment; no two are one, and none is two."""
    file = written(many, end.join([header, *lines]), "random.txt")["train"]
    try:
        found = [line.number for line in list_text.read(file, "data.train_list")]
    except UserError:
        assert header
        assert any('"' in line for line in lines)
        return
    empty = r"[\s,]*" if header else r"\s*"
    passed = [
        i for i, line in enumerate(lines, 2) if re.fullmatch(rf"{empty}|#([\s#].*)?", line.replace('""', ""), re.DOTALL)
    ]
    assert sorted(found + passed) == list(range(2, len(lines) + 2))


# Numbers and names


@pytest.mark.parametrize(
    ("labels", "names", "problem"),
    [
        ("0 1 2", "0 1 2", ""),
        ("2019 2020 2021", "2019 2020 2021", ""),
        ("0 7 A", "0 7 A", ""),
        ("007 012 115", "007 012 115", ""),
        ("00 01 02", "00 01 02", ""),
        ("1 2 3", "1 2 3", ""),
        ("2 10 9", "2 9 10", ""),
        ("b 10 9", "10 9 b", ""),
        ("-1 1", "-1 1", ""),
        ("0 1 2 3 4 5 6 7 8 9 X", "0 1 2 3 4 5 6 7 8 9 X", ""),
        ("0 1 1 2 2 2 A A A", "0 1 2 A", ""),
        (
            "0 1 3",
            "0 1 2 3",
            "txt: no training picture of class 2; whole numbers from 0 count the classes: leave none out",
        ),
        ("0 1 2 -1 -1 -1", "0 1 2", "txt:4: label -1 is negative"),
        ("0 0 0 1 1 1 l", "0 1", "txt:7: label 'l' is no whole number, as the others are"),
        ("0 0 0 1 1 1 01", "0 1", "txt:7: label '01' is no whole number, as the others are"),
        ("0 0 0 1 1 1 99", "0 1", "txt:7: label 99 is out of range for 3 different labels"),
        ("7 012 115", "012 115 7", "txt:1: label '7' is shorter than others that begin with 0"),
        ("00 0 01 1", "0 00 01 1", "txt:2: label '0' is shorter than others"),
        ("MARCH1 2-Sep DEC1", "2-Sep DEC1 MARCH1", "txt:2: label '2-Sep' is a date, and other labels are not"),
        ("a 01/02/2019 b", "01/02/2019 a b", "txt:2: label '01/02/2019' is a date"),
        ("2019-01-01 2019-01-02", "2019-01-01 2019-01-02", ""),
        ("TRUE FALSE", "FALSE TRUE", ""),
        ("TRUE unsure FALSE", "FALSE TRUE unsure", "txt:1: label 'TRUE' is a truth value"),
        ("1.0 2.0", "1.0 2.0", ""),
        ("1 1.5 2.0", "1 1.5 2.0", ""),
        ("1.0 two", "1.0 two", "txt:1: label '1.0' is a number with a fraction or an exponent"),
        ("2.31E+13 23A", "2.31E+13 23A", "txt:1: label '2.31E+13' is a number with a fraction or an exponent"),
        ("#N/A cat dog", "#N/A cat dog", "txt:1: label '#N/A' is a value that is missing"),
        ("cat nan", "cat nan", "txt:2: label 'nan' is a value that is missing"),
    ],
)
def test_whole_numbers_are_names_unless_they_are_exactly_those_of_classes(tmp_path, labels, names, problem):
    root = tree(tmp_path, *(f"{i}.jpg" for i in range(len(labels.split()))))
    text = "".join(f"{i}.jpg {label}\n" for i, label in enumerate(labels.split()))
    found = listing.lists(root, written(root, text))
    assert found.class_names == tuple(names.split())
    reasons = [f"{path}: {reason}" for path, reason in found.problems]
    assert any(reason.startswith(f"train.{problem}") for reason in reasons) if problem else not reasons


def test_lists_of_numbers_are_called_as_their_folders(pets):
    files = written(pets, "dog/a.jpg 0\ncat/a.jpg 1\n") | {"test": written(pets, "cat/b.jpg 1", "test.txt")["train"]}
    found = listing.lists(pets, files)
    assert found.class_names == ("dog", "cat")
    assert listed(found) == [("cat/a.jpg", "cat", "train"), ("cat/b.jpg", "cat", "test"), ("dog/a.jpg", "dog", "train")]
    assert found.problems == ()


def test_numbers_stay_the_names_where_folders_do_not_tell_them(pets):
    found = listing.lists(pets, written(pets, "dog/a.jpg 0\ncat/a.jpg 1\ncat/b.jpg 0"))
    assert found.class_names == ("0", "1")
    assert found.labels.tolist() == [1, 0, 0]


def test_words_are_names_in_alphabetical_order(pets):
    found = listing.lists(pets, written(pets, "cat/a.jpg zebra\ncat/b.jpg ant\ndog/a.jpg ant\n"))
    assert (found.class_names, found.labels.tolist()) == (("ant", "zebra"), [1, 0, 0])


@pytest.mark.parametrize(
    ("train", "test", "missing"),
    [
        ("0 1", "1 2", "2; all lists count the classes from 0"),
        ("1 2", "0 1", "0; all lists count the classes from 0"),
        ("cat dog", "dog emu", "emu"),
        ("cat dog", "0 1", "0, 1"),
    ],
)
def test_classes_of_one_list_that_training_lacks_are_named(pets, train, test, missing):
    files = written(pets, "cat/a.jpg {}\ncat/b.jpg {}".format(*train.split()))
    files |= {"test": written(pets, "dog/a.jpg {}\ndog/b.jpg {}".format(*test.split()), "test.txt")["train"]}
    assert told(listing.lists(pets, files))["txt"].startswith(f"no training picture of class {missing}")


def test_a_picture_in_two_splits_is_kept_from_training(pets):
    files = written(pets, "cat/a.jpg 0\ncat/b.jpg 0\ndog/a.jpg 1\ndog/b.jpg 1")
    files |= {"val": written(pets, "cat/a.jpg 0\ndog/a.jpg 1", "val.txt")["train"]}
    files |= {"test": written(pets, "cat/a.jpg 0", "test.txt")["train"]}
    found = listing.lists(pets, files)
    assert [row[::2] for row in listed(found)] == [
        ("cat/a.jpg", "test"),
        ("cat/b.jpg", "train"),
        ("dog/a.jpg", "val"),
        ("dog/b.jpg", "train"),
    ]
    assert found.problems == (
        Problem("train.txt:1", "cat/a.jpg is listed in train and test: test.txt:1"),
        Problem("train.txt:3", "dog/a.jpg is listed in train and val: val.txt:2"),
        Problem("val.txt:1", "cat/a.jpg is listed in val and test: test.txt:1"),
    )


def test_a_picture_that_two_lists_label_otherwise_is_left_out(pets):
    files = written(pets, "cat/a.jpg cat\ncat/b.jpg cat\ndog/a.jpg dog")
    files |= {"test": written(pets, "./cat\\a.jpg dog", "test.txt")["train"]}
    found = listing.lists(pets, files)
    assert found.paths == ("cat/b.jpg", "dog/a.jpg")
    assert found.problems == (
        Problem("test.txt:1", "cat/a.jpg has another label elsewhere"),
        Problem("train.txt:1", "cat/a.jpg has label dog at test.txt:1"),
    )


# Names that look the same


@pytest.mark.parametrize("listed_form", ["NFC", "NFD"])
@pytest.mark.parametrize("form_on_disk", ["NFC", "NFD"])
def test_a_name_is_found_in_either_form_of_unicode(tmp_path, listed_form, form_on_disk):
    files = ("caf\xe9/\xe5.jpg", "\u1ec7/a.jpg", "tea/\xe9/b.jpg")
    root = tree(tmp_path, *(unicodedata.normalize(form_on_disk, file) for file in files))
    text = "path,label,group\ncaf\xe9/\xe5.jpg,caf\xe9,\xe9\n\u1ec7/a.jpg,cafe\u0301,e\u0301\ntea/\xe9/b.jpg,tea,\n"
    found = listing.lists(root, written(root, unicodedata.normalize(listed_form, text), "train.csv"))
    assert sorted(found.paths) == sorted(unicodedata.normalize(form_on_disk, file) for file in files)
    assert (found.class_names, found.problems) == (("caf\xe9", "tea"), ())
    assert len(set(found.groups)) == 2


def test_of_two_forms_on_the_disk_the_listed_one_counts(tmp_path):
    root = tree(tmp_path, "\xe9.jpg", "e\u0301.jpg", "\u1ec7.jpg", "e\u0323\u0302.jpg", "b.jpg")
    found = listing.lists(root, written(root, "e\u0301.jpg 0\nb.jpg 1\n\u1eb9\u0302.jpg 1"))
    assert found.paths == ("b.jpg", "e\u0301.jpg")
    assert told(found) == {"txt:3": "no such file: \u1eb9\u0302.jpg"}  # a third form: which of the two is meant?
    found = listing.lists(root, written(root, "e\u0301.jpg 0\nb.jpg 1\n\xe9.jpg 1"))
    assert found.paths == ("b.jpg", "e\u0301.jpg", "\xe9.jpg")


def test_a_file_that_is_listed_in_two_forms_is_listed_twice(tmp_path):
    root = tree(tmp_path, "\xe9.jpg", "b.jpg")
    found = listing.lists(root, written(root, "\xe9.jpg 0\nb.jpg 1\ne\u0301.jpg 0"))
    assert told(found) == {"txt:3": "\xe9.jpg is listed a second time: train.txt:1"}


def test_a_disk_that_takes_capitals_for_small_letters_has_one_name_for_a_file(pets, monkeypatch):
    monkeypatch.setattr(os.path, "lexists", lambda path: os.path.exists(str(path).lower()))  # as such a disk answers
    found = listing.lists(pets, written(pets, "cat/a.jpg 0\nDog/A.jpg 1\nCAT/a.JPG 0\ncat/C.jpg 0"))
    assert found.paths == ("cat/a.jpg", "dog/a.jpg")
    assert told(found) == {
        "txt:3": "cat/a.jpg is listed a second time: train.txt:1",
        "txt:4": "no such file: cat/C.jpg",
    }


def test_spaces_about_a_label_are_no_part_of_it(pets):
    text = "path,label\ncat/a.jpg, cat\ncat/b.jpg,cat\u00a0\ndog/a.jpg,\u3000dog \n"
    found = listing.lists(pets, written(pets, text, "train.csv"))
    assert (found.class_names, found.problems) == (("cat", "dog"), ())


def test_labels_that_look_the_same_are_told(pets):
    found = listing.lists(pets, written(pets, "path,label\ncat/a.jpg,cat\ncat/b.jpg,Cat\ndog/a.jpg,c\u200bat", "l.csv"))
    assert [(name, reason.partition(";")[0]) for name, reason in found.problems] == [
        ("cat", "a class that looks like 'Cat', itself 'cat'"),
        ("c\u200bat", "a class that looks like 'Cat', itself 'c\\u200bat'"),
    ]


def test_names_that_are_not_utf_8_are_found(tmp_path):
    root = tree(tmp_path, "cat/a.jpg", "dog/a.jpg")
    os.close(os.open(os.fsencode(root) + b"/cat/\xff.jpg", os.O_CREAT))
    found = listing.lists(root, written(root, b"cat/\xff.jpg 0\ndog/a.jpg 1"))
    assert [os.fsencode(path) for path in found.paths] == [b"cat/\xff.jpg", b"dog/a.jpg"]
