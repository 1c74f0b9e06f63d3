"""Tokens: the tokenizer, the files on disk, and the batches drawn from them.

A dataset is a folder (data/NAME, or any path) that its prepare.py wrote:

    train.bin, val.bin   token ids, little-endian uint16, each document followed by the end-of-text token
    meta.json            tokenizer, vocab_size, tokens of each split, a hash of the source

The files are memory-mapped: a 9-billion-token one opens at once and stays on disk. The global batch is a
pure function of (seed, step); ranks and micro steps take slices of it. So there is nothing to save but
the step, and a run may go on with another number of processes.
"""
import base64
import hashlib
import json
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from config import UserError

ROOT = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
# What a byte-pair merge may not cross: words with their leading space, numbers of up to three digits, runs of
# punctuation, white space (a newline and the indentation after it stay together, so code takes few tokens); none
# longer than 200 characters, since merging takes the square of that.
SPLIT_PATTERN = r" ?\p{L}{1,200}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,200}|\s{1,200}(?!\S)|\s{1,200}"
WRITE_CHARS = 1 << 22  # gathered before they are encoded


# ---------------------------------------------------------------------------------------------------
# tokenizers

def load_tokenizer(name):
    """A tiktoken.Encoding: "gpt2", "stdlib" (data/stdlib/bpe.tiktoken) or the path of a .tiktoken file.

    Its end-of-text token is `.eot_token`, its size `.n_vocab`. UserError: no such file, or GPT-2's ranks
    can be neither found nor fetched.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # requests' errors, by whatever name
            raise UserError(f"GPT-2's tokenizer can't be fetched ({type(e).__name__}); with no network, set TIKTOKEN_CACHE_DIR "
                            "to a folder that tiktoken filled on another machine, or take a .tiktoken file (data/text/prepare.py --tokenizer=bpe:4096 makes one)") from e
    path = ROOT / "stdlib" / "bpe.tiktoken" if name == "stdlib" else Path(name)
    if not path.is_file() and not path.is_absolute():
        path = ROOT.parent / path
    if not path.is_file():
        raise UserError(f"no tokenizer {name!r}: use gpt2, stdlib or a .tiktoken file (data/text/prepare.py --tokenizer=bpe:4096 makes one)")
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)}
        assert sorted(ranks.values()) == list(range(len(ranks))) and len(ranks) >= 256
    except Exception as e:
        raise UserError(f"{path} is not a tokenizer: expected lines of a base64 token and its rank") from e
    return tiktoken.Encoding(path.stem, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def tokenizer_hash(name, tokenizer):
    """What tells two tokenizers apart, whatever their names: "gpt2", or a hash of the ranks."""
    return name if name == "gpt2" else fingerprint(*sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get))


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016, on bytes): the ranks {token: rank} of a vocabulary of
    vocab_size tokens, the end-of-text token counted but not among them.

    The commonest pair is merged until there are enough tokens (or no pair is left); ties go to the pair that
    comes first in byte order, so the result depends on the texts alone.
    """
    import heapq
    from collections import Counter, defaultdict

    import regex
    from config import progress

    counts = Counter()
    pattern = regex.compile(SPLIT_PATTERN)
    for text in texts:
        counts.update(pattern.findall(text))
    words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in counts]
    counts = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # how often a pair stands, and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    ranks = {bytes([b]): b for b in range(256)}
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    with progress(vocab_size - 1, "BPE", "token", initial=len(ranks)) as bar:
        while len(ranks) < vocab_size - 1 and heap:
            n, pair = heapq.heappop(heap)
            if pairs[pair] != -n:  # an old entry: the count has changed since
                if pairs[pair] > 0:
                    heapq.heappush(heap, (-pairs[pair], pair))
                continue
            merged = pair[0] + pair[1]
            if merged not in ranks:
                ranks[merged] = len(ranks)
                bar.update()
            changed = set()
            for i in where.pop(pair):
                old = words[i]
                new, j = [], 0
                while j < len(old):
                    if j + 1 < len(old) and (old[j], old[j + 1]) == pair:
                        new.append(merged)
                        j += 2
                    else:
                        new.append(old[j])
                        j += 1
                for p in zip(old, old[1:]):
                    pairs[p] -= counts[i]
                    changed.add(p)
                for p in zip(new, new[1:]):
                    pairs[p] += counts[i]
                    where[p].add(i)
                    changed.add(p)
                words[i] = new
            del pairs[pair]
            for p in changed - {pair}:
                if pairs[p] > 0:
                    heapq.heappush(heap, (-pairs[p], p))
    return ranks


def save_bpe(ranks, path):
    """Write ranks in tiktoken's format: a line a token, base64 and rank."""
    with replacing(path) as file:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(token) + b" %d\n" % rank)


# ---------------------------------------------------------------------------------------------------
# writing

