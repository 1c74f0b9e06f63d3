"""Datasets of the Hugging Face hub: parquet files with a column of texts, streamed.

Each file is encoded into a part file, written atomically; an interrupted run resumes at the first
file without one. In the end the documents of all parts are divided into train.bin and val.bin.

The held-out documents are nanoGPT's: 0.05% of all, in the order of a permutation with seed 2357
(`train_test_split` of the datasets package). The others keep the hub's order.
"""
import math
import reprlib
import shutil
import sys
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from support.runtime import UserError, progress

import numpy as np

from support.cli import key, parse
from support.files import fingerprint
from support.prepare import already_prepared, locked, replacing, write_meta, write_tokens
from support.tokens import load_tokenizer, tokenizer_hash

BYTES_PER_TOKEN = 3.5  # of text; a low estimate, for the check of disk space

@dataclass(frozen=True)
class Config:
    num_docs: int | None = key(None, "use only the first documents (none: all)", low=21)
    source: str | None = key(None, "a folder with the hub's parquet files (none: the hub)")
    field: str = key("text", "the column that holds the text")
    out: str | None = key(None, "folder to write to (none: next to prepare.py)")
    tokenizer: str = key("gpt2", "gpt2, stdlib or the path of a .tiktoken file")
    force: bool = key(False, "overwrite an existing dataset")

class File(NamedTuple):
    """A parquet file and the documents to take from it."""
    url: str
    first: int       # number of its first document in the dataset
    rows: int        # documents to take
    text_bytes: int  # size of their texts

def parquet_files(source, cfg):
    """The train-*.parquet files under a folder or an hf:// address, sorted by name, up to num_docs
    documents (None: all): [File]. Reads only the files' footers."""
    num_docs, field = cfg.num_docs or math.inf, cfg.field
    files, first = [], 0
    try:
        import fsspec
        import pyarrow.parquet
        fs, root = fsspec.core.url_to_fs(source)
        paths = sorted(path for path in fs.find(root) if Path(path).match("train-*.parquet"))
        with progress(len(paths), "list", "file", leave=False) as bar:
            for path in paths:
                with fs.open(path, block_size=1 << 16) as file:
                    footer = pyarrow.parquet.read_metadata(file)
                names, rows = footer.schema.to_arrow_schema().names, footer.num_rows
                if field not in names:
                    raise UserError(f"{path} has no column {field!r}, only {', '.join(names)}; "
                                    "name one of them with --field")
                columns = [i for i in range(footer.num_columns)
                           if footer.schema.column(i).path.split(".")[0] == field]
                size = sum(footer.row_group(i).column(column).total_uncompressed_size
                           for i in range(footer.num_row_groups) for column in columns)
                take = min(rows, num_docs - first)
                size = size * take // max(1, rows)
                files.append(File(fs.unstrip_protocol(path), first, take, size))
                first += take
                bar.update()
                if first == num_docs:
                    break
    except UserError:
        raise
    except Exception as e:  # offline, the hub's client raises one of many kinds
        raise UserError(f"{source} can't be read ({type(e).__name__}: {e}); without a network, "
                        "copy its train-*.parquet files here and use --source=FOLDER") from e
    if not files:
        raise UserError(f"no train-*.parquet under {source}; set --source to the folder with them")
    return files

def held_out_of(n):
    """Numbers of the documents held out of n, in writing order; at least 20, for small trials."""
    return np.random.default_rng(2357).permutation(n)[:max(20, math.ceil(0.0005 * n))]

def documents(file, field, bar):
    """The documents of a File: (text, True)."""
    import fsspec
    import pyarrow.parquet
    try:
        with fsspec.open(file.url) as source:
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(256, columns=[field])
            column = chain.from_iterable(batch[field].to_pylist() for batch in batches)
            for row, text in enumerate(islice(column, file.rows)):
                if not isinstance(text, str):
                    raise UserError(f"{file.url}, row {row} (the first is 0): {reprlib.repr(text)} "
                                    "is not text; remove this row, or set --num_docs to use only "
                                    "the documents before it")
                yield text, True
                bar.update()
    except UserError:
        raise
    except Exception as e:  # from the network or the file
        raise UserError(f"{file.url} can't be read to its end ({type(e).__name__}: {e}); "
                        "finished files are kept: run the same command to resume") from e

