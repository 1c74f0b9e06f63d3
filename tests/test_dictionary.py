"""The concept dictionary against plain counting, the words that find a concept, and the report."""
import html.parser
import json
import math
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import concepts
import data
from conftest import run, tiny_gpt
from model import TopK, load_checkpoint, load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cocomix(chain, tmp_path_factory):
    """A copy of the tiny CoCoMix run, and its dictionary over 4 000 training tokens."""
    folder = tmp_path_factory.mktemp("see") / "cocomix"
    shutil.copytree(chain["cocomix"], folder, ignore=shutil.ignore_patterns("concepts.*"))
    content = load_checkpoint(folder)
    model = load_model(content)
    return folder, content, model, concepts.of_run(content, CPU), concepts.dictionary_of(folder / "ckpt.pt", content, model, CPU, 4000)


def read_plainly(content, model, teacher, tokens):
    """[(position in the file, block, token, target, {active: c}, labels, {predicted: z})] of the tokens a dictionary looks at."""
    train = data.tokens_of_run(content, "train")
    T = model.config.block_size
    batches = data.Batches(train, T, tokens // T, model.config.vocab_size, shift=False)
    x, y = batches[0]
    active, labels = teacher.read(x, y)
    kept = model(x).concepts
    return [(start + t, row, x[row, t].item(), y[row, t].item(), dict(zip(active.indices[row, t].tolist(), active.values[row, t].tolist())), labels[row, t].tolist(),
             dict(zip(kept.indices[row, t].tolist(), kept.values[row, t].tolist()))) for row, start in enumerate(batches.starts(0)) for t in range(T)]


def test_dictionary_equals_plain_counting(cocomix):
    _, content, model, teacher, d = cocomix
    seen = read_plainly(content, model, teacher, d.tokens)
    assert len(seen) == d.tokens == 4000
    everywhere = Counter(t for _, _, x, y, *_ in seen for t in (x, y))
    edges = concepts.EDGES.tolist()
    for i in range(48):
        at = [s for s in seen if i in s[5]]
        assert d.labelled[i] == sum(s[5].count(i) for s in seen) and d.predicted[i] == sum(i in s[6] for s in seen)
        values = [s[4][i] for s in seen if s[4].get(i, 0) > 0]
        assert d.activations[i].sum() == len(values)
        inner = [sum(low < v <= high for v in values) for low, high in zip(edges, edges[1:])]
        assert d.activations[i, 1:-1].tolist() == inner[1:-1]
        for which, ids, share, lift in ((3, d.own, d.own_share, d.own_lift), (2, d.at, d.at_share, d.at_lift)):
            count = Counter(s[which] for s in at for _ in range(s[5].count(i)))
            p = {t: n / everywhere.total() for t, n in everywhere.items()}
            q = {t: (n + 20 * p[t]) / (count.total() + 20) for t, n in count.items()}
            best = sorted((t for t in q if q[t] > p[t]), key=lambda t: -q[t] * math.log(q[t] / p[t]))[:concepts.TOKENS]
            n = len(best)
            assert (ids[i, n:] == -1).all() and set(ids[i, :n].tolist()) == set(best)
            for t, s, l in zip(ids[i, :n].tolist(), share[i].tolist(), lift[i].tolist()):
                assert s == pytest.approx(q[t], rel=1e-5) and l == pytest.approx(q[t] / p[t], rel=1e-5)
            assert (np.diff([q[t] * math.log(q[t] / p[t]) for t in ids[i, :n].tolist()]) <= 1e-9).all()
    assert (d.labelled > 0).sum() > 10


def test_contexts_are_the_strongest_each_of_another_block(cocomix):
    _, content, model, teacher, d = cocomix
    train, seen = data.tokens_of_run(content, "train").astype(int).tolist(), read_plainly(content, model, teacher, d.tokens)
    for which, values, contexts in ((4, d.contexts_activation, d.contexts), (6, d.predictions_logit, d.predictions)):
        for i in range(0, 48, 5):
            best = {}
            for place, row, *rest in seen:
                value = rest[which - 2].get(i, -math.inf)
                if value > best.get(row, (-math.inf,))[0]:
                    best[row] = value, place
            expected = sorted(best.values(), reverse=True)[:concepts.CONTEXTS]
            assert values[i][values[i] > -math.inf].tolist() == pytest.approx([v for v, _ in expected])
            around = lambda place: train[max(0, place - concepts.BEFORE):place + concepts.AFTER + 1]
            for value, context in zip(values[i].tolist(), contexts[i].tolist()):  # equal values may stand at several places
                assert value == -math.inf or [t for t in context if t >= 0] in [around(place) for v, place in best.values() if v == pytest.approx(value)]


def test_the_strongest_in_pieces_are_the_strongest_at_once():
    values, indices = torch.randn(12, 30, 40).topk(5)  # 12 blocks of 30 tokens
    where = np.arange(12)[:, None] * 1000 + np.arange(30)
    once, pieces = concepts.Strongest(40, 3), concepts.Strongest(40, 3)
    once.add(TopK(values, indices), where)
    for i in range(0, 12, 4):
        pieces.add(TopK(values[i:i + 4], indices[i:i + 4]), where[i:i + 4])
    assert np.array_equal(once.value, pieces.value) and np.array_equal(once.where, pieces.where)
    assert once.value.shape == (40, 3) and (np.diff(once.value, axis=1) <= 0).all()


def test_pairs_are_counted_exactly_until_they_are_too_many():
    keys = np.random.default_rng(0).zipf(1.3, 20_000) % 5000
    exact, bounded = concepts.PairCounts(), concepts.PairCounts(limit=50)
    for part in np.split(keys, 20):
        exact.add(part), exact.gather()
        bounded.add(part), bounded.gather()
    assert dict(zip(exact.keys.tolist(), exact.counts.tolist())) == Counter(keys.tolist())
    assert len(bounded.keys) == 50
    commonest = [k for k, _ in Counter(keys.tolist()).most_common(10)]
    assert all(bounded.counts[bounded.keys == k] == exact.counts[exact.keys == k] for k in commonest)


@pytest.mark.parametrize("bias", [True, False])
def test_promoted_tokens_are_those_of_the_column_through_the_final_norm_and_the_head(bias):
    model = tiny_gpt(insert="concept", bias=bias)
    up, down = concepts.promoted(model, 7)
    with torch.no_grad():
        bias = model.ln_f.bias @ model.wte.weight[:61].T if bias else 0
        logits = model.head(model.inserted.compress) - bias
    assert torch.equal(up.long(), logits.topk(7).indices) and torch.equal(down.long(), (-logits).topk(7).indices)


def test_neighbours_are_the_largest_cosines_but_oneself():
    w = torch.nn.functional.normalize(torch.randn(30, 8), dim=1)
    ids, cosines = concepts.neighbours(w, 4)
    expected = (w @ w.T - 10 * torch.eye(30)).topk(4)
    assert torch.equal(ids.long(), expected.indices) and torch.allclose(cosines, expected.values)


def test_a_dictionary_is_kept_and_made_anew_for_another_checkpoint(cocomix, tmp_path, capsys):
    folder, content, model, _, d = cocomix
    again = concepts.dictionary_of(folder / "ckpt.pt", content, model, CPU)
    assert capsys.readouterr().out == "" and all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(d, again))
    assert concepts.dictionary_of(folder / "ckpt.pt", content, model, CPU, 4000).asked == 4000 and capsys.readouterr().out == ""
    shutil.copytree(folder, tmp_path / "run")
    assert concepts.dictionary_of(tmp_path / "run/ckpt.pt", content, model, CPU, 2000).tokens in range(1968, 2033) and "making" in capsys.readouterr().out
    with torch.no_grad():
        model = load_model(content)
        model.wpe.weight[0] += 1
    other = concepts.dictionary_of(tmp_path / "run/ckpt.pt", content, model, CPU)
    assert "making" in capsys.readouterr().out and other.checkpoint != d.checkpoint
    (tmp_path / "run/concepts.pt").write_bytes(b"cut")
    assert concepts.dictionary_of(tmp_path / "run/ckpt.pt", content, model, CPU).checkpoint == other.checkpoint


