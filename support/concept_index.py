"""The concept index: what each concept of a run means, read off the training text.

One pass over training tokens finds the tokens at which each concept is a label, the tokens that
follow (the typical ones are its name), and where it is strongest. Saved next to the run.
"""
import math
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support.runtime import UserError, progress

import numpy as np
import torch

from support.checkpoint import model_hash, read_tensors
from support.engine import decoder
from support.files import atomic_write
from support.kernels import TopK
from support.tokens import Batches, tokens_of_run

TOKENS, NEIGHBOURS = 16, 8  # kept per concept
NAME = 8                    # how many of the typical next tokens name it
CONTEXTS, BEFORE, AFTER = 6, 16, 8  # contexts per concept; tokens before and after the marked one
NOWHERE = 1 << 60           # a position beyond every file
# of the activation bins, from 1/8 to 32, four per doubling; the first and last bin are open
EDGES = 2.0 ** (torch.arange(33) / 4 - 3)

class ConceptIndex(NamedTuple):
    """The C concepts of a run. Token lists are sorted, best first, and padded with -1."""
    checkpoint: str                # hash of the run's weights
    requested: int                 # training tokens asked for
    tokens: int                    # training tokens read: whole blocks from all over the split
    labelled: torch.Tensor         # (C,) at how many of these the concept is a label
    predicted: torch.Tensor        # (C,) at how many the run predicts it (keeps it in its TopK)
    activations: torch.Tensor      # (C, bins) how many activations lie between two EDGES
    next_tokens: torch.Tensor      # (C, TOKENS) typical tokens after its labels, see `typical`
    next_share: torch.Tensor       # (C, TOKENS) p(token | concept)
    next_lift: torch.Tensor        # (C, TOKENS) p(token | concept) / p(token)
    current_tokens: torch.Tensor   # the same for the tokens at which it is a label
    current_share: torch.Tensor
    current_lift: torch.Tensor
    promotes: torch.Tensor         # (C, TOKENS) tokens that W_:,i raises most, and lowers most;
    suppresses: torch.Tensor       # (C, 0) with mix="none"
    norm: torch.Tensor             # (C,) ‖W_:,i‖, 0 with mix="none"
    neighbours: torch.Tensor       # (C, NEIGHBOURS) concepts with the most similar SAE directions
    cosine: torch.Tensor           # (C, NEIGHBOURS) their similarity
    contexts: torch.Tensor         # (C, CONTEXTS, BEFORE + 1 + AFTER) tokens around the largest
    contexts_activation: torch.Tensor  # activations, one per block; -inf where there are fewer
    predictions: torch.Tensor      # the same for the largest predicted logits
    predictions_logit: torch.Tensor

    def next_ids(self, concept, n=NAME):
        """The first n typical next tokens, as a list."""
        return [t for t in self.next_tokens[concept, :n].tolist() if t >= 0]

    def name(self, concept, tokenizer, n=5):
        """The typical next tokens as text, such as `'self' 'path' 'get'`."""
        names = [quoted(token_text(tokenizer, t)) for t in self.next_ids(concept, n)]
        return " ".join(names) or "(never a label)"

def token_text(tokenizer, token):
    """A token as text; bytes that are only a part of a character as \\xNN."""
    return tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")

def quoted(text):
    """repr, but with the \\xNN of `token_text` as they are."""
    return repr(text).replace("\\\\x", "\\x")

class PairCounts:
    """Counts of (concept, token) pairs; each merge keeps only the `limit` most frequent ones."""
    def __init__(self, limit=1 << 23):
        self.limit, self.new = limit, []
        self.keys = self.counts = np.empty(0, np.int64)

    def add(self, keys):
        """keys: concept · V + token, once per occurrence."""
        self.new.append(keys)
        if sum(map(len, self.new)) > max(1 << 20, len(self.keys)):
            self.merge()

    def merge(self):
        weights = np.concatenate((self.counts, *map(np.ones_like, self.new)))
        keys = np.concatenate((self.keys, *self.new))
        self.keys, inverse = np.unique(keys, return_inverse=True)
        self.counts, self.new = np.bincount(inverse, weights).astype(np.int64), []
        if len(self.keys) > self.limit:
            kept = np.sort(np.argpartition(-self.counts, self.limit)[:self.limit])
            self.keys, self.counts = self.keys[kept], self.counts[kept]

