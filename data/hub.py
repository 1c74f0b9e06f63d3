"""Datasets of the Hugging Face hub: parquet files with a column `text`, encoded one after the other.

Each file becomes a part, written whole or not at all, so what was stopped goes on where it was. Once all parts are
there they are joined to train.bin and val.bin. The files are streamed: nothing of the download stays on the disk, and
memory stays flat.

Held out is what nanoGPT holds out: 0.05% of the documents by a permutation of seed 2357 (`train_test_split` of the
package datasets), in the permutation's order. The others keep the hub's order; training draws its blocks at random.
"""
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import config
import data
from config import UserError, key

HELD_OUT, SEED = 0.0005, 2357  # nanoGPT's
BYTES_A_TOKEN = 3.5            # of text, at the least, for the check of disk space


@dataclass(frozen=True)
class Config:
    num_docs: int | None = key(None, "the first so many documents only, for a small try (none: all)", low=100)
    source: str | None = key(None, "a folder with the hub's parquet files, brought by hand (none: the hub)")
    out: str | None = key(None, "folder to write to (none: beside prepare.py)")
    tokenizer: str = key("gpt2", "gpt2, stdlib or the path of a .tiktoken file")
    force: bool = key(False, "write over a dataset that is there")


class File(NamedTuple):
    """A parquet file, of which the documents first … first + rows - 1 of the dataset are taken."""
    url: str
    first: int
    rows: int
    text_bytes: int  # of the column `text`