class replacing:
    """`with replacing(path) as file`: write path whole or not at all (a temporary file, fsynced, renamed).
    UserError: it can't be written (a full disk, a read-only folder); what was there before stays."""
    def __init__(self, path):
        self.path, self.tmp = Path(path), Path(f"{path}.tmp")

    def __enter__(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.tmp, "wb")
        except OSError as e:
            raise self._failed(e) from e
        return self.file

    def __exit__(self, kind, error, _):
        try:
            if error is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.tmp, self.path)
                folder = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(folder)  # the new name, too, is on the disk
                os.close(folder)
        except OSError as e:
            raise self._failed(e) from e
        finally:
            try:
                self.file.close()
            except OSError:
                pass  # the same failure again, as its buffer is flushed
            self.tmp.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save wraps what the disk said
        if isinstance(cause, OSError) and cause.filename is None:
            raise self._failed(cause) from error

    def _failed(self, error):
        return UserError(f"{self.path} can't be written ({error.strerror or error}); what was there before is kept; free some space or choose another folder")


def write_tokens(path, pieces, tokenizer, bar=None):
    """Encode a stream of (text, whether a document ends there) into a .bin file; returns the number of tokens.

    Pieces are encoded by all cores, some megabytes at a time, so memory stays flat. bar: advanced by the
    characters written. UserError: the vocabulary does not fit uint16.
    """
    if tokenizer.n_vocab > 1 << 16:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens; the files hold at most 65536 (uint16)")

    def encode(some):  # in a thread: the tokenizer lets the others run meanwhile
        try:
            return b"".join(np.array(tokenizer.encode_ordinary(text) + [tokenizer.eot_token] * end, dtype="<u2").tobytes() for text, end in some)
        except BaseException as e:
            if type(e).__name__ != "PanicException":  # tiktoken's, no Exception
                raise
            raise UserError(f"the tokenizer {tokenizer.name} gave up on a piece of the text, such as a very long run of spaces; clean it ({e})") from None

    waiting, chars = [], 0
    with replacing(path) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        def flush():
            nonlocal chars
            some = max(1, len(waiting) // (8 * os.cpu_count()))  # pieces for a thread at once
            for ids in pool.map(encode, [waiting[i:i + some] for i in range(0, len(waiting), some)]):
                file.write(ids)
            if bar is not None:
                bar.update(chars)
            waiting.clear()
            chars = 0
        for piece in pieces:
            waiting.append(piece)
            chars += len(piece[0])
            if chars > WRITE_CHARS:
                flush()
        flush()
        return file.tell() // 2


def write_meta(folder, tokenizer_name, tokenizer, counts, **more):
    """meta.json, written last: a dataset without it is not finished."""
    meta = dict(tokenizer=tokenizer_name, tokenizer_hash=tokenizer_hash(tokenizer_name, tokenizer), vocab_size=tokenizer.n_vocab, **{f"{split}_tokens": n for split, n in counts.items()}, **more)
    with replacing(Path(folder) / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode() + b"\n")


# ---------------------------------------------------------------------------------------------------
# reading

def dataset_dir(dataset):
    """The folder of a dataset: a name under data/ or a path. UserError, with the command to run, if it isn't prepared."""
    folder = ROOT / dataset if (ROOT / dataset).is_dir() else Path(dataset)
    if not (folder / "meta.json").is_file():
        if (ROOT / dataset / "prepare.py").is_file() and dataset != "text":
            raise UserError(f"dataset {dataset!r} is not prepared; run: python data/{dataset}/prepare.py")
        raise UserError(f"no dataset {dataset!r} (no {folder / 'meta.json'}); make one: python data/text/prepare.py --input FILES --out {folder}")
    return folder


META = dict(tokenizer=str, tokenizer_hash=str, vocab_size=int, train_tokens=int, val_tokens=int)  # what meta.json holds at least


def load_meta(dataset):
    """meta.json of a dataset, as a dict. UserError: not prepared, or not readable."""
    path = dataset_dir(dataset) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        if wrong := [name for name, kind in META.items() if type(meta[name]) is not kind]:
            raise TypeError(f"{wrong[0]}={meta[wrong[0]]!r}")
        return meta
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}); prepare the dataset again") from e