def typical(pairs, everywhere, labelled, prior=20):
    """The tokens most typical of each concept, which is a label at labelled (C,) tokens: (ids,
    share, lift), each (C, TOKENS).

    share = p(token | concept), smoothed by `prior` pseudo-observations; lift = share / p(token).
    Tokens with lift > 1 are sorted by share · log lift, their terms of the KL divergence.
    """
    pairs.merge()
    C = len(labelled)
    concept, token = np.divmod(pairs.keys, len(everywhere))  # concepts ascending
    p = everywhere.numpy()[token] / everywhere.sum().item()
    share = (pairs.counts + prior * p) / (labelled.numpy()[concept] + prior)
    lift = share / p
    score = share * np.log(lift)
    order = np.lexsort((-score, concept))
    rank = np.arange(len(order)) - np.searchsorted(concept, concept)
    best = (rank < TOKENS) & (score[order] > 0)
    order, rank = order[best], rank[best]
    table = np.zeros((3, C, TOKENS))
    table[0] = -1
    table[:, concept[order], rank] = token[order], share[order], lift[order]
    ids, share, lift = torch.from_numpy(table)
    return ids.int(), share.float(), lift.float()

def strongest(found, top, where):
    """(values, places), (C, n) each: every concept's n largest values, at most one per block, in
    `found` so far and in a TopK (rows, T, k) of tokens at the places `where` (rows, T). -inf: no
    value."""
    rows, (C, n) = len(where), found[0].shape
    value, concept = top.values.float().flatten(1), top.indices.flatten(1)
    best = value.new_full((rows, C), -torch.inf).scatter_reduce_(1, concept, value, "amax")
    where = where.repeat_interleave(top.values.shape[-1], dim=1)
    where = where.masked_fill((value != best.gather(1, concept)) | value.isneginf(), NOWHERE)
    first = where.new_full((rows, C), NOWHERE).scatter_reduce_(1, concept, where, "amin")
    values, order = torch.cat((found[0], best.T), 1).sort(dim=1, descending=True, stable=True)
    return values[:, :n], torch.cat((found[1], first.T), 1).gather(1, order[:, :n])

def contexts_at(tokens, values, places):
    """(tokens around each place (C, n, BEFORE + 1 + AFTER), padded with -1; the values)."""
    at = places[..., None].cpu().numpy() + np.arange(-BEFORE, AFTER + 1)
    inside = (at >= 0) & (at < len(tokens))
    around = np.where(inside, tokens[at * inside].astype(np.int32), -1)
    return torch.from_numpy(around), values.cpu()

def column_norms(model):
    """‖W_:,i‖ of the compress matrix, (C,): how far one unit of each concept moves ĉ."""
    return model.mixer.compress.detach().float().norm(dim=1).cpu().numpy()

@torch.no_grad()
def promoted(model, n=TOKENS):
    """The n tokens whose logits each W_:,i raises most, and lowers most, (2, C, n), on the direct
    path from ĉ to the head. The final LayerNorm's division by σ does not change their order."""
    weight = model.wte.weight[:model.config.vocab_size]
    tokens = []
    for rows in model.mixer.compress.split(1024):
        effect = ((rows - rows.mean(1, keepdim=True)) * model.ln_f.weight) @ weight.T
        tokens.append(torch.stack((effect.topk(n).indices, (-effect).topk(n).indices)))
    return torch.cat(tokens, 1).int().cpu()

