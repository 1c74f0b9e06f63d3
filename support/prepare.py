"""Writing a dataset: token files and meta.json. The prepare.py scripts under data/ use it."""
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from support.runtime import UserError

import numpy as np

from support.files import atomic_write
from support.tokens import load_meta, load_tokens, tokenizer_hash

WRITE_CHARS = 1 << 22  # encoded at a time, so memory use does not grow with the input

def encode(tokenizer, pieces):
    """The token ids of (text, whether a document ends there) pieces, as bytes."""
    ids = []
    try:
        for text, ends in pieces:
            ids += tokenizer.encode_ordinary(text) + [tokenizer.eot_token] * ends
    except BaseException as e:
        if type(e).__name__ != "PanicException":  # tiktoken's; not a subclass of Exception
            raise
        raise UserError(f"the tokenizer {tokenizer.name} failed on a piece of the text, such as a "
                        f"very long run of spaces; clean the text ({e})") from None
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
    """Encode a stream of (text, whether a document ends there) into a .bin file, on all cores.
    Returns the number of tokens. bar: advanced by the number of characters."""
    if tokenizer.n_vocab > 1 << 16:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens; token files "
                        "(uint16) hold at most 65536")
    with atomic_write(path) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        for group in groups(pieces):
            n = max(1, len(group) // (8 * os.cpu_count()))
            parts = [group[i:i + n] for i in range(0, len(group), n)]
            for ids in pool.map(partial(encode, tokenizer), parts):  # tiktoken releases the GIL
                file.write(ids)
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

def finished(folder):
    """meta.json of a dataset if all its files are there and intact, else None."""
    try:
        load_tokens(folder, "train"), load_tokens(folder, "val")
        return load_meta(folder)
    except UserError:
        return None