def parquet_files(source, num_docs):
    """The train-*.parquet under a folder or an hf:// address, in the order of their names, up to num_docs documents:
    [File], from the files' footers alone. UserError: out of reach, none there, one damaged or without text."""
    files, first = [], 0
    try:
        import fsspec
        import pyarrow.parquet
        fs, root = fsspec.core.url_to_fs(source)
        paths = sorted(fs.glob(f"{root}/**/train-*.parquet"))
        with config.progress(len(paths), "list", "file", leave=False) as bar:
            for path in paths:
                with fs.open(path, block_size=1 << 16) as file:
                    footer = pyarrow.parquet.read_metadata(file)
                column, rows = footer.schema.names.index("text"), footer.num_rows
                size = sum(footer.row_group(i).column(column).total_uncompressed_size for i in range(footer.num_row_groups))
                taken = min(rows, (num_docs or math.inf) - first)
                files.append(File(fs.unstrip_protocol(path), first, taken, size * taken // max(1, rows)))
                first += taken
                bar.update()
                if first == num_docs:
                    break
    except Exception as e:  # offline the hub's client raises one of many kinds
        if isinstance(e, ImportError):
            raise UserError("the hub's datasets need the package datasets: pip install -r requirements.txt") from e
        raise UserError(f"{source} can't be read ({type(e).__name__}: {e}); with no network, bring its train-*.parquet here and name their folder: --source=FOLDER") from e
    if not files:
        raise UserError(f"no train-*.parquet under {source}; name the folder of the hub's parquet files")
    return files


def held_out_of(n):
    """The numbers of the documents held out of n, in the order in which they are written. At least 20: a small try, too,
    has some text to evaluate on."""
    return np.random.default_rng(SEED).permutation(n)[:max(20, math.ceil(HELD_OUT * n))]


def encode(file, held_out, train, val, tokenizer, bar):
    """Encode a File into two parts: the documents whose number is in held_out into val, the others into train.
    val is written last: where it is, both are whole."""
    import datasets
    aside = []

    def documents():
        number = file.first
        try:
            rows = datasets.load_dataset("parquet", data_files=file.url, columns=["text"], split="train", streaming=True)
            for batch in rows.take(file.rows).iter(256):
                for text in batch["text"]:
                    if number in held_out:
                        aside.append((text, True))
                    else:
                        yield text, True
                    number += 1
                bar.update(len(batch["text"]))
        except Exception as e:  # the network's or the file's
            raise UserError(f"{file.url} can't be read to its end ({type(e).__name__}: {e}); what is done is kept: the same command goes on") from e

    data.write_tokens(train, documents(), tokenizer)
    data.write_tokens(val, aside, tokenizer)


def join(parts, path):
    """Write the parts one after the other into path; the number of tokens."""
    with data.replacing(path) as whole:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole, 1 << 24)
    return path.stat().st_size // 2


def join_val(parts, path, held_out, end):
    """As `join`, for the parts of held-out documents: brought into the order of held_out. end: the end-of-text token."""
    tokens = np.concatenate([np.fromfile(part, "<u2") for part in parts])
    documents = np.split(tokens, np.flatnonzero(tokens == end)[:-1] + 1)  # in the order of their numbers
    with data.replacing(path) as file:
        for i in held_out.argsort().argsort():
            file.write(documents[i].tobytes())
    return len(tokens)


def prepared(out, cfg):
    """meta.json of the dataset in the folder if it is whole and is what cfg asks for, else None. UserError: it is another."""
    try:
        meta = data.load_meta(out)
        data.load_tokens(out, "train"), data.load_tokens(out, "val")
    except UserError:
        return None
    if (meta["tokenizer"], meta.get("num_docs")) != (cfg.tokenizer, cfg.num_docs):
        raise UserError(f"{out} holds a dataset of num_docs={meta.get('num_docs')} and tokenizer={meta['tokenizer']!r}; --force writes over it, --out=… makes another")
    return meta


def prepare(argv, doc, folder, hub, documents):
    """The command of a prepare.py: its arguments, docstring and folder; the dataset's hf:// address and how many documents it
    has. Returns the exit status (None: done)."""
    cfg, _ = config.parse(Config, argv, doc, most=0, files=False)
    out, source = Path(cfg.out or folder), cfg.source or hub
    meta = None if cfg.force else prepared(out, cfg)
    if meta is not None:
        print(f"{out}: already prepared ({meta['train_tokens']:,} train tokens, {meta['val_tokens']:,} val tokens)")
        return
    tokenizer = data.load_tokenizer(cfg.tokenizer)
    files = parquet_files(source, cfg.num_docs)
    n = sum(file.rows for file in files)
    if cfg.num_docs is None and n != documents:
        raise UserError(f"{source} has {n:,} documents in {len(files)} files instead of {documents:,}: a file is missing, or they were changed; --num_docs={n} takes what is there")
    held_out = held_out_of(n)

    digest = data.fingerprint(repr([file[1:] for file in files]).encode(), data.tokenizer_hash(cfg.tokenizer, tokenizer).encode())
    parts = out / f"parts-{digest}"
    train, val = ([parts / f"{split}-{i:05}.bin" for i in range(len(files))] for split in ("train", "val"))
    left = [i for i in range(len(files)) if not val[i].is_file()]
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{parts} can't be made ({e.strerror}); choose another folder: --out=…") from e
    tokens = lambda which: sum(file.text_bytes for file in which) / BYTES_A_TOKEN
    need, free = 2 * (tokens(files) + tokens(files[i] for i in left)), shutil.disk_usage(out).free  # 2 bytes a token, once in parts and once joined
    if free < need:
        raise UserError(f"{out} is on a disk with {free / 1e9:.1f} GB free; {need / 1e9:.1f} GB are needed there, half of them at the end; free some space, or choose another folder: --out=…")

    (out / "meta.json").unlink(missing_ok=True)
    try:
        with config.progress(n, "encode", "doc", initial=n - sum(files[i].rows for i in left), unit_scale=True) as bar:
            for i in left:
                encode(files[i], set(held_out.tolist()), train[i], val[i], tokenizer, bar)
    except KeyboardInterrupt:
        print(f"\nstopped; {sum(part.is_file() for part in val)} of {len(files)} files are done, the same command goes on from there", file=sys.stderr)
        return 130
    counts = dict(train=join(train, out / "train.bin"), val=join_val(val, out / "val.bin", held_out, tokenizer.eot_token))
    data.write_meta(out, cfg.tokenizer, tokenizer, counts, source=source, source_hash=digest, num_docs=cfg.num_docs, documents=n, val_documents=len(held_out))
    for done in out.glob("parts-*"):  # these, and those of an attempt with other keys
        shutil.rmtree(done)
    print(f"{out}: {counts['train']:,} train tokens, {counts['val']:,} val tokens from {n:,} documents, hash {digest}")
