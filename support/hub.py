"""Datasets of the Hugging Face hub: parquet files with a column `text`, streamed.

Each file is encoded into two part files, written atomically; an interrupted run resumes at the
first file without them. In the end the parts are joined into train.bin and val.bin.

The held-out documents are nanoGPT's: 0.05% of all, in the order of a permutation with seed 2357
(`train_test_split` of the datasets package). The others keep the hub's order.
"""
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from support.runtime import UserError, progress

import numpy as np

from support.cli import key, parse
from support.files import atomic_write, fingerprint
from support.prepare import finished, write_meta, write_tokens
from support.tokens import load_tokenizer, tokenizer_hash

HELD_OUT, SEED = 0.0005, 2357  # nanoGPT's
BYTES_PER_TOKEN = 3.5          # of text; a low estimate, for the check of disk space

@dataclass(frozen=True)
class Config:
    num_docs: int | None = key(None, "use only the first documents (none: all)", low=100)
    source: str | None = key(None, "a folder with the hub's parquet files (none: the hub)")
    out: str | None = key(None, "folder to write to (none: next to prepare.py)")
    tokenizer: str = key("gpt2", "gpt2, stdlib or the path of a .tiktoken file")
    force: bool = key(False, "overwrite an existing dataset")

class File(NamedTuple):
    """A parquet file and the documents to take from it."""
    url: str
    first: int       # number of its first document in the dataset
    rows: int        # documents to take
    text_bytes: int  # size of their texts

