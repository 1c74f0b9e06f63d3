"""Writing a dataset: token files and meta.json. The prepare.py scripts under data/ use it."""
import json
import os
import reprlib
from pathlib import Path

from support.runtime import UserError, progress

import numpy as np

from support.files import atomic_write
from support.tokens import load_meta, load_tokens, tokenizer_hash

WRITE_CHARS = 1 << 22  # encoded at a time, so memory use does not grow with the input

def encode(tokenizer, pieces):
    """The token ids of (text, whether a document ends there) pieces, as bytes; on all cores."""
    texts, ids = [text for text, _ in pieces], []
    try:
        encoded = tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count())
    except BaseException as e:
        if type(e).__name__ != "PanicException":  # tiktoken's; not a subclass of Exception
            raise
        raise UserError(f"tokenizer {tokenizer.name} failed on the text, perhaps on a very long "
                        f"run of spaces; clean the text ({e})") from None
    for tokens, (_, ends) in zip(encoded, pieces, strict=True):
        ids += tokens + [tokenizer.eot_token] * ends
    return np.array(ids, dtype="<u2").tobytes()

def groups(pieces):
    """Lists of consecutive pieces with about WRITE_CHARS characters each."""
    group, chars = [], 0
    for piece in pieces:
        group.append(piece)
        chars += len(piece[0])
        if chars > WRITE_CHARS:
            yield group
            group, chars = [], 0
    yield group

def write_tokens(path, pieces, tokenizer, bar=None):
    """Encode a stream of (text, whether a document ends there) into a .bin file. Returns the number
    of tokens. bar: advanced by the number of characters."""
    if tokenizer.n_vocab > 1 << 16:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens, over 65536")
    with atomic_write(path) as file:
        for group in groups(pieces):
            file.write(encode(tokenizer, group))
            if bar is not None:
                bar.update(sum(len(text) for text, _ in group))
        return file.tell() // 2

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
    Path(folder, "meta.json").unlink(missing_ok=True)
    with progress(None, "encode", "char", unit_scale=True) as bar:
        counts = {split: write_tokens(Path(folder, f"{split}.bin"), pieces, tokenizer, bar)
                  for split, pieces in splits.items()}
    if min(counts.values()) < 2:
        raise UserError(f"the text is too short: {counts['train']:,} train and {counts['val']:,} "
                        "val tokens; use more text (data/text/prepare.py: --input, --val)")
    write_meta(folder, tokenizer_name, tokenizer, counts, **more)

def already_prepared(folder, wanted, replace=False):
    """True, and a line printed, if a folder has an intact dataset with the entries `wanted` in
    meta.json. UserError: it has another dataset, and replace=False."""
    folder = Path(folder).resolve()  # not a name under data/
    try:
        meta = load_meta(folder)
        found = {name: meta.get(name) for name in wanted}
        if found == wanted:
            load_tokens(folder, "train"), load_tokens(folder, "val")
            print(f"{folder}: already prepared")
            return True
    except UserError:  # missing or damaged
        return False
    if not replace:
        found = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in found.items())
        raise UserError(f"{folder} holds a dataset of other files or keys ({found}); overwrite it "
                        "with --force or choose another folder: --out=FOLDER")
    return False
