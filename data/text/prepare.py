"""A dataset from your own text.

    python data/text/prepare.py --input book.txt notes/*.jsonl.gz --out data/mine
    python data/text/prepare.py --input a.jsonl.xz --val b.jsonl.xz --tokenizer=bpe:4096
    python data/text/prepare.py --input folder --field=content
    python train.py config/stdlib_ntp.py --dataset=mine --out_dir=out/mine

Streams UTF-8 text, plain, .gz, .xz or .zst: .txt or .md (one document) or .jsonl (one per line, in
the field --field), or all such files in a folder. Without --val, every 20th document is held out;
one of over 16,000 characters counts as several. bpe:N trains a tokenizer with N tokens and stores
it in the folder; other datasets can use it by its path. Running the command again on the same
files (by name and size) does nothing.
"""
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from json.decoder import scanstring
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.runtime import UserError, run

from support.bpe import bpe_tokenizer
from support.cli import key, parse
from support.prepare import already_prepared, locked, write_dataset
from support.tokens import PIECE, cut, load_tokenizer

KINDS = "expected .txt, .md or .jsonl files, plain, .gz, .xz or .zst"
LONG_LINE = 1 << 16  # characters; the text of a longer line is read in pieces
ESCAPES = re.compile(r"([^\\]+|\\u.{4}|\\[^u])*", re.DOTALL)  # no part of one at the end

@dataclass(frozen=True)
class Config:
    input: tuple[str, ...] = key((), "files or folders to train on")
    val: tuple[str, ...] = key((), "held-out files; none: every 20th document of the input")
    field: str = key("text", "the field of .jsonl files that holds the text")
    out: str = key("data/mine", "folder to write to")
    tokenizer: str = key("gpt2", "gpt2, stdlib, bpe:SIZE or the path of a .tiktoken file")
    bpe_chars: int = key(16_000_000, "characters on which bpe:SIZE is trained", low=1000)
    force: bool = key(False, "overwrite an existing dataset")

def open_zst(path, mode, encoding):
    try:
        from pyarrow import input_stream
    except ImportError as e:
        raise UserError(f"{path}: .zst needs pyarrow; run pip install pyarrow") from e
    return io.TextIOWrapper(input_stream(open(path, "rb"), compression="zstd"), encoding)

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".zst": open_zst}

def kind(path):
    """"txt", "md" or "jsonl"; None for another file."""
    found = re.search(r"\.(txt|md|jsonl)(\.gz|\.xz|\.zst)?$", path.name, re.IGNORECASE)
    return found and found[1].lower()

def files_in(paths):
    """The files that the user named, those of a folder in order of their paths, no hidden ones."""
    files = []
    for path in map(Path, paths):
        path.stat()  # an error if it is missing
        inside = [path]
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not any(
                part.startswith(".") for part in file.relative_to(path).parts)]
        found = [file for file in inside if kind(file)]
        if not found:
            raise UserError(f"{path}: {KINDS}")
        files += found
    return list({file.resolve(): file for file in files}.values())  # each once

def text_start(line, field):
    """Where the text starts in the first characters of a line of .jsonl, None if not in these."""
    name = re.escape(json.dumps(field, ensure_ascii=False))
    for found in re.finditer(rf'{name}\s*:\s*"', line):
        with suppress(ValueError):  # this one is nested
            if json.loads(line[:found.end()] + '"}')[field] == "":
                return found.end()

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
        if not more:
            raise EOFError("the file ends inside the text")
        rest = rest[done:] + more
    yield text, True
    others = before + rest[end - 1:]  # the line without its text
    json.loads(others if others.endswith("\n") else others + file.readline())

def jsonl_texts(file, path, field):
    for number, line in enumerate(iter(partial(file.readline, LONG_LINE), ""), 1):
        try:
            if len(line) == LONG_LINE and not line.endswith("\n"):
                if start := text_start(line, field):
                    yield from long_text(line[:start], line[start:], file)
                    continue
                line += file.readline()
            if line.strip():
                text = json.loads(line)[field]
                assert isinstance(text, str), type(text)
                yield text, True
        except UnicodeDecodeError:
            raise
        except (AssertionError, KeyError, TypeError) as e:
            raise UserError(f"{path}, line {number}: expected JSON with a text in {field!r} "
                            f"({e!r}); name another field with --field") from e
        except (EOFError, RecursionError, ValueError) as e:
            raise UserError(f"{path}, line {number}: not JSON, damaged or cut short ({e}); correct "
                            "the line or remove it") from e