def an_entry(concept, own=(), at=(), contexts=()):
    return dict(id=concept, own=[[t, 0.2, 9.0] for t in own], at=[[t, 0.2, 9.0] for t in at], contexts=[[c, "", "", 1.0] for c in contexts])


@pytest.mark.parametrize("query, best", [("raise", [1, 2]), ("Error", [3, 1]), ("raise error", [1, 3, 2]), ("docstring", [4]), ("far away", [2]), ("nothing", [])])
def test_find_ranks_by_the_words_it_is_asked_for(query, best):
    entries = [an_entry(1, own=[" ValueError"], at=[" raise"]), an_entry(2, contexts=["far off, and away, they raise it"]), an_entry(3, own=["Error", " error"]), an_entry(4, own=[" string"])]
    assert [e["id"] for e in concepts.find(entries, query)] == best


class Page(html.parser.HTMLParser):
    """What a page refers to, and the text of its scripts."""
    def __init__(self, text):
        super().__init__()
        self.links, self.scripts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag == "script":
            self.scripts.append("")
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += text


def test_the_report_is_one_file_with_all_of_the_dictionary(cocomix, tmp_path):
    folder, content, model, teacher, d = cocomix
    status, out, err = run(concepts.main, folder, "--device=cpu", "--top=3")
    assert status == 0 and f"report: {folder / 'concepts.html'}" in out, err
    page = Page((folder / "concepts.html").read_text())
    assert not page.open and len(page.scripts) == 2 and all(link.startswith("#/") for link in page.links)
    found = json.loads(page.scripts[0])
    used = [i for i in range(48) if d.labelled[i] or d.predicted[i]]
    assert sorted(e["id"] for e in found["entries"]) == used and found["tokens"] == 4000 and found["concepts"] == 48
    tokenizer = data.load_tokenizer(content["tokenizer"])
    for e in found["entries"]:
        assert e == json.loads(json.dumps(concepts.entry(d, e["id"], tokenizer)))
    assert len(found["passages"]) == 4
    x, y = data.Batches(data.tokens_of_run(content, "val"), 32, 4, 257, shift=False)[0]
    labels, top = teacher.labels(x, y), model(x).concepts
    assert [[p[0] for p in passage] for passage in found["passages"]] == [[chr(t) for t in row] for row in x.tolist()]
    assert [[p[2] for p in passage] for passage in found["passages"]] == labels.tolist()
    assert [[[i for i, _ in p[1]] for p in passage] for passage in found["passages"]] == top.indices[..., :4].tolist()
    assert "innerHTML" not in page.scripts[1] and "insertAdjacent" not in page.scripts[1]


