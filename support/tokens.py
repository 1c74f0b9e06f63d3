"""Tokenizers, token files, and the batches drawn from them.

A dataset is a folder (data/NAME, or any path) written by a prepare.py:

    train.bin, val.bin   token ids, little-endian uint16, an end-of-text token after each document
    meta.json            tokenizer, vocab_size, number of tokens per split, a hash of the source

The token files are memory-mapped, so opening billions of tokens is instant. Ranks and micro batches
are slices of the global batch, so a run can resume with a different number of processes.
"""
import base64
import mmap
import shlex
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from support.runtime import UserError, explain

import numpy as np
import tiktoken
import torch

from support.files import fingerprint, read_json

ROOT = Path(__file__).resolve().parents[1] / "data"
END_OF_TEXT = "<|endoftext|>"
# BPE merges never cross these pieces: a word with its leading space, up to three digits, a run of
# punctuation, or white space. At most 200 characters each, because merging takes quadratic time.
SPLIT_PATTERN = (r" ?\p{L}{1,200}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,200}"
                 r"|\s{1,200}(?!\S)|\s{1,200}")
META = dict(tokenizer=str, tokenizer_hash=str, vocab_size=int, train_tokens=int, val_tokens=int)
PIECE = 16_000  # characters encoded as a unit
GPT2 = "7b12e086f7e6c80e"  # fingerprint of GPT-2's first 50256 tokens in the hub's spelling
TRAIN_ONE = "train one: python data/text/prepare.py --input FILES --tokenizer=bpe:4096"

def load_tokenizer(name, folder=None):
    """A tiktoken.Encoding: "gpt2", "stdlib" (data/stdlib/bpe.tiktoken) or a .tiktoken path, whose
    file may have moved along with the dataset in `folder`."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # any of requests' errors
            raise UserError(f"can't fetch GPT-2's tokenizer ({type(e).__name__}); {TRAIN_ONE}, or "
                            "set TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled") from e
    path = ROOT / "stdlib" / "bpe.tiktoken" if name == "stdlib" else Path(name)
    places = ([Path(folder) / path.name] if folder else []) + [path, ROOT.parent / path]
    found = next(filter(Path.is_file, places), None)
    if found is None:
        remedy = f"use gpt2, stdlib, a .tiktoken file or {TRAIN_ONE}"
        if folder:
            remedy = f"copy it to {folder}, or prepare the dataset again"
        raise UserError(f"no tokenizer {name!r}: {remedy}")
    return read_tokenizer(found, found.read_bytes())

@lru_cache(4)  # building one takes a tenth of a second
def read_tokenizer(name, content):
    """A tiktoken.Encoding from the content of a .tiktoken file."""
    try:
        lines = [line.split() for line in content.splitlines() if line.strip()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        assert sorted(ranks.values()) == list(range(len(ranks))) and len(ranks) >= 256
    except Exception as e:
        raise UserError(f"{name} is not a tokenizer: no lines of base64 token and rank") from e
    return tiktoken.Encoding(Path(name).stem, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})

def cut(pieces):
    """(text, whether a document ends there) → the same text in pieces of at most PIECE characters.

    No token crosses a cut, because white space follows it and none precedes it. Only where PIECE
    characters have no such place, the text is cut anywhere.
    """
    rest = ""
    for text, ends in pieces:
        text, start = rest + text, 0
        while len(text) - start > PIECE:
            window = text[start:start + PIECE]
            window = window[:max(window.rfind(" "), window.rfind("\n"), 0)].rstrip() or window
            yield window, False
            start += len(window)
        rest = text[start:]
        if ends:
            yield rest, True
            rest = ""
    if rest:
        yield rest, False

def encode_text(tokenizer, text, special=False):
    """The tokens of a text. tiktoken takes quadratic time for long words, and its stack overflows
    on a million spaces. special: END_OF_TEXT in the text is the end-of-text token."""
    ids = []
    for i, part in enumerate(text.split(END_OF_TEXT) if special else [text]):
        ids += [tokenizer.eot_token] * (i > 0)
        for piece, _ in cut([(part, True)]):
            ids += tokenizer.encode_ordinary(piece)
    return ids

def tokenizer_file(ranks):
    """The content of a .tiktoken file: one line per token, base64 and rank."""
    return b"".join(base64.b64encode(token) + b" %d\n" % ranks[token]
                    for token in sorted(ranks, key=ranks.get))

def tokenizer_of_run(content):
    """The tokenizer that is stored in a checkpoint; GPT-2's is fetched."""
    if content["tokenizer_hash"] == "gpt2":
        return load_tokenizer("gpt2")
    return read_tokenizer(content["tokenizer"], content["tokenizer_file"].numpy().tobytes())

def tokenizer_hash(name, tokenizer):
    """Identifies a tokenizer whatever its name: "gpt2", or a hash of the tokens in rank order."""
    ranks = tokenizer._mergeable_ranks
    return name if name == "gpt2" else fingerprint(*sorted(ranks, key=ranks.get))

