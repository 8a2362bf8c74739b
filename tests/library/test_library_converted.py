"""PDF, DOCX, HTML and PPTX through the real converter; only where the extra `documents` is installed."""

import io
import zipfile

import pytest

pytest.importorskip("markitdown")

from engram_lm.errors import DataError
from engram_lm.library import read_texts

SENTENCE = "The office dog is called Orlando."
NAMES = "xmlns:w='http://schemas.openxmlformats.org/wordprocessingml/2006/main'"
PARTS = "http://schemas.openxmlformats.org/package/2006"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"


def a_pdf(lines):
    """The smallest file with a page of text, its cross references right."""
    page = "BT /F1 12 Tf 72 720 Td " + " ".join(f"({line}) Tj 0 -20 Td" for line in lines) + " ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(page)} >>\nstream\n{page}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for n, text in enumerate(objects, 1):
        places.append(len(out))
        out += f"{n} 0 obj\n{text}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\n"
    return out + f"{end}startxref\n{len(out)}\n%%EOF\n".encode()


def a_docx(paragraphs):
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    files = {
        "[Content_Types].xml": f"<Types xmlns='{PARTS}/content-types'><Default Extension='rels' "
        "ContentType='application/vnd.openxmlformats-package.relationships+xml'/>"
        f"<Override PartName='/word/document.xml' ContentType='{WORD}'/></Types>",
        "_rels/.rels": f"<Relationships xmlns='{PARTS}/relationships'><Relationship Id='rId1' "
        f"Type='{OFFICE}/officeDocument' Target='word/document.xml'/></Relationships>",
        "word/document.xml": f"<w:document {NAMES}><w:body>{body}</w:body></w:document>",
    }
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, f"<?xml version='1.0' encoding='UTF-8'?>{text}")
    return data.getvalue()


def a_pptx(title):
    pptx = pytest.importorskip("pptx")
    made, data = pptx.Presentation(), io.BytesIO()
    made.slides.add_slide(made.slide_layouts[5]).shapes.title.text = title
    made.save(data)
    return data.getvalue()


def a_page(paragraphs):
    body = "".join(f"<p>{text}</p>" for text in paragraphs)
    head = "<title>Dogs</title><script>never()</script>"
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>".encode()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["dog.pdf", "dog.docx", "dog.html", "dog.HTM", "a dog.pptx"])
def test_texts_come_out_of_files_of_other_formats(tmp_path, name):
    lines = [SENTENCE, "He sleeps beside the desk."]
    make = {
        "pdf": a_pdf,
        "docx": a_docx,
        "html": a_page,
        "htm": a_page,
        "pptx": lambda lines: a_pptx(lines[0]),
    }
    (tmp_path / name).write_bytes(make[name.rpartition(".")[2].lower()](lines))
    (text,) = read_texts([tmp_path / name], extra={"licence": "CC0"})
    assert SENTENCE in " ".join(text.text.split())
    assert "never()" not in text.text
    assert text.extra["licence"] == "CC0"
    assert text.extra["file_sha256"]


@pytest.mark.filterwarnings("default")
def test_a_page_in_another_script_keeps_its_letters(tmp_path):
    (tmp_path / "page.html").write_bytes(
        a_page(["Žluťoučký kůň", "日本語"]).replace(b"<head>", b"<head><meta charset='utf-8'>")
    )
    (text,) = read_texts([tmp_path / "page.html"])
    assert "Žluťoučký kůň" in text.text
    assert "日本語" in text.text


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["broken.pdf", "broken.docx", "broken.pptx"])
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00\x01 this is none")
    with pytest.raises(DataError, match=r"broken\.\w+ cannot be converted"):
        list(read_texts([tmp_path / name]))