def test_no_text_of_the_data_ends_the_reports_script(cocomix, tmp_path):
    *_, d = cocomix
    nasty = '</script><img src="http://x/" onerror="alert(1)">\ud800 \u2028 ]]> <!-- <script>'
    concepts.write_report(tmp_path / "r.html", nasty, d, [an_entry(7, own=[nasty])], [[[nasty, [[7, 1.0]], [7]]]])
    page = Page((tmp_path / "r.html").read_text())
    assert len(page.scripts) == 2 and page.links == ["#/", "#/read"]
    assert json.loads(page.scripts[0])["entries"][0]["own"][0][0] == nasty.replace("\ud800", "?")


def test_the_table_and_find_in_the_terminal(cocomix):
    folder, *_, d = cocomix
    status, out, err = run(concepts.main, folder, "--top=5", "--device=cpu")
    lines = out.strip().splitlines()
    assert status == 0 and len(lines) == 10, out  # what was found, the head, 5 concepts, the report, empty lines between
    assert [int(line.split()[0]) for line in lines[3:8]] == concepts.used(d)[:5]
    best = d.own[:, 0].tolist().index(max(d.own[:, 0].tolist()))
    status, out, err = run(concepts.main, folder, f"--find={chr(d.own[best, 0])}", "--device=cpu")
    assert status == 0 and str(best) in [line.split()[0] for line in out.strip().splitlines()[3:]] and "report" not in out, out


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="needs Chromium")
@pytest.mark.parametrize("where, needed", [("", "by number"), ("#/read", "Passage 4"), ("#/{best}", "Nearest concepts"), ("#/99999", "not in this report")])
def test_the_report_opens_in_a_browser_from_disk(cocomix, where, needed, tmp_path):
    folder, *_, d = cocomix
    assert run(concepts.main, folder, "--device=cpu")[0] == 0
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    page = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--dump-dom",
                           (Path(folder) / "concepts.html").as_uri() + where.format(best=concepts.used(d)[0])], capture_output=True, text=True, timeout=60).stdout
    assert needed in page.partition("</main>")[0]