def hub_tokenizer(folder, vocab_size):
    """tokenizer_hash of a model in the hub's layout: "gpt2", or that it is another one."""
    same = vocab_size == 50257
    for file in (folder / "tokenizer.json", folder / "vocab.json"):
        if same and file.is_file():
            content = read_json(file)
            with explain(f"{file} is not a tokenizer's", "copy it again"):
                ids = dict(content["model"]["vocab"] if file.stem == "tokenizer" else content)
                tokens = sorted(ids, key=ids.get)[:50256]
                same = fingerprint(*(token.encode() for token in tokens)) == GPT2
    return "gpt2" if same else f"unknown, {vocab_size} tokens"

def dataset_dir(dataset):
    """The folder of a prepared dataset, given a name under data/ or a path. A name without a slash
    can be both; ./NAME is a path. UserError: there is no dataset, or there are two."""
    folders = [Path(dataset)]
    if folders[0].name == str(dataset):
        folders.insert(0, ROOT / dataset)
    found = [folder for folder in folders if (folder / "meta.json").is_file()]
    if not found:
        script = folders[0] / "prepare.py"
        if script.parent.name == "text" or not script.is_file():
            script = f"data/text/prepare.py --input FILES --out {shlex.quote(str(folders[0]))}"
        raise UserError(f"no dataset {str(dataset)!r}: no {folders[0]}/meta.json; run python "
                        f"{script}, or say where it is: --dataset=FOLDER")
    if not found[0].samefile(found[-1]):
        raise UserError(f"dataset {dataset!r} can be {found[0]} or ./{dataset}: give one of these "
                        "paths instead")
    return found[0]

def load_meta(dataset):
    """meta.json of a dataset as a dict."""
    path = dataset_dir(dataset) / "meta.json"
    meta = read_json(path, "prepare the dataset again")
    with explain(f"{path} is damaged", "prepare the dataset again"):
        for name, kind in META.items():
            if type(meta[name]) is not kind:
                raise TypeError(f"{name}={meta[name]!r}")
    return meta

def mapped(path, dtype, offset=0):
    """A memory-mapped flat array of a file's content from byte `offset`, for random access."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)  # otherwise each 2 kB block causes a read of 128 kB
    return np.frombuffer(content, dtype, offset=offset)

def tokenizer_of_dataset(dataset):
    """The tokenizer that wrote a dataset; None for GPT-2's. UserError: its file was replaced."""
    meta = load_meta(dataset)
    if meta["tokenizer_hash"] == "gpt2":
        return None
    tokenizer = load_tokenizer(meta["tokenizer"], dataset_dir(dataset))
    if tokenizer_hash(meta["tokenizer"], tokenizer) != meta["tokenizer_hash"]:
        raise UserError(f"tokenizer {meta['tokenizer']!r} is not the one that wrote dataset "
                        f"{str(dataset)!r}; prepare the dataset again")
    return tokenizer

def load_tokens(dataset, split):
    """The tokens of a split, memory-mapped: (N,) uint16. UserError: missing, empty or cut short."""
    path = dataset_dir(dataset) / f"{split}.bin"
    expected = 2 * load_meta(dataset)[f"{split}_tokens"]
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the dataset again")
    size = path.stat().st_size
    if size != expected or size == 0:
        raise UserError(f"{path} has {size} bytes but meta.json says {expected}: cut short or "
                        "damaged; prepare the dataset again")
    return mapped(path, "<u2")

