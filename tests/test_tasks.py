"""The seven tasks give lm-evaluation-harness's numbers."""
import gzip
import json
import math
from pathlib import Path

from support.runtime import UserError

import harness
import numpy as np
import pytest
import torch
from conftest import tiny_gpt

from support import tasks
from support.ablations import MIXES
from support.curves import MEASURES, averages
from support.engine import generate
from support.tokens import load_tokenizer

# optional: the real tasks' documents, and GPT-2's tokenizer
SHARED = Path(__file__).resolve().parents[2] / "shared"
METHODS = [("none", "interleave"), ("pause", "interleave"), ("pause", "add"),
           ("hidden", "interleave"), *(("concept", mix) for mix in MIXES)]

# -- log-likelihoods -------------------------------------------------------------------------------

def questions(rng, vocab=61):
    """Pairs of tokens: endings of one context, of contexts with a common start, of length one, and
    beyond the window of 16."""
    def draw(n):
        return rng.integers(vocab, size=n).tolist()

    context, start, long = draw(6), draw(3), draw(20)
    ending = draw(4)
    return [[(context, draw(n)) for n in (3, 1, 5)],
            [(context, ending), (context, ending + draw(2)), (context, ending[:2])],
            [(start + draw(1), ending), (start + draw(3), ending)],
            [(draw(9), draw(2))],
            [(long, draw(2)), (long, draw(5))],
            [(draw(4), draw(12)), (draw(5), draw(12))],
            [(draw(2), draw(30))],
            [(draw(1), draw(1)), (draw(2), draw(3))],
            []]

def plain(model, context, continuation):
    """One forward pass over the whole text."""
    tokens = torch.tensor((context + continuation)[-model.config.block_size - 1:])
    n = min(len(continuation), len(tokens) - 1)
    logp = model(tokens[None, :-1]).logits[0, -n:].log_softmax(-1)
    greedy = bool((logp.argmax(-1) == tokens[-n:]).all())
    return logp.gather(-1, tokens[-n:, None]).sum().item(), greedy

