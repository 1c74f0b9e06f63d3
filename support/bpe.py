"""Training a byte-level BPE tokenizer (Sennrich et al. 2016)."""
import heapq
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

from support.runtime import progress

import regex

from support.files import atomic_write, fingerprint
from support.tokens import SPLIT_PATTERN, load_tokenizer, tokenizer_file

def train_bpe(texts, vocab_size):
    """The ranks {token: rank} of a vocabulary of vocab_size tokens, including end-of-text.

    Merges the most frequent pair until there are enough tokens or no pairs left. Ties go to the
    first pair in byte order, so the result depends only on the texts.
    """
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(SPLIT_PATTERN, text))
    # in a word, each token is the character whose code is the token's rank
    words = [word.encode("utf-8", "replace").decode("latin-1") for word in counts]
    counts = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += counts[i]
            where[pair].add(i)
    ranks = {bytes([b]): b for b in range(256)}
    tokens = list(ranks)

    def entry(pair):  # in the heap
        return -pairs[pair], tokens[ord(pair[0])], tokens[ord(pair[1])], pair

    heap = [entry(pair) for pair in pairs]
    heapq.heapify(heap)
    with progress(vocab_size - 1, "BPE", "token", initial=len(ranks)) as bar:
        while len(ranks) < vocab_size - 1 and heap:
            n, first, second, pair = heapq.heappop(heap)
            if n == 0 or pairs[pair] != -n:  # gone, or outdated: the current entry is there, too
                continue
            if first + second not in ranks:  # two pairs can form the same token
                ranks[first + second] = len(ranks)
                tokens.append(first + second)
                bar.update()
            changed, merged = set(), chr(ranks[first + second])
            for i in where.pop(pair):
                old, words[i] = words[i], words[i].replace("".join(pair), merged)
                for p in pairwise(old):
                    pairs[p] -= counts[i]
                for p in pairwise(words[i]):
                    pairs[p] += counts[i]
                    where[p].add(i)
                changed.update(pairwise(old), pairwise(words[i]))
            for p in changed:
                heapq.heappush(heap, entry(p))
    return ranks

def save_bpe(ranks, path):
    with atomic_write(path) as file:
        file.write(tokenizer_file(ranks))

def bpe_tokenizer(texts, vocab_size, folder):
    """Train a tokenizer and save it in a folder, under a name of its own: (path, tokenizer)."""
    ranks = train_bpe(texts, vocab_size)
    path = str(Path(folder) / f"bpe{vocab_size}-{fingerprint(*ranks)[:8]}.tiktoken")
    save_bpe(ranks, path)
    return path, load_tokenizer(path)
