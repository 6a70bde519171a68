"""documents.py: Word and PDF files into text with headings. The tests write the files themselves."""

import os
import re
from io import BytesIO

import docx
import pypdf
import pytest
from docx.opc.constants import CONTENT_TYPE, RELATIONSHIP_TYPE
from docx.opc.packuri import PackURI
from docx.opc.part import Part
from docx.oxml import parse_xml

import documents
from atlas.files.jsonl import DataError
from documents import UnreadableFile, read_docx, read_pdf
from prepare_corpus import prepare
from tests.kit import read_jsonl

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
MATHS = 'xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"'


def write_pdf(*pages, title=""):
    """A PDF with these lines of text on its pages, in WinAnsi."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Title (%s) >>" % title.encode()]
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    kids = []
    for page in pages:
        lines = b"".join(
            b"(%s) Tj T*\n" % re.sub(r"[()\\]", r"\\\g<0>", line).encode("cp1252") for line in page.split("\n") if line
        )
        stream = b"BT /F 12 Tf 14 TL 72 720 Td\n%sET" % lines
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        kids.append(b"%d 0 R" % (len(objects) + 1))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F 4 0 R >> >> >>" % len(objects)
        )
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    data, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return (
        data
        + b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R /Info 3 0 R >>\nstartxref\n%d\n%%%%EOF"
        % (
            size,
            table,
            size,
            len(data),
        )
    )


def encrypted(data, password):
    writer = pypdf.PdfWriter(clone_from=BytesIO(data))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    file = BytesIO()
    writer.write(file)
    return file.getvalue()


def write_docx(fill):
    document = docx.Document()
    fill(document)
    file = BytesIO()
    document.save(file)
    return file.getvalue()


def sections(outline):
    found = outline.sections()
    return outline.title, [(section.heading, "|".join(section.blocks)) for section in found]


def test_pdf():
    names = ("First", "Second", "Third")
    lines = "Annual Report\n{}: the inter-\nnational com-\npany is well-known, a well-\nknown one (so {})\nPage {} of 3"
    pages = [lines.format(name, name, number) for number, name in enumerate(names, 1)]
    outline = read_pdf(write_pdf(*pages, "", title="The Report"))
    text = "{}: the international company is well-known, a well-known one (so {})"
    assert sections(outline) == ("The Report", [("", " ".join(map(text.format, names, names)))])
    assert outline.left_out == [
        ("pages without text", "page 4"),
        *(("headers and footers", line) for n in (1, 2, 3) for line in ("Annual Report", f"Page {n} of 3")),
    ]


def test_pdf_lines_that_only_look_like_footers_are_kept():
    outline = read_pdf(
        write_pdf("Table\nTotal 40", "Other\nTotal 12", "Third\nTotal 12", title="Microsoft Word - a.doc")
    )
    assert sections(outline) == ("", [("", "Table Total 40 Other Total 12 Third Total 12")])
    assert outline.left_out == []


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (write_pdf("", ""), "scanned .pdf files", "no page has text"),
        (encrypted(write_pdf("secret"), "x"), "encrypted .pdf files", "encrypted; save it without a password"),
        (write_pdf("text")[:300], "damaged files", "damaged \\("),
        (b"", "damaged files", "damaged \\("),
    ],
)
def test_pdf_files_without_text(data, kind, reason):
    with pytest.raises(UnreadableFile, match=reason) as caught:
        documents.read_document(data, ".pdf")
    assert caught.value.kind == kind


def test_a_pdf_that_everybody_may_open():
    """Encrypted, but only against changes."""
    assert sections(read_pdf(encrypted(write_pdf("open"), ""))) == ("", [("", "open")])


def test_a_pdf_that_another_package_would_decrypt(monkeypatch):
    def decrypt(*_):
        raise pypdf.errors.DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(pypdf.PdfReader, "decrypt", decrypt)
    with pytest.raises(UnreadableFile, match="cryptography>=3.1 is required .*; or save it without a password"):
        read_pdf(encrypted(write_pdf("open"), ""))


def test_a_pdf_whose_text_may_be_wrong_is_named(capfd):
    outline = read_pdf(write_pdf("text").replace(b"/WinAnsiEncoding", b"/OtherAnsiEncode"))
    assert outline.left_out == [
        ("unknown encodings (their text may be wrong)", "Advanced encoding /OtherAnsiEncode not implemented yet")
    ]
    assert capfd.readouterr() == ("", "")


def test_docx():
    def fill(document):
        document.add_heading("The Title", 0)
        document.add_paragraph("Intro ").add_run("goes on.").bold = True
        document.add_heading("Diet", 1)
        document.add_paragraph("ants,\nred", style="List Bullet")
        document.add_paragraph("termites", style="List Number")
        document.add_heading("In winter", 2)
        document.add_paragraph("Snow.")
        table = document.add_table(2, 3)
        for cell, text in zip(table._cells, ["a", "b", "c", "1", "merged", ""], strict=True):
            cell.text = text
        table.cell(1, 1).merge(table.cell(1, 2))
        document.add_paragraph("End.")

    assert sections(read_docx(write_docx(fill))) == (
        "The Title",
        [("", "Intro goes on."), ("Diet", "ants, red;|termites"), ("Diet: In winter", "Snow.|a b c|1 merged|End.")],
    )


def test_docx_superscripts_formulas_and_what_is_not_directly_in_a_paragraph():
    def fill(document):
        document.core_properties.title = "From the properties"
        power = document.add_paragraph("10")
        for digit in "23":  # Word splits what is one superscript
            power.add_run(digit).font.superscript = True
        water = document.add_paragraph("H")
        water.add_run("2").font.subscript = True
        water.add_run("O")
        for xml in (
            f"<w:p {W}><w:ins><w:r><w:t>inserted </w:t></w:r></w:ins>"
            "<w:del><w:r><w:delText>no</w:delText></w:r></w:del>"
            "<w:moveFrom><w:r><w:t>no</w:t></w:r></w:moveFrom><w:r><w:t>a</w:t><w:tab/><w:t>b</w:t></w:r></w:p>",
            f"<w:sdt {W}><w:sdtContent><w:p><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr>"
            "<w:r><w:t>in a field</w:t></w:r></w:p>"
            "</w:sdtContent></w:sdt>",
            f"<w:p {W} {MATHS}><m:oMath><m:sSup><m:e><m:r><m:t>10</m:t></m:r></m:e>"
            "<m:sup><m:r><m:t>3</m:t></m:r></m:sup>"
            "</m:sSup></m:oMath></w:p>",
            f"<w:p {W} {MATHS}><m:oMath><m:f><m:num><m:r><m:t>a+b</m:t></m:r></m:num>"
            "<m:den><m:r><m:t>c</m:t></m:r></m:den>"
            "</m:f><m:r><m:t>=</m:t></m:r>"
            "<m:sSup><m:e><m:d><m:dPr><m:begChr m:val='['/><m:endChr m:val=']'/></m:dPr><m:e>"
            "<m:r><m:t>x</m:t></m:r></m:e></m:d></m:e><m:sup><m:r><m:t>n+1</m:t></m:r></m:sup></m:sSup></m:oMath></w:p>",
            f'<w:p {W} xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"><w:r><w:t>out</w:t>'
            "<mc:AlternateContent><mc:Choice><w:txbxContent><w:p><w:r><w:t>in a box</w:t></w:r></w:p></w:txbxContent>"
            "</mc:Choice>"
            "<mc:Fallback><w:txbxContent><w:p><w:r><w:t>in a box</w:t></w:r></w:p></w:txbxContent></mc:Fallback>"
            "</mc:AlternateContent></w:r></w:p>",
        ):
            document.element.body.append(parse_xml(xml))
        notes = f"<w:footnotes {W}><w:footnote><w:p><w:r><w:t>A note.</w:t></w:r></w:p></w:footnote></w:footnotes>"
        part = Part(PackURI("/word/footnotes.xml"), CONTENT_TYPE.WML_FOOTNOTES, notes.encode(), document.part.package)
        document.part.relate_to(part, RELATIONSHIP_TYPE.FOOTNOTES)

    assert sections(read_docx(write_docx(fill))) == (
        "From the properties",
        [("", "10^23|H2O|inserted a b|in a field|10^3|(a+b)/c=[x]^(n+1)|out|in a box|A note.")],
    )


def test_a_folder_goes_on_and_names_what_it_could_not_read(tmp_path, capsys):
    folder = tmp_path / "documents"
    folder.mkdir()
    good = write_docx(lambda document: document.add_paragraph("Word."))
    for name, data in {
        "good.pdf": write_pdf("Text."),
        "good.docx": good,
        "scanned.pdf": write_pdf(""),
        "encrypted.pdf": encrypted(write_pdf("secret"), "x"),
        "cut.pdf": write_pdf("text")[:300],
        "cut.docx": good[: len(good) // 2],
        "old.docx": b"\xd0\xcf\x11\xe0" + bytes(600),
        "deep.html": b"<div>" * 5000 + b"deep",
        "slides.pptx": b"",
        "latin.txt": b"Gr\xf6\xdfe",
        "README": b"",
        os.fsdecode(b"\xff.zip"): b"",
        "t.csv": b"text\nx\n",
        **{f"{i:02}.png": b"" for i in range(12)},
    }.items():
        (folder / name).write_bytes(data)
    prepare(folder, tmp_path / "x.jsonl", 100)
    assert [row["text"] for row in read_jsonl(tmp_path / "x.jsonl")] == ["Word.", "Text."]
    said = capsys.readouterr()
    assert said.out.split("left out: ")[1] == (
        ".csv files (give a table by itself) 1, .png files 12, .pptx files 1, .zip files 1, damaged files 3, "
        "encrypted .docx files 1, encrypted .pdf files 1, files that are not UTF-8 1, files without a suffix 1, "
        "scanned .pdf files 1\n"
        "    .csv files (give a table by itself): t.csv\n"
        "    .png files: 00.png, 01.png, 02.png, 03.png, 04.png, 05.png, 06.png, 07.png, 08.png, 09.png and 2 more "
        "(--list_left_out names all)\n"
        "    .pptx files: slides.pptx\n"
        "    .zip files: \\udcff.zip\n"
        "    damaged files: cut.docx, cut.pdf, deep.html\n"
        "    encrypted .docx files: old.docx\n"
        "    encrypted .pdf files: encrypted.pdf\n"
        "    files that are not UTF-8: latin.txt\n"
        "    files without a suffix: README\n"
        "    scanned .pdf files: scanned.pdf\n"
    )
    sentences = said.err.splitlines()
    assert len(sentences) == 7 and all(line.startswith(f"left out: {folder}/") for line in sentences)
    prepare(folder, tmp_path / "x.jsonl", 100, most_names=None)
    assert "10.png, 11.png\n" in capsys.readouterr().out


def test_whatever_a_library_raises_does_not_end_the_folder(tmp_path, monkeypatch, capsys):
    def read(text):
        raise RecursionError("too deep") if "deep" in text else AssertionError("unknown status keyword")

    monkeypatch.setitem(documents.FORMATS, ".html", documents.Format(read))
    for name, text in {"a.html": "deep", "b.html": "broken", "c.txt": "Text."}.items():
        (tmp_path / name).write_text(text)
    prepare(tmp_path, tmp_path.parent / "x.jsonl", 100)
    assert [row["id"] for row in read_jsonl(tmp_path.parent / "x.jsonl")] == ["c.txt-0"]
    said = capsys.readouterr()
    assert said.out.endswith("left out: damaged files 2\n    damaged files: a.html, b.html\n")
    assert "a.html: damaged (RecursionError: too deep)\n" in said.err


def test_a_missing_package_is_said_before_anything_is_read(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.pdf").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None if name == "pypdf" else name)
    with pytest.raises(DataError, match=r"0\.pdf: reading \.pdf files \(3 here\) needs pypdf; pip install pypdf$"):
        prepare(tmp_path, tmp_path / "made.jsonl", 100)
    assert not (tmp_path / "made.jsonl").exists()
