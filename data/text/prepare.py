"""A dataset from your own text.

    python data/text/prepare.py --input book.txt notes/*.jsonl.gz --out data/mine
    python data/text/prepare.py --input a.jsonl.xz --val b.jsonl.xz --tokenizer=bpe:4096
    python train.py config/stdlib_ntp.py --dataset=mine --out_dir=out/mine

Streams UTF-8 text, plain, .gz or .xz: .txt or .md (one document) or .jsonl (one per line, in the
field `text`). Without --val, every 20th document is held out; one of over 16,000 characters counts
as several. bpe:N trains a tokenizer with N tokens and stores it in the folder; other datasets can
use it by its path. Running the command again on the same files (by name and size) does nothing.
"""
import gzip
import json
import lzma
import re
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from itertools import chain
from json.decoder import scanstring
from os.path import getsize, realpath
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.runtime import UserError, run

from support.bpe import save_bpe, train_bpe
from support.cli import key, parse
from support.files import fingerprint
from support.prepare import PIECE, already_prepared, cut, locked, write_dataset
from support.tokens import load_tokenizer

LONG_LINE = 1 << 16  # characters; the text of a longer line is read in pieces
# what comes before the text of a long line: numbers and short strings. Other lines are read whole.
BEFORE_TEXT = re.compile(r'\s*{(\s*"[^"\\]*"\s*:\s*("[^"\\]*"|[\w.+-]+)\s*,)*?\s*"text"\s*:\s*"')
ESCAPES = re.compile(r"([^\\]+|\\u.{4}|\\[^u])*", re.DOTALL)  # no part of one at the end

@dataclass(frozen=True)
class Config:
    input: tuple[str, ...] = key((), "files to train on")
    val: tuple[str, ...] = key((), "held-out files; none: every 20th document of the input")
    out: str = key("data/mine", "folder to write to")
    tokenizer: str = key("gpt2", "gpt2, stdlib, bpe:SIZE or the path of a .tiktoken file")
    bpe_chars: int = key(16_000_000, "characters on which bpe:SIZE is trained", low=1000)
    force: bool = key(False, "overwrite an existing dataset")

def long_text(before, rest, file):
    """The text of a line of .jsonl in pieces, (text, whether it ends there), never held in memory
    as a whole. The line is `before`, its text from `rest` on, still escaped, then what follows in
    the file."""
    while True:
        done = ESCAPES.match(rest).end()
        text, end = scanstring(rest[:done] + '"', 0)
        if end <= done:  # the text's own quote
            break
        if "\ud800" <= text[-1:] < "\udc00":  # half of a character, \uXXXX
            text, done = text[:-1], done - 6
        yield text, False
        more = file.readline(PIECE)
        assert more, "the file ends inside the text"
        rest = rest[done:] + more
    yield text, True
    others = before + rest[end - 1:]  # the line without its text
    json.loads(others if others.endswith("\n") else others + file.readline())

def jsonl_texts(file, path):
    for number, line in enumerate(iter(partial(file.readline, LONG_LINE), ""), 1):
        try:
            if len(line) == LONG_LINE and not line.endswith("\n"):
                if before := BEFORE_TEXT.match(line):
                    yield from long_text(before[0], line[before.end():], file)
                    continue
                line += file.readline()
            if line.strip():
                text = json.loads(line)["text"]
                assert isinstance(text, str), type(text)
                yield text, True
        except UnicodeDecodeError:
            raise
        except (AssertionError, KeyError, RecursionError, TypeError, ValueError) as e:
            raise UserError(f"{path}, line {number}: expected JSON with a text ({e!r})") from e

def txt_texts(file):
    for text in iter(partial(file.read, PIECE), ""):
        yield text, False
    yield "", True

def pieces(path):
    """A file as a stream of (text, whether a document ends there), each of at most PIECE
    characters."""
    path = Path(path)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    kind = path.suffix if opener is open else path.with_suffix("").suffix
    if kind not in (".txt", ".md", ".jsonl"):
        raise UserError(f"{path}: expected .txt, .md or .jsonl, plain, .gz or .xz")
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from cut(jsonl_texts(file, path) if kind == ".jsonl" else txt_texts(file))
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.object[e.start]:#04x})") from e
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is damaged or cut short ({e})") from e

def stream(files, held_out=None):
    """The pieces of all files. held_out=True: only each 20th, False: the others. A document that a
    held-out piece interrupts ends there."""
    n = 0
    for n, (text, ends) in enumerate(chain.from_iterable(map(pieces, files)), 1):
        if held_out is None:
            yield text, ends
        elif held_out == (n % 20 == 0):
            yield text, ends or held_out or n % 20 == 19
    if held_out and n < 20:
        raise UserError(f"the input is too short to hold out each 20th document: it has {n}, a "
                        f"long one counting as one per {PIECE:,} characters; add text, or name "
                        "held-out files with --val")

def head(files, chars):
    """The first `chars` characters of the files, in pieces."""
    for text, _ in stream(files):
        yield text[:chars]
        chars -= len(text)
        if chars <= 0:
            break

def get_tokenizer(cfg):
    """(name, tokenizer) of the key `tokenizer`; bpe:SIZE trains one and saves it."""
    kind, _, size = cfg.tokenizer.partition(":")
    if kind != "bpe":
        return cfg.tokenizer, load_tokenizer(cfg.tokenizer)
    if not size.isdecimal() or not 257 <= int(size) <= 65536:
        raise UserError(f"tokenizer={cfg.tokenizer!r}: expected bpe:SIZE, SIZE from 257 to 65536")
    ranks = train_bpe(head(cfg.input, cfg.bpe_chars), int(size))
    path = str(Path(cfg.out) / f"bpe{int(size)}-{fingerprint(*ranks)[:8]}.tiktoken")
    save_bpe(ranks, path)
    return path, load_tokenizer(path)

def names_and_sizes(files):
    return [[Path(path).name, getsize(path)] for path in files]

def main(argv):
    cfg, _ = parse(Config, argv, __doc__, most=0, files=False)
    if not cfg.input:
        raise UserError("--input FILES is needed: .txt, .md or .jsonl, plain, .gz or .xz")
    if both := {*map(realpath, cfg.input)} & {*map(realpath, cfg.val)}:
        raise UserError(f"{both.pop()} is both input and val; without --val, a part of the input "
                        "is held out")
    asked = dict(input=names_and_sizes(cfg.input), val=names_and_sizes(cfg.val),
                 tokenizer=cfg.tokenizer, bpe_chars=cfg.bpe_chars)
    splits = dict(train=stream(cfg.input), val=stream(cfg.val))
    if not cfg.val:
        splits = dict(train=stream(cfg.input, False), val=stream(cfg.input, True))
    with locked(cfg.out):
        if cfg.force or not already_prepared(cfg.out, dict(asked=asked)):
            write_dataset(cfg.out, splits, *get_tokenizer(cfg), asked=asked)

if __name__ == "__main__":
    run(main)