def encode_missing(out, files, parts, tokenizer, field):
    """Encode the files whose parts don't exist yet."""
    missing = [(file, part) for file, part in zip(files, parts, strict=True) if not part.is_file()]
    text_bytes = sum(file.text_bytes for file in [*files, *(file for file, _ in missing)])
    need, free = 2 * text_bytes / BYTES_PER_TOKEN, shutil.disk_usage(out).free  # parts and result
    if free < need:
        raise UserError(f"{out} has {free / 1e9:.1f} GB free but needs {need / 1e9:.1f} GB, half "
                        "of them temporarily; choose another folder: --out=FOLDER")
    n = sum(file.rows for file in files)
    done = n - sum(file.rows for file, _ in missing)
    with progress(n, "encode", "doc", initial=done, unit_scale=True) as bar:
        for file, part in missing:
            write_tokens(part, documents(file, field, bar), tokenizer)

def divide(out, files, parts, held_out, end_of_text):
    """Divide the parts' documents into train.bin and val.bin, the latter in held_out's order.
    Returns the number of tokens of each."""
    val = dict.fromkeys(held_out.tolist())  # {number: document}
    with replacing(out) as split_files:
        for file, part in zip(files, parts, strict=True):
            tokens = np.fromfile(part, "<u2")
            ends = np.flatnonzero(tokens == end_of_text) + 1
            for number, document in enumerate(np.split(tokens, ends[:-1]), file.first):
                if number in val:
                    val[number] = document.tobytes()
                else:
                    split_files["train"].write(document)
        split_files["val"].writelines(val.values())
        return {split: file.tell() // 2 for split, file in split_files.items()}

def write_dataset(cfg, out, files, tokenizer, digest, **more):
    """Encode the files and write the dataset, with the entries `more` in meta.json. Returns the
    exit status, None for success."""
    folder = out / f"parts-{digest}"
    folder.mkdir(exist_ok=True)
    parts = [folder / f"{i:05}.bin" for i in range(len(files))]
    try:
        encode_missing(out, files, parts, tokenizer, cfg.field)
    except KeyboardInterrupt:
        done = sum(part.is_file() for part in parts)
        print(f"\nstopped; {done} of {len(files)} files are done; run the same command to resume",
              file=sys.stderr)
        return 130
    held_out = held_out_of(n := sum(file.rows for file in files))
    counts = divide(out, files, parts, held_out, tokenizer.eot_token)
    write_meta(out, cfg.tokenizer, tokenizer, counts, source_hash=digest, documents=n,
               val_documents=len(held_out), **more)
    for folder in out.glob("parts-" + 16 * "[0-9a-f]"):  # those of other keys, too
        shutil.rmtree(folder)

def prepare(argv, doc, script, name, documents):
    """The command of a prepare.py with this docstring and path, for the hub's dataset `name` with
    this number of documents. Returns the exit status, None for success."""
    cfg, _ = parse(Config, argv, doc, most=0, files=False)
    out, source = Path(cfg.out or Path(script).parent), cfg.source or f"hf://datasets/{name}"
    wanted = dict(tokenizer=cfg.tokenizer, num_docs=cfg.num_docs,
                  field=None if cfg.field == "text" else cfg.field,  # as in older datasets
                  **({"source": cfg.source} if cfg.source else {}))
    with locked(out):
        if not cfg.force and already_prepared(out, wanted):
            return
        tokenizer, files = load_tokenizer(cfg.tokenizer), parquet_files(source, cfg)
        n = sum(file.rows for file in files)
        if n <= 20:
            raise UserError(f"{source} has only {n} documents: 20 are held out; use more")
        if n < (cfg.num_docs or 0):
            raise UserError(f"{source} has only {n:,} documents; use them with --num_docs={n}")
        if cfg.num_docs is None and n != documents:
            raise UserError(f"{source} has {n:,} documents in {len(files)} files instead of "
                            f"{documents:,}; use these anyway with --num_docs={n}")
        digest = fingerprint(repr([file[1:] for file in files]).encode(), cfg.field.encode(),
                             tokenizer_hash(cfg.tokenizer, tokenizer).encode())
        return write_dataset(cfg, out, files, tokenizer, digest, source=source,
                             num_docs=cfg.num_docs, field=wanted["field"])