def neighbours(directions, n=NEIGHBOURS):
    """Nearest concepts by cosine: unit rows (C, d) → ids and cosines, (C, n) each."""
    tops = []
    for i, rows in enumerate(directions.split(1024)):
        cosine = rows @ directions.T
        cosine.diagonal(1024 * i).fill_(-torch.inf)  # not its own neighbour
        tops.append(cosine.topk(min(n, len(directions) - 1)))
    values, ids = (torch.cat(parts).cpu() for parts in zip(*tops, strict=True))
    return ids.int(), values

@torch.no_grad()
def build_index(content, model, concept_model, tokens, device):
    """The ConceptIndex of a run over about `tokens` training tokens, in bounded memory."""
    c, bins = model.config, len(EDGES) - 1
    C, V, T = c.n_concepts, c.vocab_size, c.block_size
    train = tokens_of_run(content, "train")
    per_step = 4096 if device.type == "cpu" else 32768
    rows = max(1, min(per_step // T, -(-tokens // T), (len(train) - 1) // T))
    batches = Batches(train, T, rows, V, shift=False)
    steps = max(1, min(round(tokens / (rows * T)), batches.blocks // rows))
    labelled = predicted = activations = everywhere = 0
    current, following, edges = PairCounts(), PairCounts(), EDGES[1:-1].to(device)
    nothing = torch.full((C, CONTEXTS), -torch.inf, device=device)
    most_active = most_predicted = nothing, torch.full_like(nothing, NOWHERE, dtype=torch.int64)
    with progress(steps * rows * T, "concept index", "tok", unit_scale=True, leave=False) as bar:
        for step in range(steps):
            x, y = (t.to(device) for t in batches[step])
            labels, _, active = concept_model.concept_targets(x, y, teaches=False)
            once = labels != labels[..., :1]  # where few concepts are active, the first is repeated
            once[..., 0] = True
            kept = model.concepts(x)
            labelled += labels[once].bincount(minlength=C)
            predicted += kept.indices.flatten().bincount(minlength=C)
            bin_of = active.indices * bins + torch.bucketize(active.values, edges)
            activations += bin_of[active.values > 0].bincount(minlength=C * bins)
            everywhere += torch.cat((x, y)).flatten().bincount(minlength=V)
            current.add((labels * V + x[..., None])[once].cpu().numpy())
            following.add((labels * V + y[..., None])[once].cpu().numpy())
            where = torch.from_numpy(batches.starts(step)[:, None] + np.arange(T)).to(device)
            fired = active.values.masked_fill(active.values <= 0, -torch.inf)
            most_active = strongest(most_active, TopK(fired, active.indices), where)
            most_predicted = strongest(most_predicted, kept, where)
            bar.update(y.numel())
    effects, norm = torch.zeros(2, C, 0).int(), torch.zeros(C)
    if c.mix != "none":
        effects, norm = promoted(model), torch.from_numpy(column_norms(model))
    return ConceptIndex(
        model_hash(model), tokens, steps * rows * T,
        labelled.cpu(), predicted.cpu(), activations.view(C, -1).cpu(),
        *typical(following, everywhere.cpu(), labelled.cpu()),
        *typical(current, everywhere.cpu(), labelled.cpu()),
        *effects, norm, *neighbours(concept_model.sae.decoder),
        *contexts_at(train, *most_active), *contexts_at(train, *most_predicted))

def read_index(path):
    """concepts.pt as a dict, empty if there is none. UserError: it is not an index."""
    if not path.exists():
        return {}
    try:
        found = read_tensors(path, "a concept index")
    except OSError as e:
        raise UserError(f"{path} can't be read ({e.strerror})") from e
    if not isinstance(found, dict) or not {"checkpoint", "next_tokens"} <= found.keys():
        raise UserError(f"{path} is not a concept index of this version")
    return found

def index_of_run(folder, content, model, concept_model, device, tokens=None, overwrite=False,
                 name="concepts"):
    """The ConceptIndex of a run, from NAME.pt in a folder; built and saved if that has other
    weights or not `tokens` training tokens (None: any number). concept_model: the run's
    ConceptModel, or a function that loads it. overwrite: a file that is no index, too."""
    stored, tokens_read, keep = Path(folder) / f"{name}.pt", tokens or 1_000_000, True
    try:
        with suppress(TypeError):  # an older version's
            found = ConceptIndex(**read_index(stored))
            if found.checkpoint == model_hash(model) and tokens in (None, found.requested):
                return found
    except UserError as e:
        keep = overwrite
        if not keep:
            print(f"left out: keeping the index ({e}); --out_dir=FOLDER keeps it elsewhere, "
                  "python concepts.py RUN --overwrite replaces the file")
    print(f"building {stored if keep else 'the index'} from {tokens_read:,} training tokens "
          "(once per checkpoint)")
    if callable(concept_model):
        concept_model = concept_model()
    index = build_index(content, model, concept_model, tokens_read, device)
    try:
        if keep:
            with atomic_write(stored) as file:
                torch.save(index._asdict(), file)
    except (UserError, OSError) as e:
        print(f"left out: keeping the index ({e}); --out_dir=FOLDER keeps it elsewhere")
    return index

def texts(tokens, n=5):
    """The first n tokens of a list of `describe`."""
    return " ".join(quoted(token) for token, *_ in tokens[:n])

def describe(index, concept, tokenizer):
    """What the index knows about a concept, as plain values, with tokens as text."""
    row = {name: t[concept].tolist() for name, t in index._asdict().items() if torch.is_tensor(t)}
    text = partial(token_text, tokenizer)
    def typical_tokens(kind):
        lists = (row[f"{kind}_{what}"] for what in ("tokens", "share", "lift"))
        return [[text(t), round(share, 4), round(lift, 2)]
                for t, share, lift in zip(*lists, strict=True) if t >= 0]
    def around(ids):  # each character belongs to the token that completes it
        characters = decoder(tokenizer)
        pieces = [characters(t) if t >= 0 else "" for t in ids]
        before, after = "".join(pieces[:BEFORE]), "".join(pieces[BEFORE + 1:])
        return [before.lstrip("\ufffd"), pieces[BEFORE] or text(ids[BEFORE]), after]
    def contexts(ids, values):
        return [[*around(t), round(v, 2)]
                for t, v in zip(row[ids], row[values], strict=True) if v > -torch.inf]
    nearest = zip(row["neighbours"], row["cosine"], strict=True)
    return dict(
        id=concept, labelled=row["labelled"], predicted=row["predicted"],
        norm=round(row["norm"], 4), next=typical_tokens("next"), current=typical_tokens("current"),
        promotes=[text(t) for t in row["promotes"]],
        suppresses=[text(t) for t in row["suppresses"]],
        neighbours=[[i, round(cosine, 3)] for i, cosine in nearest],
        activations=row["activations"], contexts=contexts("contexts", "contexts_activation"),
        predictions=contexts("predictions", "predictions_logit"))

def used(index):
    """The concepts that were ever a label or predicted, most used first."""
    use = index.labelled + index.predicted
    return use.argsort(descending=True, stable=True)[:use.count_nonzero()].tolist()

def similarity(token, word):
    """Ratio of lengths if one contains the other and is not much shorter; else 0."""
    short, long = sorted((token.strip().lower(), word), key=len)
    close = short == long or len(short) >= max(3, len(long) / 2)
    return len(short) / len(long) if close and short in long else 0.0

def find(entries, query):
    """The entries (see `describe`) that match the words of a query, best match first.

    A word scores similarity · share · log lift over the concept's tokens, plus a tenth of the share
    of its contexts with it. Sums of square roots favour a match for every word.
    """
    def score(e, word):
        total = sum(similarity(token, word) * share * math.log(lift)
                    for token, share, lift in e["next"] + e["current"] if lift > 1)
        hits = sum(word in "".join(c[:3]).lower() for c in e["contexts"])
        return math.sqrt(total + 0.1 * hits / CONTEXTS)
    scores = [(sum(score(e, word) for word in query.lower().split()), e) for e in entries]
    return [e for s, e in sorted(scores, key=lambda pair: -pair[0]) if s > 0]
