"""The command eval.py: validation loss, hit rates, tasks, GPT-2, and its messages."""
import gzip
import json
import math
import os
import shutil
import typing

import harness
import pytest
import torch
from conftest import TINY, make_dataset, run, tiny_gpt
from test_tasks import ours

import concepts
import eval as evaluation
import train
from model import load_model
from support import curves, reference
from support.checkpoint import find_checkpoint, load_checkpoint
from support.log import read_log
from support.tasks import TASKS
from support.tokens import load_tokenizer, load_tokens, sequential, tokens_of_run

CPU = torch.device("cpu")

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The invented documents as files, plain and compressed."""
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
    status, _, err = run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={run_dir}",
                         "--keep_checkpoints", "--method=cocomix",
                         f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}")
    assert status == 0, err
    return run_dir

def test_a_run_keeps_the_model_of_every_evaluation(kept, dataset, tmp_path):
    assert sorted(path.name for path in kept.glob("*.pt")) == ["ckpt.pt", "step_4.pt", "step_8.pt"]
    first, last, newest = (load_checkpoint(kept / name)
                           for name in ("step_4.pt", "step_8.pt", "ckpt.pt"))
    assert "optimizer" not in last and last["step"] == 8 and first["step"] == 4
    assert all(torch.equal(t, last["model"][k]) for k, t in newest["model"].items())
    assert not torch.equal(first["model"]["wpe.weight"], last["model"]["wpe.weight"])
    shutil.copytree(kept, tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").name == "ckpt.pt"
    (tmp_path / "run/eval.jsonl").write_text("")
    again = "--max_iters=2", "--overwrite"
    assert run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'run'}",
               *again)[0] == 0
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["ckpt.pt", "log.jsonl"]  # nothing of the earlier run

def test_the_table_and_its_rows_are_those_of_a_plain_evaluation(chain, dataset, tmp_path):
    status, out, err = run(evaluation.main, chain["ntp"], chain["cocomix"], "--device=cpu",
                           f"--plot={tmp_path / 'c.png'}", f"--write={tmp_path / 'r.jsonl'}")
    assert status == 0, err
    ntp, cocomix = read_log(tmp_path / "r.jsonl")
    content = load_checkpoint(chain["cocomix"])
    model, concept_model = load_model(content), concepts.concept_model_of_run(content, CPU)
    tokens = torch.tensor(load_tokens(dataset, "val").astype(int))[None]
    n, total, hits = tokens.shape[1] - 1, 0.0, 0.0
    for i in range(0, n, 32):
        x, y = tokens[:, i:min(i + 32, n)], tokens[:, i + 1:i + 33]
        with torch.no_grad():
            out_i = model(x)
        total += torch.nn.functional.cross_entropy(out_i.logits[0], y[0], reduction="sum").item()
        labels = concept_model.labels(x, y)[0].tolist()
        predicted = out_i.concepts.indices[0].tolist()
        hits += sum(len(set(a) & set(b)) / 4 for a, b in zip(labels, predicted, strict=True))
    assert (ntp["run"], cocomix["run"]) == ("ntp", "cocomix") and cocomix["val_tokens"] == n
    assert cocomix["loss"] == pytest.approx(total / n, abs=1e-5)
    assert cocomix["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-5)
    assert cocomix["hit_rate"] == pytest.approx(hits / n, abs=1e-3) and "hit_rate" not in ntp
    assert "hit rate" in out and "cocomix" in out and "–" in out
    assert (tmp_path / "c.png").stat().st_size > 5000

def test_compare_prints_learning_curves_from_folders_and_from_logs(chain, tmp_path):
    log, plot = tmp_path / "mine.jsonl", tmp_path / "c.svg"
    shutil.copy(f"{chain['cocomix']}/log.jsonl", log)
    status, out, err = run(evaluation.main, "--compare", chain["ntp"], log, f"--plot={plot}")
    assert status == 0, err
    val = [line["val_loss"] for line in read_log(log) if line["step"] and "val_loss" in line]
    lines = out.splitlines()
    assert lines[2].startswith("| ntp | 1 |") and plot.is_file()
    assert lines[3].startswith(f"| mine | 1 | {val[0]:.3f} | {val[1]:.3f} |")
    assert "--compare needs runs" in run(evaluation.main, "--compare")[2]

def test_every_checkpoint_is_evaluated_and_the_figures_drawn(kept, folder, tmp_path):
    common = [kept, f"--eval_data={folder}", "--device=cpu", "--batch_size=8", "--tokens=500"]
    status, out, err = run(evaluation.main, "--every", *common)
    assert status == 0, err
    lines = read_log(kept / "eval.jsonl")
    steps = [(line["step"], line["tokens"], line["limit"]) for line in lines]
    assert steps == [(4, 512, None), (8, 1024, None)]
    assert lines[0]["seconds"] < lines[1]["seconds"]
    for line in lines:
        for task in TASKS:
            for metric in TASKS[task].metrics:
                assert {f"{task}/{metric}", f"{task}/{metric}_stderr"} <= line.keys()
        accuracies = [line[measure] for measure in curves.AVERAGES["average_accuracy"]]
        assert line["average_accuracy"] == pytest.approx(sum(accuracies) / 5, abs=1e-5)
    content, name = load_checkpoint(kept / "step_4.pt"), "lambada_openai"
    row, _ = ours(load_model(content), load_tokenizer(content["tokenizer"]), name,
                  harness.DOCUMENTS[name])
    first, last = (line[f"{name}/perplexity"] for line in lines)
    assert first == pytest.approx(row[f"{name}/perplexity"], rel=1e-5) and first != last
    assert out.count("examples/s") == 2 and "LAMBADA ppl" in out and "avg acc" in out

    assert run(evaluation.main, "--tasks=piqa", "--limit=1", *common)[0] == 0
    assert read_log(kept / "eval.jsonl")[-1]["piqa/examples"] == 1
    status, out, err = run(evaluation.main, "--compare", kept, f"--plot={tmp_path / 'x.png'}")
    assert status == 0 and "x-tasks.png" in out, err
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x-averages.png", "x-tasks.png", "x.png"]

def test_what_cannot_be_evaluated_is_left_out_and_results_stay_with_their_run(
        chain, dataset, tmp_path):
    for name in ("ntp", "cocomix"):
        shutil.copytree(chain[name], tmp_path / name, ignore=lambda *_: ["eval.jsonl"])
    ntp, lost = tmp_path / "ntp", tmp_path / "lost"
    shutil.copytree(ntp, lost)
    content = torch.load(lost / "ckpt.pt")
    content["train_config"]["dataset"] = str(tmp_path / "gone")
    torch.save(content, lost / "ckpt.pt")
    rows = tmp_path / "rows.jsonl"
    status, out, err = run(evaluation.main, lost, ntp, f"--write={rows}", "--tokens=500")
    assert status == 0 and "left out: lost: no dataset" in out, err
    assert [row["run"] for row in read_log(rows)] == ["ntp"]
    status, out, err = run(evaluation.main, lost, lost / "ckpt.pt")
    assert status == 1 and err == "error: none of these runs can be evaluated\n"
    assert "is the folder of another run" in run(
        evaluation.main, ntp, f"--out_dir={tmp_path / 'cocomix'}")[2]
    assert "name the run without a key" in run(evaluation.main, f"--out_dir={ntp}")[2]
    assert not (tmp_path / "cocomix" / "eval.jsonl").exists()

def test_only_the_steps_that_a_run_kept_are_its_files(kept, tmp_path):
    mine = shutil.copytree(kept, tmp_path / "mine", ignore=lambda *_: ["eval.jsonl"])
    shutil.copy(mine / "step_4.pt", mine / "step_best.pt")
    status, out, err = run(evaluation.main, mine, "--every", "--tokens=500", "--tasks=none")
    assert status == 0 and [line["step"] for line in read_log(mine / "eval.jsonl")] == [4, 8], err
    keys = load_checkpoint(mine)["train_config"]
    argv = [f"--{name}={keys[name]}" for name in ("dataset", "method", "concept_model", "sae")]
    assert run(train.main, *TINY, *argv, f"--out_dir={mine}", "--overwrite")[0] == 0
    assert [path.name for path in mine.glob("step_*")] == ["step_best.pt"]

METHODS = typing.get_args(typing.get_type_hints(train.Config)["method"])
COCOMIX = "--mix=interleave_residual", "--mix=add", "--mix=none", "--target=l2"

@pytest.mark.slow
@pytest.mark.parametrize("method, argv", [*((method, []) for method in METHODS),
                                          *(("cocomix", [key]) for key in COCOMIX)])
def test_runs_of_every_method_are_evaluated(method, argv, chain, dataset, folder, tmp_path):
    teacher = [f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"]
    if method in ("ntp", "pause"):
        teacher = []
    assert run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=2",
               f"--method={method}", *teacher, *argv)[0] == 0
    status, out, err = run(evaluation.main, tmp_path, f"--eval_data={folder}", "--device=cpu",
                           "--tokens=500")
    assert status == 0, err
    line, = read_log(tmp_path / "eval.jsonl")
    assert line["method"] == method
    assert all(math.isfinite(line[measure]) for measure in curves.MEASURES)

def save_gpt2(model, folder):
    """A GPT's weights in the layout in which GPT-2's are published."""
    conv = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: t.T.contiguous() if name.endswith(conv) else t
             for name, t in model.state_dict().items()}
    state["wte.weight"] = state["wte.weight"][:model.config.vocab_size].clone()
    torch.save(state, folder / "pytorch_model.bin")

def test_gpt2_is_evaluated_from_a_folder_of_its_weights(tmp_path, folder, monkeypatch):
    model = tiny_gpt(torch.float32, n_embd=64, n_head=1, vocab_size=50257, block_size=64)
    save_gpt2(model, tmp_path)
    tokenizer = load_tokenizer("stdlib")  # GPT-2's may not be on this machine
    monkeypatch.setattr(evaluation, "tokenizer_of_run", lambda content: tokenizer)
    make_dataset(tmp_path / "val")
    meta = json.loads((tmp_path / "val/meta.json").read_text())
    meta |= dict(tokenizer="gpt2", tokenizer_hash="gpt2")
    (tmp_path / "val/meta.json").write_text(json.dumps(meta))
    status, out, err = run(evaluation.main, f"--model={tmp_path}", f"--dataset={tmp_path / 'val'}",
                           f"--eval_data={folder}", f"--write={tmp_path / 'w.jsonl'}",
                           "--device=cpu")
    assert status == 0, err
    row, = read_log(tmp_path / "w.jsonl")
    mine, _ = ours(model, tokenizer, "arc_easy", harness.DOCUMENTS["arc_easy"])
    assert row["arc_easy/acc"] == pytest.approx(mine["arc_easy/acc"], abs=1e-6)
    assert row["val_tokens"] == 3999 and row["average_perplexity"] > 0

def test_the_official_perplexity_drops_the_remainder_and_each_blocks_first_token(
        chain, dataset, tmp_path):
    status, _, err = run(evaluation.main, chain["cocomix"], "--official", "--tokens=1000",
                         "--device=cpu", f"--write={tmp_path / 'w.jsonl'}")
    assert status == 0, err
    model = load_model(load_checkpoint(chain["cocomix"]))
    tokens = torch.tensor(load_tokens(dataset, "val")[:1000].astype(int))
    blocks = tokens[:1000 // 32 * 32].view(-1, 32)
    with torch.no_grad():
        logits = model(blocks[:, :-1]).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, blocks[:, 1:].flatten())
    row, = read_log(tmp_path / "w.jsonl")
    assert row["official_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)

def test_the_hit_rate_is_shown_next_to_that_of_the_most_common_labels(chain):
    content = load_checkpoint(chain["cocomix"])
    row = evaluation.evaluate(content, load_model(content), CPU)
    concept_model = concepts.concept_model_of_run(content, CPU)
    labels = torch.cat([concept_model.labels(x, y).flatten(0, 1) for x, y in
                        sequential(tokens_of_run(content, "val"), 32, 8, 257)])
    most_common = set(labels.flatten().bincount().topk(4).indices.tolist())
    hits = [len(most_common & set(position)) / 4 for position in labels.tolist()]
    assert row["fixed_hit_rate"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)

BAD = {  # what is wrong: (arguments, what the line must say)
    "an unknown task": ("{ntp} --tasks=piqa,arc", "no task 'arc'", "arc_easy"),
    "no documents": ("{ntp} --eval_data={bad}/none", "no lambada_openai.jsonl", "--tasks"),
    "documents cut short": ("{ntp} --eval_data={bad} --tasks=piqa", "piqa.jsonl.gz", "cut short"),
    "documents that are no JSON":
        ("{ntp} --eval_data={bad} --tasks=arc_easy", "arc_easy.jsonl", "JSON"),
    "documents of another task":
        ("{ntp} --eval_data={bad} --tasks=winogrande", "fields of allenai/winogrande", "sentence"),
    "an empty file": ("{ntp} --eval_data={bad} --tasks=wikitext", "wikitext.jsonl is empty", ""),
    "only the last checkpoint": ("{ntp} --every", "last checkpoint only", "--keep_checkpoints"),
    "documents with flipped bytes":
        ("{ntp} --eval_data={bad} --tasks=hellaswag", "hellaswag.jsonl.gz", "damaged"),
    "documents nested too deeply":
        ("{ntp} --eval_data={bad} --tasks=social_iqa", "social_iqa.jsonl", "RecursionError"),
    "a run as GPT-2": ("--model={ntp}", "is not GPT-2's weights", "python eval.py /"),
    "missing GPT-2 weights": ("--model={bad}/gpt2-none.bin", "No such file", "gpt2-none"),
    "GPT-2 with nothing to evaluate it on":
        ("--model={gpt2} --tasks=none", "nothing to evaluate", "--dataset"),
    "val shorter than a block": ("{ntp} --official --tokens=20", "20 val tokens", "--tokens"),
    "a picture in place of another file":
        ("{ntp} --plot={bad}/mine.png", "mine.png is there already", "--overwrite"),
    "one of two pictures in place of another file":
        ("--compare {ntp} --plot={bad}/mine", "mine.png is there already", "--overwrite"),
    "rows in another file": ("{ntp} --write={bad}/notes.md", "notes.md", "name another"),
    "rows in the log of a run": ("{ntp} --write={ntp}/log.jsonl", "log.jsonl", "name another"),
    "a limit of nothing": ("{ntp} --limit=0", "limit='0'", "at least 1"),
}

@pytest.mark.parametrize("case", BAD)
def test_one_line_says_what_is_wrong(case, chain, tmp_path):
    text = "\n".join(json.dumps(doc) for doc in harness.DOCUMENTS["piqa"] * 50)
    whole = gzip.compress(text.encode())
    (tmp_path / "piqa.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "hellaswag.jsonl.gz").write_bytes(whole[:30] + b"\xff" * 20 + whole[50:])
    (tmp_path / "social_iqa.jsonl").write_text("[" * 100_000)
    (tmp_path / "arc_easy.jsonl").write_text("no JSON")
    for name in ("mine.png", "notes.md"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "winogrande.jsonl").write_text('{"goal": "a"}\n')
    (tmp_path / "wikitext.jsonl").write_text("")
    (tmp_path / "gpt2").mkdir()
    save_gpt2(tiny_gpt(torch.float32, n_embd=64, n_head=1, vocab_size=50257), tmp_path / "gpt2")
    arguments, *needed = BAD[case]
    argv = arguments.format(ntp=chain["ntp"], bad=tmp_path, gpt2=tmp_path / "gpt2").split()
    status, _, err = run(evaluation.main, *argv, "--device=cpu")
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err, err
    assert all(text in lines[0] for text in needed), lines[0]
    assert all((tmp_path / name).read_text() == "mine" for name in ("mine.png", "notes.md"))

def test_the_concept_loss_of_eval_is_the_mean_over_tokens(chain, dataset):
    content = load_checkpoint(chain["cocomix"])
    model, cm = load_model(content), concepts.concept_model_of_run(content, CPU)
    val, total = torch.tensor(load_tokens(dataset, "val")[:101].astype(int)), 0.0
    for i in range(0, 100, 32):
        x, y = val[None, i:min(i + 32, 100)], val[None, i + 1:min(i + 33, 101)]
        total += reference.forward(model, x, cm.labels(x, y))[1].item() * y.numel()
    row = evaluation.evaluate(content, model, CPU, tokens=100, batch_size=2)
    assert row["val_tokens"] == 100
    assert row["concept_loss"] == pytest.approx(total / 100, rel=1e-4)

def test_without_a_name_the_newest_run_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, age in (("a", 300), ("b", 100), ("c", 200)):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "ckpt.pt").touch()
        os.utime(tmp_path / "out" / name / "ckpt.pt", (10_000 - age, 10_000 - age))
    assert find_checkpoint().parent.name == "b"

def test_a_moved_dataset_is_still_the_runs_own(chain, dataset, tmp_path):
    run_folder = shutil.copytree(chain["ntp"], tmp_path / "run")
    moved = shutil.copytree(dataset, tmp_path / "moved")
    for place in (moved, make_dataset(tmp_path / "other", seed=5)):
        status, _, err = run(evaluation.main, run_folder, f"--dataset={place}", "--tokens=64")
        assert status == 0, err
    rows = read_log(run_folder / "eval.jsonl")
    assert [row["dataset"] for row in rows[-2:]] == [None, str(tmp_path / "other")]

def test_the_official_perplexity_alone_is_left_out(chain, folder):
    status, out, err = run(evaluation.main, chain["ntp"], "--official", "--tokens=20",
                           "--tasks=piqa", f"--eval_data={folder}", "--limit=1")
    assert status == 0 and "left out: official perplexity" in out and "val loss" in out, err
    assert "left out: val loss" not in out
