"""Label files: the labels of all blocks of train.bin, computed once (concepts.py --write_labels).

A file holds a JSON header, padded to HEADER bytes, then an array (blocks, block_size, attr_k) of
uint16 or uint32 concepts for the unshifted blocks. The header lists everything the labels depend on
and, once they are complete, a hash of them; a file with another header is refused. `keys` is a
config with keys dataset and block_size.
"""
import json
import math
import os
from contextlib import suppress

from support.runtime import UserError, progress

import numpy as np

from support.checkpoint import check_models, models_used
from support.prepare import locked
from support.tokens import (
    check_tokenizer,
    dataset_dir,
    load_meta,
    load_tokens,
    mapped,
    sequential,
    tokens_hash,
)

HEADER = 4096  # bytes
TOKENS = 8192  # labelled at a time
COMMAND = "python concepts.py CONFIG --write_labels"

def label_file(concept_model, keys):
    """(train tokens, path of their label file, its header: everything the labels depend on, and the
    array's shape and dtype)."""
    c, n_concepts = concept_model, len(concept_model.sae.encoder)
    how = {"attribution": f"_{c.attribution}_{c.sign}", "activation": ""}  # all that it uses
    assert c.select in how, f"select={c.select!r} is not in label_file of support/labels.py"
    name = f"labels_{c.select}{how[c.select]}_layer{c.layer}_k{c.attr_k}_block{keys.block_size}"
    tokens = load_tokens(keys.dataset, "train")
    header = dict(name=name, **models_used(c), bf16=c.bf16, n_concepts=n_concepts,
                  dtype="<u2" if n_concepts <= 1 << 16 else "<u4", tokens=tokens_hash(tokens),
                  shape=[(len(tokens) - 1) // keys.block_size, keys.block_size, c.attr_k])
    return tokens, dataset_dir(keys.dataset) / f"{name}.bin", header

def read_header(path):
    """The header of a label file; None if it has none."""
    with open(path, "rb") as file:
        with suppress(TypeError, ValueError):
            return dict(**json.loads(file.read(HEADER)))

def bytes_per_block(header):
    return math.prod(header["shape"][1:]) * np.dtype(header["dtype"]).itemsize

def stored(path, header):
    """The labels of a file, memory-mapped: (blocks so far, block_size, attr_k)."""
    blocks, size = (path.stat().st_size - HEADER) // bytes_per_block(header), header["shape"][1:]
    whole = mapped(path, "u1", HEADER)[:blocks * bytes_per_block(header)]
    return whole.view(header["dtype"]).reshape(blocks, *size)

def open_labels(concept_model, keys, content=None):
    """Stored labels, memory-mapped: (blocks, block_size, attr_k). content: of the checkpoint that
    is resumed. UserError: there are none, they are damaged, or they come from another concept
    model, SAE or dataset."""
    if content is not None:  # first: its remedy is not to write other labels
        check_models(content, concept_model)
    _, path, header = label_file(concept_model, keys)
    if not path.is_file():
        raise UserError(f"no labels at {path}; write them with this run's keys: {COMMAND}")
    check_labels(path, header)
    return stored(path, header)

def others(found, header):
    """In what two headers differ, as text."""
    return ", ".join(name for name in header if found and found.get(name) != header[name])

def check_labels(path, header):
    """UserError unless the file has this header and is complete and intact (by tokens_hash)."""
    found, size = read_header(path), HEADER + header["shape"][0] * bytes_per_block(header)
    problem = None
    if other := others(found, header):
        problem = f"holds labels of another {other}"
    elif (not found or path.stat().st_size != size
          or found.get("labels") != tokens_hash(stored(path, header).reshape(-1))):
        problem = "is damaged or cut short"
    if problem:
        raise UserError(f"{path} {problem}; remove it and write it again: {COMMAND}")

def intact_blocks(part, header, labels_of):
    """How many blocks of an interrupted call's file to keep. A crash of the machine can leave zeros
    at its end: at least nine tenths of the last block must be labels_of(block), as those of another
    device are, or half of the file is dropped."""
    done = (part.stat().st_size - HEADER) // bytes_per_block(header)
    while done and (stored(part, header)[done - 1] == labels_of(done - 1)).mean() < 0.9:
        done //= 2
    return done

def write_labels(concept_model, keys, vocab_size, device):
    """Write the labels of all train tokens next to them; returns the path. An interrupted call
    leaves a .part file, from which the next one resumes."""
    tokens, path, header = label_file(concept_model, keys)
    if path.is_file():
        check_labels(path, header)
        return path
    part, done = path.with_suffix(".part"), 0
    blocks, block_size, _ = header["shape"]
    total, rows = blocks * block_size, max(1, TOKENS // block_size)

    def labels(first, end):  # of the blocks from token `first` to `end`, a few at a time
        for x, y in sequential(tokens[first:end + 1], block_size, rows, vocab_size):
            found = concept_model.labels(x.to(device), y.to(device)).cpu().numpy()
            yield found.astype(header["dtype"])

    def labels_of(block):
        return next(labels(block * block_size, (block + 1) * block_size))[0]

    try:
        if part.is_file() and part.stat().st_size > HEADER:
            found = read_header(part)
            if other := others(found, header):
                raise UserError(f"{part} holds unfinished labels of another {other}: finish them, "
                                "or remove it")
            done = intact_blocks(part, header, labels_of) if found else 0
        first = done * block_size
        with (open(part, "r+b" if done else "wb") as file,
              progress(total, "labels", "tok", initial=first, unit_scale=True) as bar):
            file.write(json.dumps(header).encode().ljust(HEADER))
            file.seek(HEADER + done * bytes_per_block(header))
            file.truncate()  # drop what is not intact
            for found in labels(first, total) if first < total else ():
                file.write(found.tobytes())
                bar.update(found[..., 0].size)
            file.flush()
            complete = header | dict(labels=tokens_hash(stored(part, header).reshape(-1)))
            file.seek(0)
            file.write(json.dumps(complete).encode().ljust(HEADER))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"{part} can't be written ({e.strerror or e}); free some space, then run "
                        "the same command to resume") from e
    return path

def write_all(concept_model, tokenizer, cfg, device):
    """The command concepts.py --write_labels."""
    meta = load_meta(cfg.dataset)
    check_tokenizer(cfg, meta, tokenizer, concept_model.gpt)
    with locked(dataset_dir(cfg.dataset), "writing files", "dataset"):
        print(f"labels: {write_labels(concept_model, cfg, meta['vocab_size'], device)}")
