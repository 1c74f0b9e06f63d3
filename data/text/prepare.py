"""A dataset from your own text.

    python data/text/prepare.py --input book.txt notes/*.jsonl.gz --out data/mine
    python data/text/prepare.py --input train.jsonl.xz --val val.jsonl.xz --tokenizer=bpe:4096 --out data/books
    python train.py config/stdlib_ntp.py --dataset=mine --out_dir=out/mine

Reads .txt (a file is a document) and .jsonl (a line is one, its field `text`), plain, .gz or .xz, as UTF-8. The
input is streamed: memory stays flat however large it is. Without --val every 20th piece of about 16 000
characters is held out. bpe:N trains a tokenizer of N tokens on the input's first --bpe_chars characters; it is
kept beside the data, its name holds a hash of its content, and another dataset can use it by its path. A second call
with the same files (by name and size) and keys does nothing.
"""
import gzip
import json
import lzma
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import config
import data
from config import UserError, key

PIECE = 16_000  # characters read at a time


@dataclass(frozen=True)
class Config:
    input: tuple[str, ...] = key((), "files to train on")
    val: tuple[str, ...] = key((), "files held out; none: every 20th piece of the input")
    out: str = key("data/mine", "folder to write to")
    tokenizer: str = key("gpt2", "gpt2, stdlib, bpe:SIZE or the path of a .tiktoken file")
    bpe_chars: int = key(16_000_000, "characters of the input's head that bpe:SIZE learns from", low=1000)
    force: bool = key(False, "write over a dataset that is there")


def pieces(path):
    """A file as a stream of (text, whether a document ends there). UserError: of another kind, not UTF-8, not JSON, damaged."""
    path = Path(path)
    inner, opener = path, open
    if path.suffix in (".gz", ".xz"):
        inner, opener = path.with_suffix(""), {".gz": gzip.open, ".xz": lzma.open}[path.suffix]
    if inner.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: expected .txt or .jsonl, plain, .gz or .xz")
    line = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            if inner.suffix == ".jsonl":
                for line, text in enumerate(file, 1):
                    if text.strip():
                        text = json.loads(text)["text"]
                        if not isinstance(text, str):
                            raise TypeError(f"text is {type(text).__name__}")
                        yield text, True
                return
            rest = ""
            while part := file.read(PIECE):
                rest += part
                cut = max(rest.rfind(" "), rest.rfind("\n"))
                while cut > 0 and rest[cut - 1].isspace():
                    cut -= 1  # a run of white space stays whole: no token reaches across the cut
                if cut > 0 or len(rest) > 64 * PIECE:
                    yield rest[:cut or None], False
                    rest = rest[cut:] if cut else ""
            yield rest, True
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: the byte {e.object[e.start]:#04x} can't be decoded ({e.reason})") from e
    except (json.JSONDecodeError, KeyError, RecursionError, TypeError) as e:
        raise UserError(f"{path}, line {line}: expected a JSON object with a text field \"text\" ({type(e).__name__}: {e})") from e
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is damaged or cut short ({e})") from e


def stream(files, held_out=None):
    """The pieces of all files; held_out True or False: every 20th of them or the others, each a document of its own."""
    n = 0
    for path in files:
        for text, ends in pieces(path):
            n += 1
            if held_out is None:
                yield text, ends
            elif (n % 20 == 0) == held_out:
                yield text, True


def head(files, chars):
    """The first `chars` characters of the files, in pieces."""
    for text, _ in stream(files):
        yield text[:chars]
        chars -= len(text)
        if chars <= 0:
            return


def make_tokenizer(cfg):
    """(name, tokenizer) of the key `tokenizer`; a new BPE is trained and written into the out folder."""
    if not cfg.tokenizer.startswith("bpe:"):
        return cfg.tokenizer, data.load_tokenizer(cfg.tokenizer)
    try:
        size = int(cfg.tokenizer.removeprefix("bpe:"))
        assert 257 <= size <= 65536
    except (ValueError, AssertionError):
        raise UserError(f"tokenizer={cfg.tokenizer!r}: expected bpe:SIZE with a size from 257 to 65536") from None
    ranks = data.train_bpe(head(cfg.input, cfg.bpe_chars), size)
    path = Path(cfg.out) / f"bpe{size}-{data.fingerprint(*ranks)[:8]}.tiktoken"  # same name, same content
    data.save_bpe(ranks, path)
    return str(path), data.load_tokenizer(str(path))


def main(argv):
    cfg, _ = config.parse(Config, argv, __doc__, most=0, files=False)
    out = Path(cfg.out)
    if not cfg.input:
        raise UserError("--input FILES is needed: .txt or .jsonl, plain, .gz or .xz")
    for path in (*cfg.input, *cfg.val):
        if not Path(path).is_file():
            raise UserError(f"{path} is a folder; name its files: {path}/*.txt" if Path(path).is_dir() else f"no input file {path}")
    if same := {Path(p).resolve() for p in cfg.input} & {Path(p).resolve() for p in cfg.val}:
        raise UserError(f"{same.pop()} is both input and val; leave --val out to hold a part of the input out")
    asked = {split: [[Path(p).name, Path(p).stat().st_size] for p in files] for split, files in (("input", cfg.input), ("val", cfg.val))}
    asked |= dict(tokenizer=cfg.tokenizer, bpe_chars=cfg.bpe_chars)
    if (out / "meta.json").is_file() and not cfg.force:
        meta = data.load_meta(out)
        if meta.get("asked") != asked:
            raise UserError(f"{out} holds a dataset of other files or keys; --force writes over it, --out=… makes another")
        data.load_tokens(out, "train"), data.load_tokens(out, "val")
        print(f"{out}: already prepared ({meta['train_tokens']:,} train tokens, {meta['val_tokens']:,} val tokens)")
        return
    name, tokenizer = make_tokenizer(cfg)
    (out / "meta.json").unlink(missing_ok=True)
    counts = {}
    with config.progress(None, "encode", "char", unit_scale=True) as bar:
        counts["train"] = data.write_tokens(out / "train.bin", stream(cfg.input, None if cfg.val else False), tokenizer, bar)
        counts["val"] = data.write_tokens(out / "val.bin", stream(cfg.val) if cfg.val else stream(cfg.input, True), tokenizer, bar)
    if counts["train"] < 2:
        raise UserError("the input holds no text")
    if counts["val"] < 2:
        raise UserError("the files for val hold no text" if cfg.val else f"the input is too short to hold a part out ({counts['train']:,} tokens); name a file: --val FILES")
    data.write_meta(out, name, tokenizer, counts, asked=asked)
    print(f"{out}: {counts['train']:,} train tokens, {counts['val']:,} val tokens, tokenizer {name} ({tokenizer.n_vocab} tokens)")


if __name__ == "__main__":
    config.run(main)
