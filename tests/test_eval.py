"""The seven tasks give lm-evaluation-harness's numbers; and the commands around them."""
import gzip
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import harness
import train
from config import read_log
from conftest import TINY, make_dataset, run, tiny_gpt
from model import find_checkpoint, load_checkpoint, load_model

SHARED = Path(train.__file__).resolve().parent.parent / "shared"  # optional: the real tasks' documents, and GPT-2's tokenizer
METHODS = [("none", "interleave"), ("pause", "interleave"), ("pause", "add"), ("hidden", "interleave"),
           *(("concept", mix) for mix in ("interleave", "interleave_residual", "add", "none"))]


# -- log-likelihoods ----------------------------------------------------------------------------------

def questions(rng, vocab=61):
    """Pairs of tokens: endings of one context, of contexts with a common start, of length one, beyond the window of 16."""
    draw = lambda n: rng.integers(vocab, size=n).tolist()
    context, start, long = draw(6), draw(3), draw(20)
    ending = draw(4)
    return [[(context, draw(n)) for n in (3, 1, 5)], [(context, ending), (context, ending + draw(2)), (context, ending[:2])], [(start + draw(1), ending), (start + draw(3), ending)],
            [(draw(9), draw(2))], [(long, draw(2)), (long, draw(5))], [(draw(4), draw(12)), (draw(5), draw(12))], [(draw(2), draw(30))], [(draw(1), draw(1)), (draw(2), draw(3))], []]


def plain(model, context, continuation):
    """A forward pass over the whole text."""
    tokens = torch.tensor((context + continuation)[-model.config.block_size - 1:])
    n = min(len(continuation), len(tokens) - 1)
    logp = model(tokens[None, :-1]).logits[0, -n:].log_softmax(-1)
    return logp.gather(-1, tokens[-n:, None]).sum().item(), bool((logp.argmax(-1) == tokens[-n:]).all())


