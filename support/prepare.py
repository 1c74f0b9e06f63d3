"""Writing a dataset: token files and meta.json. The prepare.py scripts under data/ use it."""
import json
import os
import reprlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from support.runtime import UserError, progress

import numpy as np

from support.files import atomic_write, lock_folder, unlock
from support.tokens import cut, load_meta, load_tokens, tokenizer_hash, tokenizer_of_dataset

def encode_into(file, pieces, tokenizer, bar=None):
    """Encode a stream of (text, whether a document ends there) into an open file, on all cores.
    An end-of-text token in the text itself is ordinary text. Returns the number of tokens.
    bar: advanced by the number of characters."""
    if tokenizer.n_vocab > 1 << 16:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens, over 65536")
    pieces = cut(pieces)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while group := list(islice(pieces, 256)):  # so that memory use does not grow
            ids, encoded = [], pool.map(tokenizer.encode_ordinary, (text for text, _ in group))
            for tokens, (_, ends) in zip(encoded, group, strict=True):
                ids += tokens + [tokenizer.eot_token] * ends
            file.write(np.array(ids, dtype="<u2").tobytes())
            if bar is not None:
                bar.update(sum(len(text) for text, _ in group))
    return file.tell() // 2

def write_tokens(path, pieces, tokenizer):
    """encode_into for a file by its path, written completely or not at all."""
    with atomic_write(path) as file:
        return encode_into(file, pieces, tokenizer)

@contextmanager
def locked(folder, doing="preparing data", key="out"):
    """`with locked(folder)`: create a folder and keep other processes from writing data in it."""
    lock = lock_folder(folder, doing, key)
    try:
        yield
    finally:
        unlock(lock)

@contextmanager
def replacing(folder):
    """`with replacing(folder) as files`: write files["train"] and files["val"]. They take the place
    of the old ones, and meta.json goes, only once both are complete."""
    meta = Path(folder, "meta.json")
    with ExitStack() as stack:
        files = {split: stack.enter_context(atomic_write(meta.with_name(f"{split}.bin")))
                 for split in ("train", "val")}
        yield files
        for file in files.values():
            file.flush()  # the disk may be full
        meta.unlink(missing_ok=True)

def write_meta(folder, tokenizer_name, tokenizer, counts, **more):
    """Write meta.json. It comes last: a dataset without it is unfinished."""
    meta = dict(tokenizer=tokenizer_name, tokenizer_hash=tokenizer_hash(tokenizer_name, tokenizer),
                vocab_size=tokenizer.n_vocab)
    meta |= {f"{split}_tokens": n for split, n in counts.items()} | more
    with atomic_write(Path(folder) / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode() + b"\n")
    print(f"{folder}: {counts['train']:,} train tokens, {counts['val']:,} val tokens, tokenizer "
          f"{tokenizer_name} ({tokenizer.n_vocab} tokens)")

def write_dataset(folder, splits, tokenizer_name, tokenizer, **more):
    """Write train.bin and val.bin from {split: stream of (text, whether a document ends there)},
    then meta.json with the entries `more`."""
    with replacing(folder) as files, progress(None, "encode", "char", unit_scale=True) as bar:
        counts = {split: encode_into(files[split], pieces, tokenizer, bar)
                  for split, pieces in splits.items()}
        if min(counts.values()) < 2:
            raise UserError(f"the text is too short: {counts['train']:,} train and "
                            f"{counts['val']:,} val tokens; use more text")
    write_meta(folder, tokenizer_name, tokenizer, counts, **more)

def already_prepared(folder, wanted, replace=False):
    """True, and a line printed, if a folder has an intact dataset with the entries `wanted` in
    meta.json. UserError: it has another dataset, or an unknown one, and replace=False."""
    folder = Path(folder).resolve()  # not a name under data/
    found = {}
    try:
        meta = load_meta(folder)
        found = {name: meta.get(name) for name in wanted}
        if found == wanted:
            load_tokens(folder, "train"), load_tokens(folder, "val"), tokenizer_of_dataset(folder)
            print(f"{folder}: already prepared")
            return True
    except UserError:  # missing or damaged
        files = [folder / name for name in ("meta.json", "train.bin", "val.bin")]
        if found or not any(file.exists() for file in files):
            return False
    if not replace:
        found = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in found.items())
        raise UserError(f"{folder} holds a dataset of other files or keys "
                        f"({found or 'its meta.json is missing or damaged'}); overwrite it with "
                        "--force or choose another folder: --out=FOLDER")
    return False