def mapped(path, dtype, offset=0):
    """A file from byte `offset` on as a flat array, memory-mapped, to be read at places drawn at random."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)  # else the disk reads 128 kB for the 2 kB of a block
    return np.frombuffer(content, dtype, offset=offset)


def load_tokens(dataset, split):
    """The tokens of a split, memory-mapped: (N,) uint16. UserError: missing, empty or cut short."""
    folder, meta = dataset_dir(dataset), load_meta(dataset)
    path, expected = folder / f"{split}.bin", meta[f"{split}_tokens"]
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the dataset again")
    size = path.stat().st_size
    if size != 2 * expected or size == 0:
        raise UserError(f"{path} has {size} bytes but meta.json says {2 * expected}: cut short or damaged; prepare the dataset again")
    return mapped(path, "<u2")


def tokens_of_run(content, split):
    """The tokens of a split of the dataset that a checkpoint's run was trained on. UserError: as `load_tokens`, or the
    dataset was prepared anew with another tokenizer."""
    dataset = content["train_config"]["dataset"]
    if load_meta(dataset)["tokenizer_hash"] != content["tokenizer_hash"]:
        raise UserError(f"dataset {dataset!r} has another tokenizer now than when this run was trained on it ({content['tokenizer']}); prepare it as it was")
    return load_tokens(dataset, split)


def check_range(rows, vocab_size):
    """UserError if a token is beyond the vocabulary: an embedding would read past its end."""
    if rows.max() >= vocab_size:
        raise UserError(f"token {rows.max()} in the data is beyond the vocabulary of {vocab_size}: the .bin and its meta.json don't belong together; prepare the dataset again")


class Batches:
    """The batches of a split, a pure function of (seed, step).

    An epoch is every block of block_size tokens once, in an order drawn from (seed, epoch), the blocks
    shifted by an offset drawn from the same (shift=False: they always begin at token 0). Each block comes
    with its targets, the tokens one further on, so every position has one.

        x, y = batches[step]    # (rows, block_size) int64; rows = this rank's slice of the global batch
    """
    def __init__(self, tokens, block_size, batch_size, vocab_size, seed=0, shift=True, rank=0, world_size=1):
        if batch_size % world_size:
            raise UserError(f"batch_size={batch_size} does not divide by the {world_size} processes: take a multiple")
        if len(tokens) < 2 * block_size:
            raise UserError(f"a split has only {len(tokens)} tokens, too few for block_size={block_size}; it needs {2 * block_size}")
        self.tokens, self.block_size, self.batch_size, self.vocab_size = tokens, block_size, batch_size, vocab_size
        self.seed, self.shift, self.rank, self.world_size = seed, shift, rank, world_size
        # with a shift of up to block_size - 1 tokens the last block may not fit: an epoch is one block shorter
        self.blocks = (len(tokens) - 1 - (block_size - 1 if shift else 0)) // block_size
        self._epoch = None

    def _order(self, epoch):
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            offset = int(rng.integers(self.block_size)) if self.shift else 0
            order = np.arange(self.blocks, dtype=np.uint32)
            rng.shuffle(order)
            self._epoch = epoch, offset, order
        return self._epoch[1:]

    def starts(self, step):
        """Where this rank's blocks begin in the file: (rows,) int64."""
        rows = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * rows
        starts = []
        for sample in range(first, first + rows):
            offset, order = self._order(sample // self.blocks)
            starts.append(offset + int(order[sample % self.blocks]) * self.block_size)
        return np.array(starts)

    def __getitem__(self, step):
        import torch
        rows = np.stack([self.tokens[s:s + self.block_size + 1] for s in self.starts(step)]).astype(np.int64)
        check_range(rows, self.vocab_size)
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # only such tensors travel to a GPU by themselves

    def prefetch(self, start, stop, device, labels=None):
        """Yield (x, y, labels) of steps start … stop-1 on device; a thread prepares the next one meanwhile.

        labels: (blocks, block_size, attr_k) of all the unshifted blocks, on disk → their rows (rows, block_size, attr_k)
        int64; None → None.
        """
        import torch

        def load(step):
            batch = list(self[step])
            if labels is not None:
                batch.append(torch.from_numpy(labels[self.starts(step) // self.block_size].astype(np.int64)))
            return [t.pin_memory() for t in batch] if device.type == "cuda" else batch

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(load, start) if start < stop else None
            for step in range(start, stop):
                batch = [t.to(device, non_blocking=True) for t in ahead.result()]
                if step + 1 < stop:
                    ahead = pool.submit(load, step + 1)
                yield batch[0], batch[1], batch[2] if labels is not None else None


def sequential(tokens, block_size, batch_size, vocab_size):
    """All of a split in order, every token but the first a target once: yields (x, y), (rows, ≤ block_size) int64.
    The last, shorter block comes as a batch of its own."""
    import torch
    whole = (len(tokens) - 1) // block_size * block_size  # tokens in whole blocks
    for first in [*range(0, whole, batch_size * block_size), *([whole] if whole < len(tokens) - 1 else [])]:
        end = min(first + batch_size * block_size, whole) if first < whole else len(tokens) - 1
        chunk = tokens[first:end + 1].astype(np.int64)
        check_range(chunk, vocab_size)
        chunk = torch.from_numpy(chunk)
        rows = (end - first) // block_size or 1
        yield chunk[:-1].view(rows, -1), chunk[1:].view(rows, -1)


def mixed_seed(*numbers):
    """A seed that is another for every other tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def fingerprint(*parts):
    """A short hash of byte strings, for names and for meta.json."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