@pytest.mark.parametrize("insert, mix", METHODS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihoods_equal_a_forward_pass_over_each_text(insert, mix, batch_size):
    model = tiny_gpt(insert=insert, mix=mix, hidden_size=12).eval()
    asked = questions(np.random.default_rng(0))
    answers = evaluation.loglikelihoods(model, asked, batch_size)
    with torch.no_grad():
        for pairs, given in zip(asked, answers, strict=True):
            for pair, (loglikelihood, likeliest) in zip(pairs, given, strict=True):
                expected = plain(model, *pair)
                assert loglikelihood == pytest.approx(expected[0], abs=1e-9) and likeliest == expected[1]


def test_the_likeliest_continuation_is_told(monkeypatch):
    monkeypatch.setattr(evaluation, "chunk_rows", lambda device, width: 3)
    model, context = tiny_gpt().eval(), [5, 9, 2]
    best = model.generate(torch.tensor([context]), 4, temperature=0)[0, 3:].tolist()
    other = best[:3] + [(best[3] + 1) % 61]
    answers = evaluation.loglikelihoods(model, [[(context, best), (context, other), (context, best[:1])]], 2)
    assert [likeliest for _, likeliest in answers[0]] == [True, False, True]


def test_a_context_goes_through_the_model_once_and_logits_are_made_where_they_count(monkeypatch):
    model, context, endings = tiny_gpt().eval(), list(range(8)), ([20, 21, 22], [30, 31, 32, 33], [20, 40])
    tokens, logits = [], []
    model.wte.register_forward_hook(lambda module, args, output: tokens.append(args[0].numel()))
    keep = model.head
    monkeypatch.setattr(model, "head", lambda x: (logits.append(len(x)), keep(x))[1])
    evaluation.loglikelihoods(model, [[(context, ending) for ending in endings]], 16)
    assert tokens == [8 + 2 + 3 + 1]            # no continuation's last token is read
    assert logits == [1 + 2 + 3 + 1]            # the context's last position serves all three


def test_windows_predict_every_token_once_with_all_the_context_they_can():
    tokenizer = data.load_tokenizer("stdlib")
    for text in ("", "one", "a longer text, with some words in it; " * 9):
        tokens = tokenizer.encode_ordinary(text)
        for size in (4, 7, len(tokens) or 1):
            pairs = evaluation.encode(tokenizer, None, text, size)
            assert [token for _, continuation in pairs for token in continuation] == tokens
            whole, end = [tokenizer.eot_token] + tokens, 1
            for context, continuation in pairs:
                end += len(continuation)
                assert context + continuation == whole[max(0, end - size - 1):end]


# -- the tasks ------------------------------------------------------------------------------------------

def ours(model, tokenizer, name, docs):
    """(run_task's row, the answers to each document as the harness has them: for WikiText a whole page's)."""
    row = evaluation.run_task(name, docs, model, tokenizer, batch_size=4)
    pairs = [[pair for texts in evaluation.TASKS[name].ask(doc).pairs for pair in evaluation.encode(tokenizer, *texts, model.config.block_size)] for doc in docs]
    answers = evaluation.loglikelihoods(model, pairs, 8)
    return row, [[(sum(x for x, _ in answer), None)] for answer in answers] if name == "wikitext" else answers


def compare(row, answers, name, metrics, expected):
    """Every log-likelihood within 1e-3, every metric equal, and the standard errors of accuracies."""
    for mine, theirs in zip(answers, expected, strict=True):
        assert [likeliest for _, likeliest in mine] == [likeliest for _, likeliest in theirs]
        assert [x for x, _ in mine] == pytest.approx([x for x, _ in theirs], abs=1e-3, rel=0)
    for metric in evaluation.TASKS[name].metrics:
        assert row[f"{name}/{metric}"] == pytest.approx(metrics[metric], rel=1e-9 if "acc" in metric else 1e-5), metric
        if "acc" in metric and len(answers) > 1:
            assert row[f"{name}/{metric}_stderr"] == pytest.approx(metrics[f"{metric}_stderr"], rel=1e-9), metric


@pytest.mark.parametrize("which, name, metrics, answers", json.loads(harness.FIXTURES.read_text()), ids=lambda value: value if isinstance(value, str) else "")
def test_tasks_equal_the_harness(which, name, metrics, answers):
    row, mine = ours(harness.fixture_model(which), data.load_tokenizer("stdlib"), name, harness.DOCUMENTS[name])
    compare(row, mine, name, metrics, [[tuple(pair) for pair in pairs] for pairs in answers])
    assert name not in ("arc_easy", "lambada_openai") or row[f"{name}/cut"] > 0  # texts beyond the window are among them


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer, names, settings", [("stdlib", list(evaluation.TASKS), {}), ("stdlib", list(evaluation.TASKS), harness.MODELS["cocomix"]),
                                                        ("gpt2", [name for name in evaluation.TASKS if name != "wikitext"], {})], ids=["gpt", "cocomix", "gpt2's tokens"])
def test_a_hundred_real_documents_of_each_task_equal_the_harness(tokenizer, names, settings, monkeypatch):
    pytest.importorskip("lm_eval")
    if not (SHARED / "eval").is_dir():
        pytest.skip("needs the tasks' documents in ../shared/eval")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    tokenizer = data.load_tokenizer(tokenizer)
    model = harness.random_model(tokenizer.n_vocab, block_size=256, n_layer=2, n_head=2, n_embd=16, **settings).double()  # a page's sum of float32 would be off by more
    docs = {name: evaluation.documents(name, str(SHARED / "eval"), 100) for name in names}
    for name, (metrics, answers) in harness.harness(model, tokenizer, docs).items():
        row, mine = ours(model, tokenizer, name, docs[name])
        compare(row, mine, name, metrics, answers)


def test_standard_errors_are_those_of_resampling():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, size=400)
    sums = -2.0 * counts + rng.normal(0, 3, size=400)
    mean, error = evaluation.mean_and_error(list(zip(sums.tolist(), counts.tolist())))
    draws = rng.integers(400, size=(4000, 400))
    resampled = sums[draws].sum(1) / counts[draws].sum(1)
    assert mean == pytest.approx(sums.sum() / counts.sum()) and error == pytest.approx(resampled.std(), rel=0.05)
    assert math.exp(-mean) * error == pytest.approx(np.exp(-resampled).std(), rel=0.05)
    assert evaluation.mean_and_error([(1.0, 1), (0.0, 1), (0.0, 1), (0.0, 1)]) == (0.25, pytest.approx(0.25))  # statistics.stdev / sqrt(n)
    assert evaluation.mean_and_error([(1.0, 1)]) == (1.0, None)