def parquet_files(source, num_docs):
    """The train-*.parquet files under a folder or an hf:// address, sorted by name, up to num_docs
    documents (None: all): [File]. Reads only the files' footers."""
    files, first = [], 0
    try:
        import fsspec
        import pyarrow.parquet
        fs, root = fsspec.core.url_to_fs(source)
        paths = sorted(fs.glob(f"{root}/**/train-*.parquet"))
        with progress(len(paths), "list", "file", leave=False) as bar:
            for path in paths:
                with fs.open(path, block_size=1 << 16) as file:
                    footer = pyarrow.parquet.read_metadata(file)
                column, rows = footer.schema.names.index("text"), footer.num_rows
                groups = [footer.row_group(i).column(column) for i in range(footer.num_row_groups)]
                size = sum(group.total_uncompressed_size for group in groups)
                take = min(rows, (num_docs or math.inf) - first)
                url = fs.unstrip_protocol(path)
                files.append(File(url, first, take, size * take // max(1, rows)))
                first += take
                bar.update()
                if first == num_docs:
                    break
    except ImportError as e:
        raise UserError("datasets of the hub need: pip install -r requirements.txt") from e
    except Exception as e:  # offline, the hub's client raises one of many kinds
        raise UserError(f"{source} can't be read ({type(e).__name__}: {e}); without a network, "
                        "copy its train-*.parquet files here and use --source=FOLDER") from e
    if not files:
        raise UserError(f"no train-*.parquet under {source}; set --source to the folder with them")
    return files

def held_out_of(n):
    """Numbers of the documents held out of n, in writing order; at least 20, for small trials."""
    return np.random.default_rng(SEED).permutation(n)[:max(20, math.ceil(HELD_OUT * n))]

def encode(file, held_out, train, val, tokenizer, bar):
    """Encode a File into two part files, the documents numbered in held_out into val, the others
    into train. val is written last, so if it exists both are complete."""
    import datasets
    held_out_texts = []

    def documents():
        number = file.first
        try:
            rows = datasets.load_dataset("parquet", data_files=file.url, columns=["text"],
                                         split="train", streaming=True)
            for batch in rows.take(file.rows).iter(256):
                for text in batch["text"]:
                    if number in held_out:
                        held_out_texts.append((text, True))
                    else:
                        yield text, True
                    number += 1
                bar.update(len(batch["text"]))
        except Exception as e:  # from the network or the file
            raise UserError(f"{file.url} can't be read to its end ({type(e).__name__}: {e}); "
                            "finished files are kept: run the same command to resume") from e

    write_tokens(train, documents(), tokenizer)
    write_tokens(val, held_out_texts, tokenizer)

def encode_missing(out, files, train, val, held_out, tokenizer):
    """Encode the files whose parts train[i], val[i] don't exist yet."""
    missing = [i for i in range(len(files)) if not val[i].is_file()]
    text_bytes = sum(f.text_bytes for f in files) + sum(files[i].text_bytes for i in missing)
    need, free = 2 * text_bytes / BYTES_PER_TOKEN, shutil.disk_usage(out).free  # parts and result
    if free < need:
        raise UserError(f"{out} is on a disk with {free / 1e9:.1f} GB free but needs "
                        f"{need / 1e9:.1f} GB, half of them temporarily; free some space, or "
                        "choose another folder: --out=FOLDER")
    (out / "meta.json").unlink(missing_ok=True)
    n = sum(file.rows for file in files)
    done = n - sum(files[i].rows for i in missing)
    held_out = set(held_out.tolist())
    with progress(n, "encode", "doc", initial=done, unit_scale=True) as bar:
        for i in missing:
            encode(files[i], held_out, train[i], val[i], tokenizer, bar)

def join_train(parts, path):
    """Concatenate the parts into path; returns the number of tokens."""
    with atomic_write(path) as whole:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole, 1 << 24)
    return path.stat().st_size // 2

def join_val(parts, path, held_out, end_of_text):
    """Write the parts' documents into path in held_out's order; returns the number of tokens."""
    tokens = np.concatenate([np.fromfile(part, "<u2") for part in parts])
    ends = np.flatnonzero(tokens == end_of_text) + 1
    documents = np.split(tokens, ends[:-1])  # sorted by number
    with atomic_write(path) as file:
        for rank in held_out.argsort().argsort():
            file.write(documents[rank].tobytes())
    return len(tokens)

def prepare(argv, doc, script, hub, documents):
    """The command of a prepare.py with this docstring and path, for the dataset at an hf:// address
    with this number of documents. Returns the exit status, None for success."""
    cfg, _ = parse(Config, argv, doc, most=0, files=False)
    out, source = Path(cfg.out or Path(script).resolve().parent), cfg.source or hub
    if not cfg.force and (meta := finished(out)):
        if (meta["tokenizer"], meta.get("num_docs")) != (cfg.tokenizer, cfg.num_docs):
            raise UserError(f"{out} holds a dataset with num_docs={meta.get('num_docs')} and "
                            f"tokenizer={meta['tokenizer']!r}; overwrite it with --force, or "
                            "choose another folder: --out=FOLDER")
        print(f"{out}: already prepared ({meta['train_tokens']:,} train tokens, "
              f"{meta['val_tokens']:,} val tokens)")
        return
    tokenizer = load_tokenizer(cfg.tokenizer)
    files = parquet_files(source, cfg.num_docs)
    n = sum(file.rows for file in files)
    if cfg.num_docs is None and n != documents:
        raise UserError(f"{source} has {n:,} documents in {len(files)} files instead of "
                        f"{documents:,}; use these anyway with --num_docs={n}")
    held_out = held_out_of(n)
    digest = fingerprint(repr([file[1:] for file in files]).encode(),
                         tokenizer_hash(cfg.tokenizer, tokenizer).encode())
    parts = out / f"parts-{digest}"
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"can't create {parts} ({e.strerror}); choose another: --out=FOLDER") from e
    train = [parts / f"train-{i:05}.bin" for i in range(len(files))]
    val = [parts / f"val-{i:05}.bin" for i in range(len(files))]
    try:
        encode_missing(out, files, train, val, held_out, tokenizer)
    except KeyboardInterrupt:
        done = sum(part.is_file() for part in val)
        print(f"\nstopped; {done} of {len(files)} files are done; run the same command to resume",
              file=sys.stderr)
        return 130
    counts = dict(train=join_train(train, out / "train.bin"),
                  val=join_val(val, out / "val.bin", held_out, tokenizer.eot_token))
    write_meta(out, cfg.tokenizer, tokenizer, counts, source=source, source_hash=digest,
               num_docs=cfg.num_docs, documents=n, val_documents=len(held_out))
    for parts in out.glob("parts-*"):  # including those of earlier runs with other keys
        shutil.rmtree(parts)
    print(f"{out}: {counts['train']:,} train tokens, {counts['val']:,} val tokens from "
          f"{n:,} documents, hash {digest}")
