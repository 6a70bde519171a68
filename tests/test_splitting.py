"""Documents into passages of about 100 words."""

import json
import random

import pytest

from atlas.files.jsonl import DataError
from splitting import Section, blocks_of, ends_here, heading_path, passages_of, split, words_of, writing


@pytest.mark.parametrize("seed", range(30))
def test_every_word_once_in_passages_of_about_one_size(seed):
    rng = random.Random(seed)
    size = rng.choice([1, 2, 7, 40, 100])
    words = [f"W{i}" + rng.choice(["", "", "", "", ".", ",", '."', "?"]) for i in range(rng.randrange(1, 700))]
    cuts = sorted(rng.sample(range(len(words) + 1), min(3, len(words))))
    blocks = [" ".join(words[start:end]) for start, end in zip([0, *cuts], [*cuts, len(words)], strict=True)]
    passages = split(blocks, size)
    assert " ".join(passages).split() == words
    lengths = [len(passage.split()) for passage in passages]
    assert max(lengths) <= size
    if len(words) > size:  # no crumbs
        assert min(lengths) >= size // 4
    assert len(passages) <= -(-len(words) // (size / 2))


def test_cuts_are_at_the_ends_of_sentences_and_blocks():
    assert split(["One two three. Four five. Six seven eight nine."], 5) == [
        "One two three. Four five.",
        "Six seven eight nine.",
    ]
    assert split(["one two three four", "five six seven"], 5) == ["one two three four", "five six seven"]
    assert split(["a b c d e f g h i"], 4) == ["a b c", "d e f", "g h i"]  # no end anywhere: equal sizes
    assert split(["One two three four five six. Seven eight."], 100) == ["One two three four five six. Seven eight."]
    assert split([], 100) == split(["", " \n "], 100) == []


@pytest.mark.parametrize(
    ("word", "following", "ends"),
    [
        ("end.", "The", True),
        ('said."', "Then", True),
        ("really?", "“Yes”", True),
        ("(1999).", "It", True),
        ("end", "The", False),
        ("end.", "lower", False),
        ("Dr.", "Smith", False),
        ("J.", "Smith", False),
        ("(U.S.", "Army", False),
        ("Yahoo!", "(a", False),
    ],
)
def test_ends_of_sentences(word, following, ends):
    assert ends_here(word, following) is ends


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我用Python写了「很多」代码。2023年 10.5%", "我|用|Python|写|了|「很|多」|代|码。|2023|年 |10.5%"),
        ("(北京) (Beijing), café", "(北|京) |(Beijing), |café"),
        ("コーヒーが、が", "コ|ー|ヒ|ー|が、|が"),  # the last one is decomposed
        ("葛\U000e0100城", "葛\U000e0100|城"),
        ("ｶﾞｯ。\u0301", "ｶﾞ|ｯ。\u0301"),
        ("ที่นี่ เก่ามาก และ", "ที่|นี่ |เก่า|มา|ก |และ"),
        ("ເຂົ້າ", "ເຂົ້າ"),
        ("ស្រ្តីខ្ញុំ។", "ស្រ្តី|ខ្ញុំ។"),
        ("သတ္တဝါ", "သ|တ္တ|ဝါ"),
        ("བོད་ཡིག", "བོད་|ཡིག"),
        ("한국어 는", "한국어 |는"),
        ("e\u0301tude na\u00efve", "e\u0301tude |na\u00efve"),
    ],
)
def test_characters_are_words_where_a_script_has_no_spaces(text, words):
    assert "|".join(words_of(text)).rstrip() == words
    assert split([text], 3) and " ".join(split([text], 1000)) == text
    assert "".join(split([text], 1)).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("text", ["汉字" * 2550, "ภา" * 5100, "ខ្ញុំ" * 5100, "ກິ" * 5100, "မြ" * 5100])
def test_text_without_spaces_is_cut(text):
    passages = split([text])
    assert "".join(passages) == text and len(passages) == 51
    assert max(map(len, passages)) <= 100 * len("ខ្ញុំ")


def test_passages_without_spaces_end_with_sentences():
    chinese = "这是一个句子。他说：「好的。」"
    assert split([chinese * 20], 45) == [chinese * 4] * 5
    thai = "ภาษาไทย และ "
    assert all(passage.endswith(("ไทย", "และ")) for passage in split([thai * 50], 20))


def test_what_is_not_to_be_seen():
    assert blocks_of("so\xadft hy\xad\nphen \ufeffa\u2060b\u200bc ក\u200bក p\u200cq") == [
        "soft hyphen abc ក\u200bក p\u200cq"
    ]
    assert blocks_of("中文\n换行，\n好\nend\n한\n글") == ["中文换行，好 end 한 글"]
    rows = passages_of("1", "Ti\xadtle", [Section("Sec\xadtion", ["x"])])
    assert (rows[0]["title"], rows[0]["section"]) == ("Title", "Section")


def test_blocks():
    text = "A line\nand its\tend.\n\nSecond:\n* one\n** two.\n*\n* three\n\nThird\n* four\nFifth"
    assert blocks_of(text) == ["A line and its end.", "Second:", "one;", "two.", "three.", "Third", "four.", "Fifth"]
    assert blocks_of("*args and **kwargs\n\n* *both*\n* * deeper\n*nor this") == [
        "*args and **kwargs", "*both*;", "deeper.", "*nor this"
    ]  # fmt: skip
    wrapped = "* one is\n  long\n\tand wraps\n* two\n\n  indented"
    assert blocks_of(wrapped) == ["one is long and wraps;", "two.", "indented"]
    assert blocks_of("") == blocks_of(" \n\n* \n") == []


def test_heading_paths():
    above = []
    paths = [
        heading_path(above, level, name) for level, name in [(2, "A"), (4, "B"), (3, "C"), (3, ""), (4, "D"), (1, "E")]
    ]
    assert paths == ["A", "A: B", "A: C", "A", "A: D", "E"]


def test_passages_do_not_cross_sections():
    sections = [Section("", ["a b c"]), Section("S", ["d"]), Section("S: T", ["e f g h"])]
    rows = passages_of("7", "Title", sections, words=3)
    assert rows == [
        {"id": "7-0", "title": "Title", "section": "", "text": "a b c"},
        {"id": "7-1", "title": "Title", "section": "S", "text": "d"},
        {"id": "7-2", "title": "Title", "section": "S: T", "text": "e f"},
        {"id": "7-3", "title": "Title", "section": "S: T", "text": "g h"},
    ]


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/passages.jsonl"
    with pytest.raises(DataError, match="half of a surrogate pair in 'b'"), writing(path) as write:
        write({"id": "a", "text": "x"})
        write({"id": "b", "text": "\ud800"})
    assert not list(path.parent.iterdir())
    rows = [{"id": "a", "text": "line\u2028end\x85\nü"}, {"id": "b", "text": ""}]
    with writing(path) as write:
        for row in rows:
            write(row)
        assert not path.exists()
    with writing(path) as write:
        for row in rows:
            write(row)
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == rows
    assert [path.name for path in path.parent.iterdir()] == ["passages.jsonl"]


def test_another_file_of_that_name_is_kept(tmp_path, capsys):
    path = tmp_path / "mine.txt"
    for content in ("precious", "precious, too"):
        path.write_text(content)
        with writing(path) as write:
            write({"id": "a"})
    assert path.read_text() == '{"id": "a"}\n'
    assert [(tmp_path / f"mine.txt.old-{i}").read_text() for i in (1, 2)] == ["precious", "precious, too"]
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{path} was there with other content, which is kept as mine.txt.old-1"
    )