def test_averages_are_table_1s():
    row = dict(zip(evaluation.MEASURES, (25.3, 107.6, 52.3, 0.274, 0.594, 0.366, 0.397, 0.507)))  # the paper's NTP 69M
    found = evaluation.averages(row)
    assert found["average_perplexity"] == pytest.approx(61.8, abs=0.1) and found["average_accuracy"] == pytest.approx(0.427, abs=1e-3)
    assert found["task_perplexity"] == pytest.approx((107.6 + 52.3) / 2)
    del row["piqa/acc"], row["perplexity"]
    assert list(evaluation.averages(row)) == ["task_perplexity"]


@pytest.mark.cuda
@pytest.mark.parametrize("insert, mix", METHODS)
def test_cuda_gives_the_cpus_numbers(insert, mix):
    model, asked = tiny_gpt(torch.float32, insert=insert, mix=mix, hidden_size=12).eval(), questions(np.random.default_rng(0))
    torch.set_float32_matmul_precision("highest")
    cpu, cuda = evaluation.loglikelihoods(model, asked, 4), evaluation.loglikelihoods(model.cuda(), asked, 4)
    assert [x for pairs in cuda for x, _ in pairs] == pytest.approx([x for pairs in cpu for x, _ in pairs], abs=1e-3)


# -- the command ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The made-up documents as files, plain and .gz."""
    root = tmp_path_factory.mktemp("eval_data")
    for i, (name, docs) in enumerate(harness.DOCUMENTS.items()):
        text = "".join(json.dumps(doc) + "\n" for doc in docs)
        if i % 2:
            (root / f"{name}.jsonl").write_text(text)
        else:
            (root / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return root


@pytest.fixture(scope="module")
def kept(tmp_path_factory, dataset, chain):
    """A CoCoMix run with all its checkpoints."""
    run_dir = tmp_path_factory.mktemp("kept") / "cocomix"
    status, _, err = run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={run_dir}", "--keep_checkpoints", "--method=cocomix", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}")
    assert status == 0, err
    return run_dir


def test_a_run_keeps_the_model_of_every_evaluation(kept, dataset, tmp_path):
    assert sorted(path.name for path in kept.glob("*.pt")) == ["ckpt.pt", "step_4.pt", "step_8.pt"]
    first, last, newest = (load_checkpoint(kept / name) for name in ("step_4.pt", "step_8.pt", "ckpt.pt"))
    assert "optimizer" not in last and last["step"] == 8 and first["step"] == 4
    assert all(torch.equal(t, last["model"][k]) for k, t in newest["model"].items()) and not torch.equal(first["model"]["wpe.weight"], last["model"]["wpe.weight"])
    shutil.copytree(kept, tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").name == "ckpt.pt"
    (tmp_path / "run/eval.jsonl").write_text("")
    assert run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'run'}", "--max_iters=2", "--overwrite")[0] == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["ckpt.pt", "log.jsonl"]  # nothing of the run before


