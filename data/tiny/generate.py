"""Regenerates the embedded text and tasks, byte for byte.

    python data/tiny/generate.py                       write tasks/*.jsonl and text/* beside this file
    python data/tiny/generate.py --out FOLDER          write them elsewhere
    python data/tiny/generate.py --check               compare with what is there, write nothing
    python data/tiny/generate.py --corpus FOLDER       write the training corpus too, one file per shard
"""
import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import corpus
import tasks

HERE = Path(__file__).resolve().parent
TEXT_CHARACTERS = 750_000  # about 200,000 tokens


def _lines(items: list[dict]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def files() -> Iterator[tuple[str, str]]:
    """(relative path, content) of every generated file that is kept."""
    for family in tasks.FAMILIES:
        yield f"tasks/{family}.jsonl", _lines(tasks.task(family))
    yield "text/summaries.jsonl", _lines(tasks.summaries())
    for role in ("calibration", "heldout"):
        yield f"text/{role}.txt", corpus.SEPARATOR.join(corpus.other_text(role, TEXT_CHARACTERS))


def write(path: Path, content: str) -> None:
    """Writes `content` in one step: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode())
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="where tasks/ and text/ are")
    parser.add_argument("--check", action="store_true", help="compare only; exit status 1 where a file differs")
    parser.add_argument("--corpus", type=Path, help="folder for the training corpus")
    parser.add_argument("--shards", type=int, default=corpus.SHARDS, help="how many shards of it")
    arguments = parser.parse_args()
    different = []
    for name, content in files():
        path = arguments.out / name
        if not arguments.check:
            write(path, content)
        elif not path.is_file() or path.read_bytes() != content.encode():
            different.append(name)
    if different:
        print(f"differs from what the generator writes: {', '.join(different)}", file=sys.stderr)
        return 1
    if arguments.corpus:
        for number in range(arguments.shards):
            write(arguments.corpus / f"shard-{number:04d}.txt", corpus.SEPARATOR.join(corpus.shard(number)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