def txt_texts(file):
    for text in iter(partial(file.read, PIECE), ""):
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "UTF-16, or not text")
        yield text, False
    yield "", True

def pieces(path, field="text"):
    """A file as a stream of (text, whether a document ends there), each of at most PIECE
    characters."""
    path = Path(path)
    opener = OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            is_jsonl = kind(path) == "jsonl"
            yield from cut(jsonl_texts(file, path, field) if is_jsonl else txt_texts(file))
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.object[e.start]:#04x}); convert it: "
                        f"iconv -f ENCODING -t UTF-8 {path}") from e
    except (EOFError, lzma.LZMAError, OSError, zlib.error) as e:
        if isinstance(e, OSError) and e.filename:
            raise
        raise UserError(f"{path} is damaged or cut short ({e})") from e

def stream(files, field, held_out=None):
    """The pieces of all files. held_out=True: only each 20th, False: the others. A document that a
    held-out piece interrupts ends there."""
    texts = chain.from_iterable(pieces(path, field) for path in files)
    for n, (text, ends) in enumerate(texts, 1):
        if held_out is None:
            yield text, ends
        elif held_out == (n % 20 == 0):
            yield text, ends or held_out or n % 20 == 19

def head(texts, chars):
    """The first `chars` characters of a stream, in pieces."""
    for text, _ in texts:
        yield text[:chars]
        chars -= len(text)
        if chars <= 0:
            break

def check_length(texts):
    """UserError if every 20th document of a stream cannot be held out, as it has fewer."""
    n = sum(1 for _ in islice(texts, 20))
    if n < 20:
        raise UserError(f"the input is too short to hold out each 20th document: it has {n}, a "
                        f"long one counting as one per {PIECE:,} characters; add text, or name "
                        "held-out files with --val")

def get_tokenizer(cfg, inputs):
    """(name, tokenizer) of the key `tokenizer`; bpe:SIZE trains one on the inputs and saves it."""
    kind, _, size = cfg.tokenizer.partition(":")
    found = (cfg.tokenizer, load_tokenizer(cfg.tokenizer)) if kind != "bpe" else None
    if not found and (not size.isdecimal() or not 257 <= int(size) <= 65536):
        raise UserError(f"tokenizer={cfg.tokenizer!r}: expected bpe:SIZE, SIZE from 257 to 65536")
    if not cfg.val:  # before the work
        check_length(stream(inputs, cfg.field))
    texts = stream(inputs, cfg.field)
    return found or bpe_tokenizer(head(texts, cfg.bpe_chars), int(size), cfg.out)

def main(argv):
    cfg, rest = parse(Config, argv, __doc__, files=False)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: write --input {rest[0]}")
    if not cfg.input:
        raise UserError(f"--input FILES is needed: {KINDS}, or a folder")
    inputs, val = files_in(cfg.input), files_in(cfg.val)
    if both := {*map(Path.resolve, inputs)} & {*map(Path.resolve, val)}:
        raise UserError(f"{both.pop()} is both input and val; without --val, a part of the input "
                        "is held out")
    asked = {name: [[path.name, path.stat().st_size] for path in files]
             for name, files in dict(input=inputs, val=val).items()}
    asked |= dict(tokenizer=cfg.tokenizer, bpe_chars=cfg.bpe_chars)
    if cfg.field != "text":  # older datasets have no such entry
        asked["field"] = cfg.field
    splits = dict(train=stream(inputs, cfg.field, None if val else False),
                  val=stream(val or inputs, cfg.field, None if val else True))
    with locked(cfg.out):
        if cfg.force or not already_prepared(cfg.out, dict(asked=asked)):
            tokenizer = get_tokenizer(cfg, inputs)
            write_dataset(cfg.out, splits, *tokenizer, asked=asked)

if __name__ == "__main__":
    run(main)