def test_every_checkpoint_is_evaluated_and_the_figures_drawn(kept, folder, tmp_path):
    common = [kept, f"--eval_data={folder}", "--device=cpu", "--batch_size=8", "--tokens=500"]
    status, out, err = run(evaluation.main, "--every", *common)
    assert status == 0, err
    lines = read_log(kept / "eval.jsonl")
    assert [(line["step"], line["tokens"], line["limit"]) for line in lines] == [(4, 512, None), (8, 1024, None)] and lines[0]["seconds"] < lines[1]["seconds"]
    assert all(f"{task}/{metric}{error}" in line for line in lines for task in evaluation.TASKS for metric in evaluation.TASKS[task].metrics for error in ("", "_stderr"))
    assert all(line["average_accuracy"] == pytest.approx(sum(line[m] for m in list(evaluation.MEASURES)[3:]) / 5, abs=1e-5) for line in lines)
    content = load_checkpoint(kept / "step_4.pt")
    row, _ = ours(load_model(content), data.load_tokenizer(content["tokenizer"]), "lambada_openai", harness.DOCUMENTS["lambada_openai"])
    assert lines[0]["lambada_openai/perplexity"] == pytest.approx(row["lambada_openai/perplexity"], rel=1e-5) != lines[1]["lambada_openai/perplexity"]
    assert out.count("examples/s") == 2 and "LAMBADA ppl" in out and "avg acc" in out

    assert run(evaluation.main, "--tasks=piqa", "--limit=1", *common)[0] == 0
    assert read_log(kept / "eval.jsonl")[-1]["piqa/examples"] == 1
    status, out, err = run(evaluation.main, "--compare", kept, f"--plot={tmp_path / 'x.png'}")
    assert status == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-averages.png", "x-tasks.png", "x.png"] and "x-tasks.png" in out


@pytest.mark.slow
@pytest.mark.parametrize("method, more", [(method, []) for method in train.METHODS] + [("cocomix", [f"--mix={mix}"]) for mix in ("interleave_residual", "add", "none")] + [("cocomix", ["--target=l2"])])
def test_runs_of_every_method_are_evaluated(method, more, chain, dataset, folder, tmp_path):
    teacher = [] if method in ("ntp", "pause") else [f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"]
    assert run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", f"--method={method}", "--max_iters=2", *teacher, *more)[0] == 0
    status, out, err = run(evaluation.main, tmp_path, f"--eval_data={folder}", "--device=cpu", "--tokens=500")
    assert status == 0, err
    line, = read_log(tmp_path / "eval.jsonl")
    assert line["method"] == method and all(math.isfinite(line[measure]) for measure in evaluation.MEASURES)


def test_tasks_run_by_themselves_for_gpt2s_tokens_alone(chain, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "documents", lambda name, *_: asked.append(name) or harness.DOCUMENTS[name])
    pick = lambda *argv: evaluation.chosen_tasks(evaluation.config.parse(evaluation.Config, argv)[0], pick.tokenizer)
    pick.tokenizer = "gpt2"
    assert list(pick()) == list(evaluation.TASKS) and list(pick("--tasks=none")) == []
    pick.tokenizer = "another"
    assert list(pick()) == [] and list(pick(f"--eval_data={folder}")) == list(pick("--tasks")) == list(evaluation.TASKS)
    assert list(pick("--tasks=piqa,arc_easy")) == ["piqa", "arc_easy"]


def test_without_a_network_the_rest_is_evaluated_and_the_tasks_named(monkeypatch, capsys):
    def refused(*_, **__):
        raise OSError("Network is unreachable")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", refused)  # it would try for half a minute
    assert evaluation.chosen_tasks(evaluation.Config(), "gpt2") == {}
    assert "the tasks are left out: EleutherAI/lambada_openai can't be fetched" in capsys.readouterr().out
    with pytest.raises(evaluation.UserError, match="baber/piqa can't be fetched .*--eval_data=DIR"):
        evaluation.chosen_tasks(evaluation.Config(tasks="piqa"), "gpt2")


def test_the_hubs_documents_are_those_of_the_tasks_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    called = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: called.append((args, kwargs)) or harness.DOCUMENTS["arc_easy"])
    assert evaluation.documents("arc_easy", None, 2) == harness.DOCUMENTS["arc_easy"][:2]
    assert called == [(("allenai/ai2_arc", "ARC-Easy"), dict(split="test"))]


def save_gpt2(model, folder):
    """A GPT's weights as GPT-2's are published."""
    conv = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    torch.save({name: t.T.contiguous() if name.endswith(conv) else t for name, t in model.state_dict().items()}, folder / "pytorch_model.bin")


