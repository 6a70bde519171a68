"""`wc -l` of the passages that the scripts write, and of the other formats, is the number of passages in the index."""

import csv
import gzip

import pytest

import prepare_corpus
import prepare_wikipedia
from atlas.index.directory import read_description
from tests.kit import read_jsonl, run_on, write_jsonl
from tests.test_prepare_wikipedia import page, pages, write_dump

pytestmark = pytest.mark.processes

# What ends a line for some readers but not for `wc -l`, and what needs quotes.
ODD = 'Next line\x85 line separator\u2028 paragraph\u2029 f\x0c v\x0b tab\t "quotes" \\n comma, no\u200b.\r\n\r\nEnd'


def newlines(path):
    """What `wc -l` counts."""
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).count(b"\n")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Files of passages by name."""
    home = tmp_path_factory.mktemp("corpora")
    dump = write_dump(
        home / "dump.xml.bz2", [*pages(5), page(99, "Odd \u2028 title", ODD.replace("\x0c", "").replace("\x0b", ""))]
    )
    prepare_wikipedia.prepare([dump], home / "wiki", 100, 1, None)
    (home / "documents").mkdir()
    (home / "documents/odd.txt").write_bytes(ODD.encode())
    (home / "documents/long.md").write_text("# Long\n\n" + "This sentence is here again and again. " * 60)
    prepare_corpus.prepare(home / "documents", home / "folder.jsonl", 100)
    with open(home / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["title", "text"], ["Odd", ODD], ["", "x"]])
    prepare_corpus.prepare(home / "rows.csv", home / "table.jsonl", 100)
    rows = read_jsonl(home / "folder.jsonl")
    (home / "packed.jsonl.gz").write_bytes(gzip.compress((home / "table.jsonl").read_bytes()))
    with open(home / "dpr.tsv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows(
            [["id", "text", "title"], *([f"d{i}", row["text"], row["title"]] for i, row in enumerate(rows))]
        )
    (home / "dpr2.tsv.gz").write_bytes(gzip.compress((home / "dpr.tsv").read_bytes().replace(b"\nd", b"\ne")))
    write_jsonl(
        home / "beir.jsonl", [{"_id": f"b{i}", "title": "t", "text": row["text"]} for i, row in enumerate(rows)]
    )
    return home


NAMES = [
    "wiki/text-list-100-sec.jsonl",
    "wiki/infobox.jsonl",
    "folder.jsonl",
    "packed.jsonl.gz",
    "dpr.tsv",
    "dpr2.tsv.gz",
    "beir.jsonl",
]


@pytest.mark.parametrize(("world_size", "names"), [*((1, [name]) for name in NAMES), (1, NAMES), (2, NAMES)])
def test_as_many_passages_are_indexed_as_there_are_lines(corpora, tmp_path, world_size, names):
    paths = [corpora / name for name in names]
    headers = sum(".tsv" in name for name in names)
    expected = sum(map(newlines, paths)) - headers
    settings = {"passages": paths, "train_data": None, "total_steps": None, "retrieve_only": True, "n_context": 1}
    done = run_on(world_size, tmp_path, "evaluate", save_index_path=tmp_path / "index", **settings)
    description = read_description(tmp_path / "index")
    assert description.size == expected > 1
    assert newlines(tmp_path / "index" / description.segments[0].passages.file) == expected
    assert len(read_jsonl(done / "dev-step-0.jsonl")) == 11
