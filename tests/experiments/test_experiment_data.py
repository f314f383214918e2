"""The script that makes the data of the committed results, on small content; its downloads are not tried."""

import io
import tarfile
import urllib.error

import pyarrow.parquet as pq
import pytest

from experiments import data

SENTENCE = "This is a sentence of seven words."


def page(*lines: str) -> str:
    return '<doc id="1" url="http://x?curid=1" title="A title">\nA title\n\n' + "\n".join(lines) + "\n</doc>\n"


def test_articles_are_told_apart_and_lose_their_titles():
    content = page(SENTENCE) + page("Other.").replace("curid=1", "curid=2")
    assert list(data.articles(content)) == [("http://x?curid=1", f"\n{SENTENCE}"), ("http://x?curid=2", "\nOther.")]


def test_lines_that_are_no_sentences_are_left_out_and_spaces_mended():
    kept = "He (; born 1900) lived &amp; worked , it says , in\xa0Rome () until he died ." + " more words" * 40 + "."
    body = "\n".join(["Heading", "Too short.", "No end here it goes on and on", f"formula_1 {SENTENCE}", kept])
    (passage,) = data.passages(body)
    assert passage.startswith("He (; born 1900) lived & worked, it says, in Rome until he died. more words")
    assert "\n" not in passage


def test_passages_end_at_2400_characters_and_are_three_at_most():
    line = "word " * 99 + "end."  # 499 characters
    lengths = [len(text) for text in data.passages("\n".join([line] * 30))]
    assert lengths == [2499] * 3
    assert data.passages(line[:300] + " end.") == []  # shorter than 400
    first, second = data.passages("\n".join([line] * 3 + ["word " * 440 + "end."]))
    assert (len(first), len(second)) == (1499, 2204)  # together they would be longer than 3,600


def test_fields_that_a_document_lacks_are_empty():
    rows = data.documents(b'{"text": "a", "date": "2019"}\n{"text": "b", "url": "u", "timestamp": "t"}\n')
    assert rows == [{"text": "a", "timestamp": "2019", "url": ""}, {"text": "b", "timestamp": "t", "url": "u"}]


def test_other_content_than_that_of_the_results_is_refused_and_not_written(tmp_path):
    rows = [{"text": "é", "timestamp": "", "url": ""}]
    with pytest.raises(ValueError, match=r"a.jsonl.gz: the SHA-256 of its content begins with \w{16}; that of .*, 00$"):
        data.write(tmp_path / "a.jsonl.gz", rows, "00")
    assert not list(tmp_path.iterdir())
    digest = data.sha256(['{"text": "é", "timestamp": "", "url": ""}\n'.encode()])
    data.write(tmp_path / "text" / "a.jsonl.xz", rows, digest)
    images = [{"img": {"bytes": b"jpeg", "path": "train/frog/1.jpg"}, "label": data.label_of("train/frog/1.jpg")}]
    data.write(tmp_path / "images" / "a.parquet", images, data.sha256([b"jpeg\x06"]))
    assert pq.read_table(tmp_path / "images" / "a.parquet").to_pylist() == images


def test_an_archive_is_read_by_pattern_and_a_failed_download_is_one_line(monkeypatch):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as files:
        for name in ("r-1/text/AA/wiki_00", "r-1/readme"):
            info = tarfile.TarInfo(name)
            info.size = 2
            files.addfile(info, io.BytesIO(b"ab"))
    stream.seek(0)
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url: stream)
    assert list(data.archive("o/r", "1", r"text/A[A-D]/wiki_\d\d")) == [("text/AA/wiki_00", b"ab")]

    def fails(url):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(data.urllib.request, "urlopen", fails)
    with pytest.raises(OSError, match=r"^https://codeload.github.com/o/r/tar.gz/1: cannot be read \(.*no route.*\)$"):
        list(data.archive("o/r", "1", ".*"))