@pytest.mark.parametrize("insert, mix", METHODS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihoods_equal_a_forward_pass_over_each_text(insert, mix, batch_size):
    model = tiny_gpt(insert=insert, mix=mix, hidden_size=12).eval()
    asked = questions(np.random.default_rng(0))
    answers = tasks.loglikelihoods(model, asked, batch_size)
    with torch.no_grad():
        for pairs, given in zip(asked, answers, strict=True):
            for pair, (loglikelihood, greedy) in zip(pairs, given, strict=True):
                expected = plain(model, *pair)
                assert loglikelihood == pytest.approx(expected[0], abs=1e-9)
                assert greedy == expected[1]

def test_the_greedy_continuation_is_recognised(monkeypatch):
    monkeypatch.setattr(tasks, "chunk_rows", lambda device, width: 3)
    model, context = tiny_gpt().eval(), [5, 9, 2]
    best = generate(model, torch.tensor([context]), 4, temperature=0)[0, 3:].tolist()
    other = best[:3] + [(best[3] + 1) % 61]
    asked = [[(context, best), (context, other), (context, best[:1])]]
    answers = tasks.loglikelihoods(model, asked, 2)
    assert [greedy for _, greedy in answers[0]] == [True, False, True]

def test_a_context_is_computed_once_and_logits_only_where_they_count(monkeypatch):
    model, context = tiny_gpt().eval(), list(range(8))
    endings = [20, 21, 22], [30, 31, 32, 33], [20, 40]
    tokens, logits, head = [], [], model.head

    def counting_head(x):
        logits.append(len(x))
        return head(x)

    model.wte.register_forward_hook(lambda module, args, output: tokens.append(args[0].numel()))
    monkeypatch.setattr(model, "head", counting_head)
    tasks.loglikelihoods(model, [[(context, ending) for ending in endings]], 16)
    assert tokens == [8 + 2 + 3 + 1]  # the last token of a continuation is not read
    assert logits == [1 + 2 + 3 + 1]  # the last position of the context serves all three

def test_windows_predict_every_token_once_with_as_much_context_as_fits():
    tokenizer = load_tokenizer("stdlib")
    for text in ("", "one", "a longer text, with some words in it; " * 9):
        tokens = tokenizer.encode_ordinary(text)
        for size in (4, 7, len(tokens) or 1):
            pairs = tasks.encode(tokenizer, None, text, size)
            assert [token for _, continuation in pairs for token in continuation] == tokens
            whole, end = [tokenizer.eot_token] + tokens, 1
            for context, continuation in pairs:
                end += len(continuation)
                assert context + continuation == whole[max(0, end - size - 1):end]

# -- the tasks -------------------------------------------------------------------------------------

def ours(model, tokenizer, name, docs):
    """(run_task's row, the answers to each document as the harness gives them: one per WikiText
    page)."""
    row, size = tasks.run_task(name, docs, model, tokenizer, batch_size=4), model.config.block_size
    pairs = [[pair for texts in tasks.TASKS[name].ask(doc).pairs
              for pair in tasks.encode(tokenizer, *texts, size)] for doc in docs]
    answers = tasks.loglikelihoods(model, pairs, 8)
    if name == "wikitext":
        answers = [[(sum(x for x, _ in answer), None)] for answer in answers]
    return row, answers

def compare(row, answers, name, metrics, expected):
    """Log-likelihoods within 1e-3; equal metrics, and standard errors of accuracies."""
    for mine, theirs in zip(answers, expected, strict=True):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
        assert [x for x, _ in mine] == pytest.approx([x for x, _ in theirs], abs=1e-3, rel=0)
    for metric in tasks.TASKS[name].metrics:
        rel = 1e-9 if "acc" in metric else 1e-5
        assert row[f"{name}/{metric}"] == pytest.approx(metrics[metric], rel=rel), metric
        if "acc" in metric and len(answers) > 1:
            error = metrics[f"{metric}_stderr"]
            assert row[f"{name}/{metric}_stderr"] == pytest.approx(error, rel=1e-9), metric

def only_texts(value):
    return value if isinstance(value, str) else ""

@pytest.mark.parametrize("which, name, metrics, answers", json.loads(harness.FIXTURES.read_text()),
                         ids=only_texts)
def test_tasks_equal_the_harness(which, name, metrics, answers):
    model, tokenizer = harness.fixture_model(which), load_tokenizer("stdlib")
    row, mine = ours(model, tokenizer, name, harness.DOCUMENTS[name])
    compare(row, mine, name, metrics, [[tuple(pair) for pair in pairs] for pairs in answers])
    if name in ("arc_easy", "lambada_openai"):
        assert row[f"{name}/cut"] > 0  # includes texts longer than the window

@pytest.mark.slow
@pytest.mark.parametrize("tokenizer, which",
                         [("stdlib", "gpt"), ("stdlib", "cocomix"), ("gpt2", "gpt")])
def test_a_hundred_real_documents_of_each_task_equal_the_harness(tokenizer, which, monkeypatch):
    pytest.importorskip("lm_eval")
    if not (SHARED / "eval").is_dir():
        pytest.skip("needs the tasks' documents in ../shared/eval")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    names = [name for name in tasks.TASKS if (tokenizer, name) != ("gpt2", "wikitext")]
    tokenizer = load_tokenizer(tokenizer)
    model = harness.random_model(tokenizer.n_vocab, block_size=256, n_layer=2, n_head=2, n_embd=16,
                                 **harness.MODELS[which])
    model = model.double()  # the sum over a page in float32 would be less exact
    docs = {name: tasks.documents(name, str(SHARED / "eval"), 100) for name in names}
    for name, (metrics, answers) in harness.harness(model, tokenizer, docs).items():
        row, mine = ours(model, tokenizer, name, docs[name])
        compare(row, mine, name, metrics, answers)

def test_standard_errors_are_those_of_a_bootstrap():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, size=400)
    sums = -2.0 * counts + rng.normal(0, 3, size=400)
    mean, error = tasks.mean_and_error(list(zip(sums.tolist(), counts.tolist(), strict=True)))
    draws = rng.integers(400, size=(4000, 400))
    resampled = sums[draws].sum(1) / counts[draws].sum(1)
    assert mean == pytest.approx(sums.sum() / counts.sum())
    assert error == pytest.approx(resampled.std(), rel=0.05)
    assert math.exp(-mean) * error == pytest.approx(np.exp(-resampled).std(), rel=0.05)
    single = [(1.0, 1), (0.0, 1), (0.0, 1), (0.0, 1)]
    assert tasks.mean_and_error(single) == (0.25, pytest.approx(0.25))  # stdev / sqrt(n)
    assert tasks.mean_and_error([(1.0, 1)]) == (1.0, None)
    with pytest.raises(UserError, match="nothing to score"):
        tasks.mean_and_error([(0.0, 0)])

def test_averages_are_those_of_table_1():
    ntp_69m = 25.3, 107.6, 52.3, 0.274, 0.594, 0.366, 0.397, 0.507  # in the paper
    row = dict(zip(MEASURES, ntp_69m, strict=True))
    found = averages(row)
    assert found["average_perplexity"] == pytest.approx(61.8, abs=0.1)
    assert found["average_accuracy"] == pytest.approx(0.427, abs=1e-3)
    assert found["task_perplexity"] == pytest.approx((107.6 + 52.3) / 2)
    del row["piqa/acc"], row["perplexity"]
    assert list(averages(row)) == ["task_perplexity"]

