"""A dataset from your own text.

    python data/text/prepare.py --input book.txt notes/*.jsonl.gz --out data/mine
    python data/text/prepare.py --input a.jsonl.xz --val b.jsonl.xz --tokenizer=bpe:4096
    python train.py config/stdlib_ntp.py --dataset=mine --out_dir=out/mine

Reads UTF-8 text, plain, .gz or .xz: .txt (one document) or .jsonl (one per line, in the field
`text`). Input is streamed, so memory use stays constant. Without --val, every 20th piece of about
16,000 characters is held out. bpe:N trains a tokenizer with N tokens and stores it in the folder,
with a hash of its content in the name; other datasets can use it by its path. Running the command
again on the same files (by name and size) does nothing.
"""
import gzip
import json
import lzma
import sys
import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.runtime import UserError, progress, run

from support.bpe import save_bpe, train_bpe
from support.cli import key, parse
from support.files import fingerprint
from support.prepare import write_meta, write_tokens
from support.tokens import load_meta, load_tokenizer, load_tokens

PIECE = 16_000  # characters read at a time

@dataclass(frozen=True)
class Config:
    input: tuple[str, ...] = key((), "files to train on")
    val: tuple[str, ...] = key((), "held-out files; none: every 20th piece of the input")
    out: str = key("data/mine", "folder to write to")
    tokenizer: str = key("gpt2", "gpt2, stdlib, bpe:SIZE or the path of a .tiktoken file")
    bpe_chars: int = key(16_000_000, "characters on which bpe:SIZE is trained", low=1000)
    force: bool = key(False, "overwrite an existing dataset")

def jsonl_pieces(file, path):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError(f"text is {type(text).__name__}")
            except (json.JSONDecodeError, KeyError, RecursionError, TypeError) as e:
                raise UserError(f"{path}, line {number}: expected a JSON object with a text field "
                                f"\"text\" ({type(e).__name__}: {e})") from e
            yield text, True

def txt_pieces(file):
    rest = ""
    while part := file.read(PIECE):
        rest += part
        cut = max(rest.rfind(" "), rest.rfind("\n"))
        while cut > 0 and rest[cut - 1].isspace():
            cut -= 1  # never inside white space, so that no token crosses the cut
        if cut > 0 or len(rest) > 64 * PIECE:  # or an endless word
            cut = cut or len(rest)
            yield rest[:cut], False
            rest = rest[cut:]
    yield rest, True

def pieces(path):
    """A file as a stream of (text, whether a document ends there)."""
    path = Path(path)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    kind = path.suffix if opener is open else path.with_suffix("").suffix
    if kind not in (".txt", ".jsonl"):
        raise UserError(f"{path}: expected .txt or .jsonl, plain, .gz or .xz")
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from jsonl_pieces(file, path) if kind == ".jsonl" else txt_pieces(file)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: can't decode the byte {e.object[e.start]:#04x} "
                        f"({e.reason})") from e
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is damaged or cut short ({e})") from e

def stream(files, held_out=None):
    """The pieces of all files. held_out=True: only each 20th, False: the others; as documents."""
    for n, (text, ends) in enumerate(chain.from_iterable(map(pieces, files)), 1):
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

def get_tokenizer(cfg):
    """(name, tokenizer) of the key `tokenizer`; bpe:SIZE trains one and saves it."""
    kind, _, size = cfg.tokenizer.partition(":")
    if kind != "bpe":
        return cfg.tokenizer, load_tokenizer(cfg.tokenizer)
    if not size.isdecimal() or not 257 <= int(size) <= 65536:
        raise UserError(f"tokenizer={cfg.tokenizer!r}: expected bpe:SIZE with a size from "
                        "257 to 65536")
    ranks = train_bpe(head(cfg.input, cfg.bpe_chars), int(size))
    path = str(Path(cfg.out) / f"bpe{int(size)}-{fingerprint(*ranks)[:8]}.tiktoken")
    save_bpe(ranks, path)
    return path, load_tokenizer(path)

def check_files(cfg):
    if not cfg.input:
        raise UserError("--input FILES is needed: .txt or .jsonl, plain, .gz or .xz")
    for path in map(Path, cfg.input + cfg.val):
        if path.is_dir():
            raise UserError(f"{path} is a folder; name its files: {path}/*.txt")
        if not path.is_file():
            raise UserError(f"no input file {path}")
    both = {Path(p).resolve() for p in cfg.input} & {Path(p).resolve() for p in cfg.val}
    if both:
        raise UserError(f"{both.pop()} is both input and val; without --val, a part of the input "
                        "is held out")

def names_and_sizes(files):
    return [[Path(path).name, Path(path).stat().st_size] for path in files]

def main(argv):
    cfg, _ = parse(Config, argv, __doc__, most=0, files=False)
    check_files(cfg)
    out = Path(cfg.out)
    asked = dict(input=names_and_sizes(cfg.input), val=names_and_sizes(cfg.val),
                 tokenizer=cfg.tokenizer, bpe_chars=cfg.bpe_chars)
    if (out / "meta.json").is_file() and not cfg.force:
        meta = load_meta(out)
        if meta.get("asked") != asked:
            raise UserError(f"{out} holds a dataset of other files or keys; overwrite it with "
                            "--force or choose another folder: --out=FOLDER")
        load_tokens(out, "train"), load_tokens(out, "val")  # raise if damaged
        print(f"{out}: already prepared ({meta['train_tokens']:,} train tokens, "
              f"{meta['val_tokens']:,} val tokens)")
        return
    name, tokenizer = get_tokenizer(cfg)
    (out / "meta.json").unlink(missing_ok=True)
    train, val = stream(cfg.input), stream(cfg.val)
    if not cfg.val:
        train, val = stream(cfg.input, held_out=False), stream(cfg.input, held_out=True)
    with progress(None, "encode", "char", unit_scale=True) as bar:
        counts = dict(train=write_tokens(out / "train.bin", train, tokenizer, bar),
                      val=write_tokens(out / "val.bin", val, tokenizer, bar))
    if counts["train"] < 2:
        raise UserError("the input holds no text")
    if counts["val"] < 2:
        raise UserError("the --val files hold no text" if cfg.val else
                        f"the input is too short to hold out a part ({counts['train']:,} tokens); "
                        "name held-out files: --val FILES")
    write_meta(out, name, tokenizer, counts, asked=asked)
    print(f"{out}: {counts['train']:,} train tokens, {counts['val']:,} val tokens, "
          f"tokenizer {name} ({tokenizer.n_vocab} tokens)")

if __name__ == "__main__":
    run(main)