def test_gpt2_itself_is_evaluated_from_a_folder_of_its_weights(tmp_path, folder, monkeypatch):
    model = tiny_gpt(torch.float32, n_embd=64, n_head=1, vocab_size=4096, block_size=64)
    save_gpt2(model, tmp_path)
    monkeypatch.setattr(evaluation.data, "load_tokenizer", lambda name, keep=data.load_tokenizer: keep("stdlib"))  # GPT-2's may not be on this machine
    make_dataset(tmp_path / "val")
    meta = json.loads((tmp_path / "val/meta.json").read_text())
    (tmp_path / "val/meta.json").write_text(json.dumps(meta | dict(tokenizer="gpt2", tokenizer_hash="gpt2")))
    status, out, err = run(evaluation.main, f"--model={tmp_path}", f"--dataset={tmp_path / 'val'}", f"--eval_data={folder}", "--device=cpu", f"--write={tmp_path / 'w.jsonl'}")
    assert status == 0, err
    row, = read_log(tmp_path / "w.jsonl")
    mine, _ = ours(model, data.load_tokenizer("stdlib"), "arc_easy", harness.DOCUMENTS["arc_easy"])
    assert row["arc_easy/acc"] == pytest.approx(mine["arc_easy/acc"], abs=1e-6) and row["val_tokens"] == 3999 and row["average_perplexity"] > 0


def test_the_official_perplexity_drops_the_remainder_and_each_blocks_first_token(chain, dataset, tmp_path):
    status, _, err = run(evaluation.main, chain["cocomix"], "--official", "--tokens=1000", "--device=cpu", f"--write={tmp_path / 'w.jsonl'}")
    assert status == 0, err
    model, tokens = load_model(load_checkpoint(chain["cocomix"])), torch.tensor(data.load_tokens(dataset, "val")[:1000].astype(int))
    blocks = tokens[:1000 // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(blocks[:, :-1]).logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert read_log(tmp_path / "w.jsonl")[0]["official_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


BAD = {  # what is wrong: (arguments, what the line must say)
    "an unknown task": ("{ntp} --tasks=piqa,arc", "no task 'arc'", "arc_easy"),
    "no documents": ("{ntp} --eval_data={bad}/none", "no lambada_openai.jsonl", "--tasks"),
    "documents cut short": ("{ntp} --eval_data={bad} --tasks=piqa", "piqa.jsonl.gz", "cut short"),
    "documents that are no JSON": ("{ntp} --eval_data={bad} --tasks=arc_easy", "arc_easy.jsonl", "JSON"),
    "documents of another task": ("{ntp} --eval_data={bad} --tasks=winogrande", "fields of allenai/winogrande", "sentence"),
    "an empty file": ("{ntp} --eval_data={bad} --tasks=wikitext", "wikitext.jsonl is empty", ""),
    "only the last checkpoint": ("{ntp} --every", "last checkpoint only", "--keep_checkpoints"),
    "a run as GPT-2": ("--model={ntp}", "a run of ours", ""),
    "GPT-2's weights that aren't there": ("--model={bad}/gpt2-none.bin", "no weights", "gpt2-none"),
    "GPT-2 without anything to evaluate it on": ("--model={gpt2} --tasks=none", "nothing to evaluate", "--dataset"),
    "val shorter than a block": ("{ntp} --official --tokens=20", "20 tokens", "block of 32"),
    "a limit of nothing": ("{ntp} --limit=0", "limit='0'", "at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_says_what_is_wrong(case, chain, tmp_path):
    whole = gzip.compress("\n".join(json.dumps(doc) for doc in harness.DOCUMENTS["piqa"] * 50).encode())
    (tmp_path / "piqa.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "arc_easy.jsonl").write_text("no JSON")
    (tmp_path / "winogrande.jsonl").write_text('{"goal": "a"}\n')
    (tmp_path / "wikitext.jsonl").write_text("")
    (tmp_path / "gpt2").mkdir()
    save_gpt2(tiny_gpt(torch.float32, n_embd=64, n_head=1), tmp_path / "gpt2")
    arguments, *needed = BAD[case]
    status, _, err = run(evaluation.main, *arguments.format(ntp=chain["ntp"], bad=tmp_path, gpt2=tmp_path / "gpt2").split(), "--device=cpu")
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err, err
    assert all(text in lines[0] for text in needed), lines[0]