@pytest.mark.cuda
@pytest.mark.parametrize("insert, mix", METHODS)
def test_cuda_gives_the_cpus_numbers(insert, mix):
    model = tiny_gpt(torch.float32, insert=insert, mix=mix, hidden_size=12).eval()
    asked = questions(np.random.default_rng(0))
    torch.set_float32_matmul_precision("highest")
    cpu, cuda = (tasks.loglikelihoods(model.to(device), asked, 4) for device in ("cpu", "cuda"))
    expected = [x for pairs in cpu for x, _ in pairs]
    assert [x for pairs in cuda for x, _ in pairs] == pytest.approx(expected, abs=1e-3)

# -- documents -------------------------------------------------------------------------------------

def test_tasks_run_by_default_for_gpt2s_tokens_only(monkeypatch):
    monkeypatch.setattr(tasks, "documents", lambda name, *_: harness.DOCUMENTS[name])

    def chosen(names, folder, tokenizer):
        return list(tasks.choose_tasks(names, folder, None, tokenizer))

    every = list(tasks.TASKS)
    assert chosen("auto", None, "gpt2") == every and chosen("none", None, "gpt2") == []
    assert chosen("auto", None, "another") == []
    assert chosen("auto", "folder", "another") == chosen("all", None, "another") == every
    assert chosen("piqa,arc_easy", None, "another") == ["piqa", "arc_easy"]

def test_without_a_network_the_default_tasks_are_skipped(monkeypatch, capsys):
    def refused(*_, **__):
        raise OSError("Network is unreachable")

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", refused)  # it would try for half a minute
    assert tasks.choose_tasks("auto", None, None, "gpt2") == {}
    message = "the tasks are skipped: EleutherAI/lambada_openai can't be fetched"
    assert message in capsys.readouterr().out
    with pytest.raises(UserError, match="baber/piqa can't be fetched .*--eval_data=DIR"):
        tasks.choose_tasks("piqa", None, None, "gpt2")

@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open)])
def test_byte_order_marks_and_blank_lines_are_no_damage(tmp_path, suffix, opener):
    docs = [dict(goal=f"größer {i}", sol1="a", sol2="b", label=0) for i in range(3)]
    lines = [json.dumps(doc, ensure_ascii=False) for doc in docs]
    text = "\ufeff\n" + lines[0] + "\r\n \t\r\n" + lines[1] + "\n\n" + lines[2] + "\n\n  \n"
    with opener(tmp_path / f"piqa.jsonl{suffix}", "wb") as file:
        file.write(text.encode())
    assert tasks.documents("piqa", tmp_path, None) == docs
    assert tasks.documents("piqa", tmp_path, 2) == docs[:2]
    with opener(tmp_path / f"arc_easy.jsonl{suffix}", "wb") as file:
        file.write(b"\xef\xbb\xbf\n \n")
    with pytest.raises(UserError, match="is empty: expected the documents of"):
        tasks.documents("arc_easy", tmp_path, None)

@pytest.mark.parametrize("name, dataset, configuration, split", [
    ("lambada_openai", "EleutherAI/lambada_openai", "default", "test"),
    ("wikitext", "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
    ("hellaswag", "Rowan/hellaswag", None, "validation"),
    ("piqa", "baber/piqa", None, "validation"),
    ("social_iqa", "lighteval/siqa", None, "validation"),
    ("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test"),
    ("winogrande", "allenai/winogrande", "winogrande_xl", "validation"),
])  # those of lm-evaluation-harness 0.4
def test_the_hubs_documents_are_those_of_the_harness(monkeypatch, name, dataset, configuration,
                                                     split):
    datasets = pytest.importorskip("datasets")
    called = []

    def load_dataset(*args, **kwargs):
        called.append((args, kwargs))
        return harness.DOCUMENTS[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert tasks.documents(name, None, 2) == harness.DOCUMENTS[name][:2]
    assert called == [((dataset, configuration), dict(split=split))]

def test_the_error_of_a_perplexity_is_the_perplexity_times_that_of_its_log():
    model, tokenizer = harness.fixture_model("gpt"), load_tokenizer("stdlib")
    docs, size = harness.DOCUMENTS["lambada_openai"], model.config.block_size
    row = tasks.run_task("lambada_openai", docs, model, tokenizer, 4)
    asked = [tasks.encode(tokenizer, *tasks.lambada(doc).pairs[0], size) for doc in docs]
    found = [(pairs[0][0], 1) for pairs in tasks.loglikelihoods(model, asked, 4)]
    value, error = row["lambada_openai/perplexity"], tasks.mean_and_error(found)[1]
    assert row["lambada_openai/perplexity_stderr"] == pytest.approx(value * error, rel=1e-5)
