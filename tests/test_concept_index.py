"""The concept index against plain counting, and the words that find a concept."""
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import tiny_gpt

from concepts import concept_model_of_run
from model import load_model
from support import concept_index
from support.checkpoint import load_checkpoint
from support.concept_index import EDGES, find, index_of_run
from support.kernels import TopK
from support.tokens import Batches, tokens_of_run

CPU = torch.device("cpu")

@pytest.fixture(scope="module")
def cocomix(chain, tmp_path_factory):
    """A copy of the tiny CoCoMix run, and its index over 4,000 training tokens."""
    folder = tmp_path_factory.mktemp("index") / "cocomix"
    shutil.copytree(chain["cocomix"], folder, ignore=shutil.ignore_patterns("concepts.*"))
    content = load_checkpoint(folder)
    model, concept_model = load_model(content), concept_model_of_run(content, CPU)
    index = index_of_run(folder, content, model, concept_model, CPU, 4000)
    return folder, content, model, concept_model, index

def read_plainly(content, model, concept_model, tokens):
    """One dict for each token that an index reads."""
    train, T = tokens_of_run(content, "train"), model.config.block_size
    batches = Batches(train, T, tokens // T, model.config.vocab_size, shift=False)
    x, y = batches[0]
    labels, _, active = concept_model.concept_targets(x, y, teaches=False)
    kept = model(x).concepts

    def by_concept(top, row, t):
        pairs = zip(top.indices[row, t].tolist(), top.values[row, t].tolist(), strict=True)
        return dict(pairs)
    return [dict(place=int(start) + t, block=row, current=x[row, t].item(), next=y[row, t].item(),
                 labels=set(labels[row, t].tolist()), active=by_concept(active, row, t),
                 predicted=by_concept(kept, row, t))
            for row, start in enumerate(batches.starts(0)) for t in range(T)]

def typical_plainly(seen, kind, concept):
    """{token: (share, lift)} of the tokens with a lift above 1, best first."""
    everywhere = Counter(s[which] for s in seen for which in ("current", "next"))
    count = Counter(s[kind] for s in seen for label in s["labels"] if label == concept)
    found = {}
    for token, n in everywhere.items():
        p = n / everywhere.total()
        share = (count[token] + 20 * p) / (count.total() + 20)
        if count[token] and share > p:
            found[token] = share, share / p
    def score(token):
        return found[token][0] * math.log(found[token][1])
    best = sorted(found, key=score, reverse=True)[:concept_index.TOKENS]
    return {token: found[token] for token in best}

def test_the_index_equals_plain_counting(cocomix):
    _, content, model, concept_model, index = cocomix
    seen = read_plainly(content, model, concept_model, index.tokens)
    assert len(seen) == index.tokens == 4000
    edges = EDGES.tolist()
    for i in range(48):
        assert index.labelled[i] == sum(i in s["labels"] for s in seen)
        assert index.predicted[i] == sum(i in s["predicted"] for s in seen)
        values = [s["active"][i] for s in seen if s["active"].get(i, 0) > 0]
        assert index.activations[i].sum() == len(values)
        bins = [sum(low < v <= high for v in values)
                for low, high in zip(edges[:-1], edges[1:], strict=True)]
        assert index.activations[i, 1:-1].tolist() == bins[1:-1]
        for kind, ids, share, lift in (
                ("next", index.next_tokens, index.next_share, index.next_lift),
                ("current", index.current_tokens, index.current_share, index.current_lift)):
            expected = typical_plainly(seen, kind, i)
            n = len(expected)
            assert (ids[i, n:] == -1).all() and set(ids[i, :n].tolist()) == set(expected)
            for row, token in enumerate(ids[i, :n].tolist()):
                found = share[i, row].item(), lift[i, row].item()
                assert found == pytest.approx(expected[token], rel=1e-5)
            scores = [expected[t][0] * math.log(expected[t][1]) for t in ids[i, :n].tolist()]
            assert (np.diff(scores) <= 1e-9).all()
    assert (index.labelled > 0).sum() > 10

@pytest.mark.parametrize("kind", ["active", "predicted"])
def test_contexts_are_the_strongest_with_one_per_block(cocomix, kind):
    _, content, model, concept_model, index = cocomix
    train = tokens_of_run(content, "train").astype(int).tolist()
    seen = read_plainly(content, model, concept_model, index.tokens)
    values, contexts = index.contexts_activation, index.contexts
    if kind == "predicted":
        values, contexts = index.predictions_logit, index.predictions
    for i in range(0, 48, 5):
        best = {}  # by block
        for s in seen:
            value = s[kind].get(i, -math.inf)
            if kind == "active" and value <= 0:
                continue
            if value > best.get(s["block"], (-math.inf,))[0]:
                best[s["block"]] = value, s["place"]
        expected = sorted(best.values(), reverse=True)[:concept_index.CONTEXTS]
        found = values[i][values[i] > -math.inf].tolist()
        assert found == pytest.approx([value for value, _ in expected])
        for value, context in zip(found, contexts[i].tolist(), strict=False):
            around = [train[max(0, place - concept_index.BEFORE):place + concept_index.AFTER + 1]
                      for v, place in best.values() if v == pytest.approx(value)]
            assert [t for t in context if t >= 0] in around

def test_the_strongest_in_pieces_are_the_strongest_at_once():
    values, indices = torch.randn(12, 30, 40).topk(5)  # 12 blocks of 30 tokens
    where = torch.arange(12)[:, None] * 1000 + torch.arange(30)
    nothing = torch.full((40, 3), -math.inf), torch.full((40, 3), concept_index.NOWHERE)
    once = concept_index.strongest(nothing, TopK(values, indices), where)
    pieces = nothing
    for i in range(0, 12, 4):
        top = TopK(values[i:i + 4], indices[i:i + 4])
        pieces = concept_index.strongest(pieces, top, where[i:i + 4])
    assert torch.equal(once[0], pieces[0]) and torch.equal(once[1], pieces[1])
    assert once[0].shape == (40, 3) and (once[0].diff(dim=1) <= 0).all()
    none = TopK(torch.full_like(values, -math.inf), indices)
    values, places = concept_index.strongest(nothing, none, where)
    assert values.isneginf().all() and (places == concept_index.NOWHERE).all()

def test_pairs_are_counted_exactly_up_to_the_limit():
    keys = np.random.default_rng(0).zipf(1.3, 20_000) % 5000
    exact, bounded = concept_index.PairCounts(), concept_index.PairCounts(limit=50)
    for part in np.split(keys, 20):
        for pairs in (exact, bounded):
            pairs.add(part)
            pairs.merge()
    counts = dict(zip(exact.keys.tolist(), exact.counts.tolist(), strict=True))
    assert counts == Counter(keys.tolist())
    assert len(bounded.keys) == 50
    for key, _ in Counter(keys.tolist()).most_common(10):
        assert bounded.counts[bounded.keys == key] == counts[key]

def test_shares_do_not_depend_on_the_pairs_that_are_dropped():
    keys = np.random.default_rng(0).zipf(1.2, 20_000) % (40 * 61)
    labelled = torch.from_numpy(keys // 61).bincount(minlength=40)
    everywhere, found = torch.from_numpy(keys % 61).bincount(minlength=61), []
    for limit in (1 << 20, 300):
        pairs = concept_index.PairCounts(limit)
        pairs.add(keys)
        found.append(concept_index.typical(pairs, everywhere, labelled))
    all_of_them, few = ({(concept, token): (share, lift) for concept in range(40) for token, share,
                         lift in zip(*(t[concept].tolist() for t in table), strict=True)
                         if token >= 0} for table in found)
    assert 20 < len(few) < len(all_of_them)
    both = few.keys() & all_of_them.keys()
    assert len(both) > 20 and all(few[pair] == all_of_them[pair] for pair in both)

@pytest.mark.parametrize("bias", [True, False])
def test_promoted_tokens_are_those_of_the_column_through_the_final_norm_and_the_head(bias):
    model = tiny_gpt(insert="concept", bias=bias)
    up, down = concept_index.promoted(model, 7)
    with torch.no_grad():
        logits = model.head(model.mixer.compress)
        if bias:
            logits -= model.ln_f.bias @ model.wte.weight[:61].T
    assert torch.equal(up.long(), logits.topk(7).indices)
    assert torch.equal(down.long(), (-logits).topk(7).indices)

@pytest.mark.parametrize("n_concepts", [30, 1100])  # in one chunk, in two
def test_neighbours_have_the_largest_cosines(n_concepts):
    w = torch.nn.functional.normalize(torch.randn(n_concepts, 8), dim=1)
    ids, cosines = concept_index.neighbours(w, 4)
    expected = (w @ w.T - 10 * torch.eye(n_concepts)).topk(4)
    assert torch.equal(ids.long(), expected.indices) and torch.allclose(cosines, expected.values)

def test_an_index_is_stored_and_rebuilt_for_another_checkpoint(cocomix, tmp_path, capsys):
    folder, content, model, concept_model, index = cocomix

    def load(folder, model, tokens=None, concept_model=concept_model):
        found = index_of_run(folder, content, model, concept_model, CPU, tokens)
        return found, "building" in capsys.readouterr().out

    for tokens in (None, 4000):  # the concept model is not even loaded
        again, built = load(folder, model, tokens, concept_model=pytest.fail)
        assert not built
        for a, b in zip(index, again, strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    shutil.copytree(folder, tmp_path / "run")
    fewer, built = load(tmp_path / "run", model, 2000, concept_model=lambda: concept_model)
    assert built and fewer.tokens in range(1968, 2033)
    changed = load_model(content)
    with torch.no_grad():
        changed.wpe.weight[0] += 1
    other, built = load(tmp_path / "run", changed)
    assert built and other.checkpoint != index.checkpoint
    (tmp_path / "run/concepts.pt").write_bytes(b"cut")
    assert load(tmp_path / "run", changed)[1]
    torch.save(dict(own=torch.zeros(1)), tmp_path / "run/concepts.pt")  # an older version's
    assert load(tmp_path / "run", changed)[1]

def entry(concept, following=(), current=(), contexts=()):
    return dict(id=concept, next=[[t, 0.2, 9.0] for t in following],
                current=[[t, 0.2, 9.0] for t in current],
                contexts=[[c, "", "", 1.0] for c in contexts])

@pytest.mark.parametrize("query, best", [
    ("raise", [1, 2]), ("Error", [3, 1]), ("raise error", [1, 3, 2]), ("docstring", [4]),
    ("far away", [2]), ("nothing", [])])
def test_find_ranks_by_the_words_of_the_query(query, best):
    entries = [entry(1, following=[" ValueError"], current=[" raise"]),
               entry(2, contexts=["far off, and away, they raise it"]),
               entry(3, following=["Error", " error"]), entry(4, following=[" string"])]
    assert [e["id"] for e in find(entries, query)] == best