def tokens_hash(tokens, parts=64, size=1 << 18):
    """Identifies a split by its tokens; where there are many, by `parts` samples and the end."""
    step = max(size, -(-len(tokens) // parts))
    starts = [*range(0, len(tokens), step), max(0, len(tokens) - size)]
    return fingerprint(str(len(tokens)).encode(), *(tokens[s:s + size].tobytes() for s in starts))

def is_unchanged(content, split):
    """Whether a split of a run's dataset holds the tokens that the run was trained with."""
    before = content.get("uses", {}).get(f"{split}.bin")
    return before in (None, tokens_hash(load_tokens(content["train_config"]["dataset"], split)))

def tokens_of_run(content, split, other=False):
    """The tokens of a split of the dataset that a checkpoint's run was trained on. UserError: it is
    missing or has changed. other: another text in the same tokens is accepted, and reported."""
    dataset = content["train_config"]["dataset"]
    if load_meta(dataset)["tokenizer_hash"] != content["tokenizer_hash"]:
        raise UserError(f"the tokenizer of dataset {dataset!r} is not the one that this run was "
                        f"trained with; prepare the dataset with tokenizer "
                        f"{content['tokenizer']!r}, or name another one: --dataset=FOLDER")
    tokens = load_tokens(dataset, split)
    if not is_unchanged(content, split):
        if not other:
            raise UserError(f"{split}.bin of dataset {dataset!r} has changed since this run was "
                            "trained; prepare the same text again, or say where it is now: "
                            "--dataset=FOLDER")
        print(f"note: {split}.bin of dataset {dataset!r} is not the one of this run's training")
    return tokens

def check_tokenizer(cfg, meta, tokenizer, gpt):
    """UserError unless the dataset cfg.dataset has the concept model's tokenizer (its hash) and
    cfg.block_size fits its context."""
    if meta["tokenizer_hash"] != tokenizer:
        raise UserError(f"dataset {cfg.dataset!r} has the tokens of {meta['tokenizer']!r}, but the "
                        f"concept model {cfg.concept_model} was trained with another tokenizer")
    limit = gpt.config.block_size
    if cfg.block_size and cfg.block_size > limit:
        raise UserError(f"block_size={cfg.block_size} is over the concept model's {limit}")

def to_tensor(tokens, vocab_size):
    """An array of tokens as int64. UserError: an embedding lookup would read past its end."""
    if tokens.max() >= vocab_size:
        raise UserError(f"token {tokens.max()} is beyond the vocabulary of {vocab_size}: a .bin "
                        "file and meta.json don't match; prepare the dataset again")
    return torch.from_numpy(tokens.astype(np.int64))

class Batches:
    """The batches of a split, a pure function of (seed, step).

    An epoch visits every block of block_size tokens once, in an order drawn from (seed, epoch).
    With shift=True all its blocks are shifted by an offset drawn from the same generator. Targets
    are the next tokens, so a block reads one token beyond its end.

        x, y = batches[step]    # (rows, block_size) int64, this rank's rows of the global batch
    """
    def __init__(self, tokens, block_size, batch_size, vocab_size, seed=0, shift=True, rank=0,
                 world_size=1, split="train"):
        if batch_size % world_size:
            raise UserError(f"{batch_size=} is not divisible by the {world_size} processes")
        if len(tokens) < 2 * block_size:
            raise UserError(f"{split}.bin has only {len(tokens)} tokens, too few for "
                            f"block_size={block_size}: it needs {2 * block_size}; use a smaller "
                            "block_size, or prepare more text")
        self.tokens, self.block_size, self.vocab_size = tokens, block_size, vocab_size
        self.batch_size, self.rows = batch_size, batch_size // world_size
        self.seed, self.shift, self.rank = seed, shift, rank
        self.blocks = (len(tokens) - (block_size if shift else 1)) // block_size  # per epoch
        self._order = lru_cache(1)(self._order)  # of the latest epoch

    def _order(self, epoch):
        """(offset, order of the blocks)"""
        rng = np.random.default_rng([self.seed, epoch])
        offset = int(rng.integers(self.block_size)) if self.shift else 0
        order = np.arange(self.blocks, dtype=np.uint32)
        rng.shuffle(order)
        return offset, order

    def starts(self, step):
        """Positions in the file at which this rank's blocks start: (rows,) int64."""
        first = step * self.batch_size + self.rank * self.rows
        starts = []
        for sample in range(first, first + self.rows):
            offset, order = self._order(sample // self.blocks)
            starts.append(offset + int(order[sample % self.blocks]) * self.block_size)
        return np.array(starts)

    def __getitem__(self, step):
        rows = [self.tokens[s:s + self.block_size + 1] for s in self.starts(step)]
        rows = to_tensor(np.stack(rows), self.vocab_size)
        # contiguous, so that copies to a GPU can be asynchronous
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def prefetch(self, start, stop, device, labels=None):
        """Yield (x, y, labels) of steps start … stop-1 on `device`; a thread prepares the next one.
        labels: None, or the stored labels of all unshifted blocks (blocks, block_size, attr_k); a
        batch gets its own, (rows, block_size, attr_k) int64."""
        def load(step):
            batch = list(self[step])
            if labels is not None:
                rows = labels[self.starts(step) // self.block_size]
                batch.append(torch.from_numpy(rows.astype(np.int64)))
            return [t.pin_memory() for t in batch] if device.type == "cuda" else batch

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(load, start)
            for step in range(start, stop):
                batch = [t.to(device, non_blocking=True) for t in ahead.result()]
                ahead = pool.submit(load, step + 1)
                yield batch[0], batch[1], batch[2] if labels is not None else None

def sequential(tokens, block_size, batch_size, vocab_size):
    """A whole split in order, every token but the first a target exactly once: yields (x, y), each
    (rows, ≤ block_size) int64. The last, shorter block is a batch of its own."""
    targets = len(tokens) - 1
    whole = targets // block_size * block_size  # targets in complete blocks
    bounds = sorted({*range(0, whole, batch_size * block_size), whole, targets})
    for first, end in pairwise(bounds):
        chunk = to_tensor(tokens[first:end + 1], vocab_size)
        rows = max(1, (end - first) // block_size)
        yield chunk[:-1].view(rows, -1), chunk[1:].view(rows, -1)
