"""Training a byte-level BPE tokenizer (Sennrich et al. 2016)."""
import base64
import heapq
from collections import Counter, defaultdict
from itertools import pairwise

from support.runtime import progress

import regex

from support.files import atomic_write
from support.tokens import SPLIT_PATTERN

def merge(word, pair):
    """A list of tokens with each occurrence of the pair replaced by one token."""
    merged, i = [], 0
    while i < len(word):
        found = tuple(word[i:i + 2]) == pair
        merged.append(pair[0] + pair[1] if found else word[i])
        i += 2 if found else 1
    return merged

def train_bpe(texts, vocab_size):
    """The ranks {token: rank} of a vocabulary of vocab_size tokens, including end-of-text.

    Merges the most frequent pair until there are enough tokens or no pairs left. Ties go to the
    first pair in byte order, so the result depends only on the texts.
    """
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(SPLIT_PATTERN, text))
    words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in counts]
    counts = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += counts[i]
            where[pair].add(i)
    ranks = {bytes([b]): b for b in range(256)}
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    with progress(vocab_size - 1, "BPE", "token", initial=len(ranks)) as bar:
        while len(ranks) < vocab_size - 1 and heap:
            n, pair = heapq.heappop(heap)
            if pairs[pair] != -n:  # an outdated entry; the pair's current count is in the heap, too
                continue
            token = pair[0] + pair[1]
            if token not in ranks:  # two pairs can form the same token
                ranks[token] = len(ranks)
                bar.update()
            changed = set()
            for i in where.pop(pair):
                old, words[i] = words[i], merge(words[i], pair)
                for p in pairwise(old):
                    pairs[p] -= counts[i]
                for p in pairwise(words[i]):
                    pairs[p] += counts[i]
                    where[p].add(i)
                changed.update(pairwise(old), pairwise(words[i]))
            for p in changed:
                if pairs[p] > 0:
                    heapq.heappush(heap, (-pairs[p], p))
    return ranks

def save_bpe(ranks, path):
    """Write ranks in tiktoken's format: one line per token, base64 and rank."""
    with atomic_write(path) as file:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(token) + b" %d\n" % rank)
