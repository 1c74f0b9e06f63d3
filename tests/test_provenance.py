"""Runs used after what they were trained with has changed, moved or gone."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TINY_SAE, StopAt, make_dataset, run

import concepts
import sae
import sample
import train
from support.bpe import save_bpe
from support.checkpoint import config_of
from support.tokens import tokens_hash

evaluation = __import__("eval")
COCOMIX = [*TINY, "--method=cocomix", "--seed=1"]

@pytest.fixture
def copy(tmp_path, chain, dataset):
    """A chain and its dataset in folders of their own, which a test may change."""
    data = make_dataset(tmp_path / "data")
    labels = [f"--concept_model={tmp_path / 'gpt'}", f"--sae={tmp_path / 'sae'}"]
    for name in ("gpt", "sae"):
        shutil.copytree(chain[name], tmp_path / name)
    keys = [*COCOMIX, *labels, f"--dataset={data}", f"--out_dir={tmp_path / 'cocomix'}"]
    assert run(train.main, *keys)[0] == 0
    return tmp_path, keys

def row(folder, *keys):
    """eval.py on the run of `copy` → (its row, what it printed)."""
    out = folder / "rows.jsonl"
    out.unlink(missing_ok=True)
    status, printed, err = run(evaluation.main, folder / "cocomix", f"--write={out}", *keys)
    assert status == 0, err
    return json.loads(out.read_text()), printed

def retrain(folder, name):
    """Another concept model, or another SAE, in the place of the old one."""
    if name == "sae":
        status = run(sae.main, *TINY_SAE, f"--concept_model={folder / 'gpt'}", "--max_tokens=4096",
                     f"--dataset={folder / 'data'}", f"--out_dir={folder / 'sae'}", "--overwrite",
                     "--seed=9")
    else:
        status = run(train.main, *TINY, "--method=ntp", "--seed=9", "--overwrite",
                     f"--dataset={folder / 'data'}", f"--out_dir={folder / 'gpt'}")
    assert status[0] == 0, status[2]

@pytest.mark.parametrize("name", ["gpt", "sae"])
def test_a_replaced_concept_model_or_sae_is_noticed(copy, name):
    folder, keys = copy
    before, _ = row(folder)
    shutil.copytree(folder / name, folder / "old")
    retrain(folder, name)
    key = {"gpt": "concept_model", "sae": "sae"}[name]
    after, printed = row(folder)
    assert "left out: concept loss and hit rate" in printed
    assert "sae" in printed if name == "sae" else "concept_model" in printed
    assert after["loss"] == before["loss"] and "concept_loss" not in after
    assert "hit_rate" not in after
    for main in (sample.main, concepts.main):
        extra = ["--inspect"] if main is sample.main else []
        status, _, err = run(main, folder / "cocomix", *extra)
        assert status == 1, err  # no index was built in time
        assert f"--{key}=" in err or "another concept model" in err
    if name == "sae":  # an SAE belongs to one concept model, so a moved one needs both
        found, _ = row(folder, f"--{key}={folder / 'old'}")
        assert found["concept_loss"] == before["concept_loss"]

@pytest.mark.parametrize("name", ["gpt", "sae"])
def test_a_run_does_not_resume_with_another_concept_model(copy, name):
    folder, keys = copy
    with StopAt(5):
        run(train.main, *keys, "--overwrite")
    retrain(folder, name)
    status, _, err = run(train.main, *keys, "--resume")
    assert status == 1 and ("replaced" in err or "another concept model" in err), err

def test_a_teacher_is_compared_too(copy):
    folder, _ = copy
    keys = [*TINY, "--method=kd", f"--concept_model={folder / 'gpt'}",
            f"--dataset={folder / 'data'}", f"--out_dir={folder / 'kd'}"]
    with StopAt(5):
        run(train.main, *keys)
    retrain(folder, "gpt")
    status, _, err = run(train.main, *keys, "--resume")
    assert status == 1 and "concept_model=" in err and "replaced" in err

def test_a_stored_index_keeps_its_names(copy):
    """It was built with the right concept model, so it needs none."""
    folder, _ = copy
    status, named, _ = run(sample.main, folder / "cocomix", "--inspect", "--max_new_tokens=4")
    assert status == 0
    retrain(folder, "gpt")
    status, again, _ = run(sample.main, folder / "cocomix", "--inspect", "--max_new_tokens=4")
    assert status == 0 and again == named.split("\n", 1)[1]
    status, out, _ = run(concepts.main, folder / "cocomix")
    assert status == 0 and "left out: passages" in out and "report:" in out

@pytest.mark.parametrize("split", ["train", "val"])
def test_changed_tokens_are_noticed(copy, split):
    folder, keys = copy
    with StopAt(5):
        run(train.main, *keys, "--overwrite")
    path = folder / "data" / f"{split}.bin"
    tokens = bytearray(path.read_bytes())
    tokens[len(tokens) // 2] ^= 1  # one token
    path.write_bytes(tokens)
    status, _, err = run(train.main, *keys, "--resume")
    assert status == 1 and f"{split}.bin" in err and "has changed" in err
    if split == "val":
        status, _, err = run(evaluation.main, folder / "cocomix")
        assert status == 1 and "val.bin" in err
        _, printed = row(folder, f"--dataset={folder / 'data'}")  # on purpose
        assert "not the one of this run's training" in printed

def test_a_run_is_self_contained(copy):
    """Text can be generated when all else has moved; evaluation says where to look."""
    folder, keys = copy
    before, _ = row(folder)
    where_it_was = [f"--{name}=none" for name in ("dataset", "concept_model", "sae")]
    assert row(folder, *where_it_was)[0]["concept_loss"] == before["concept_loss"]
    for name in ("data", "gpt", "sae"):
        (folder / name).rename(folder / f"moved_{name}")
    assert run(sample.main, folder / "cocomix", "--max_new_tokens=4")[0] == 0
    status, _, err = run(evaluation.main, folder / "cocomix")
    assert status == 1 and "no dataset" in err
    after, printed = row(folder, f"--dataset={folder / 'moved_data'}")
    assert after["loss"] == before["loss"] and "left out: concept loss" in printed
    places = [f"--dataset={folder / 'moved_data'}", f"--concept_model={folder / 'moved_gpt'}",
              f"--sae={folder / 'moved_sae'}"]
    after, _ = row(folder, *places)
    same = [name for name in before if "second" not in name and name != "tokens_per_s"]
    assert {n: after[n] for n in same} == {n: before[n] for n in same}
    assert run(sample.main, folder / "cocomix", "--inspect", "--max_new_tokens=4", *places)[0] == 0
    assert run(concepts.main, folder / "cocomix", *places)[0] == 0
    with StopAt(5):
        run(train.main, *COCOMIX, *places, f"--out_dir={folder / 'cocomix'}", "--overwrite")
    for name in ("data", "gpt", "sae"):
        (folder / f"moved_{name}").rename(folder / name)
    status, _, err = run(train.main, *keys, "--resume")  # everything is back in its old place
    assert status == 0, err

def test_an_sae_is_trained_again_where_its_concept_model_is_new(copy):
    folder, _ = copy
    keys = [*TINY_SAE, f"--concept_model={folder / 'gpt'}", "--max_tokens=8192",
            "--eval_tokens=500", "--learning_rate=3e-3", f"--dataset={folder / 'data'}",
            f"--out_dir={folder / 'sae'}"]
    assert run(sae.main, *keys, "--overwrite")[0] == 0
    retrain(folder, "gpt")
    status, _, err = run(sae.main, *keys, "--resume")
    assert status == 1 and "concept_model changed" in err and "--overwrite" in err
    assert run(sae.main, *keys, "--overwrite")[0] == 0

def test_an_sae_without_its_report_is_named(copy):
    folder, keys = copy
    (folder / "sae" / "sae.json").unlink()
    status, out, err = run(train.main, *keys, "--overwrite")
    assert status == 0 and "no sae.json next to it; not compared with the concept model" in out, err

def test_a_dataset_is_read_with_its_own_tokenizer_wherever_it_is(copy):
    folder, keys = copy
    (folder / "data").rename(folder / "moved")
    other = make_dataset(folder / "data")  # another one at the old place, with another tokenizer
    ranks = {bytes([255 - b]): b for b in range(256)}
    save_bpe(ranks, Path(other) / "bytes.tiktoken")
    moved = [key for key in keys if not key.startswith("--dataset")]
    moved += [f"--dataset={folder / 'moved'}", "--overwrite"]
    status, _, err = run(train.main, *moved)
    assert status == 0, err
    for place in (folder / "data", folder / "moved"):
        (place / "bytes.tiktoken").unlink()
    status, _, err = run(train.main, *moved)
    assert status == 1 and f"copy it to {folder / 'moved'}, or prepare the dataset again" in err

@pytest.mark.parametrize("owner, other", [("gpt", "sae"), ("sae", "gpt")])
def test_a_run_does_not_write_into_anothers_folder(copy, owner, other):
    folder, keys = copy
    before = {p.name: p.read_bytes() for p in (folder / owner).iterdir()}
    if other == "sae":
        status = run(sae.main, *TINY_SAE, f"--concept_model={folder / 'gpt'}", "--overwrite",
                     f"--dataset={folder / 'data'}", f"--out_dir={folder / owner}")
    else:
        status = run(train.main, *TINY, "--method=ntp", "--overwrite",
                     f"--dataset={folder / 'data'}", f"--out_dir={folder / owner}")
    assert status[0] == 1 and "not of this run" in status[2], status
    assert {p.name: p.read_bytes() for p in (folder / owner).iterdir()} == before

@pytest.mark.parametrize("script, name", [
    ("train", "log.jsonl"), ("train", "step_4.pt"), ("train", "eval.jsonl"), ("sae", "sae.pt"),
    ("sae", "sae.json"), ("sae", "log.jsonl")])
def test_a_file_of_a_runs_name_is_replaced_only_on_demand(copy, script, name):
    folder, _ = copy
    out = folder / "out"
    out.mkdir()
    (out / name).write_text("mine")
    main, keys = dict(train=(train.main, [*TINY, "--method=ntp"]),
                      sae=(sae.main, [*TINY_SAE, f"--concept_model={folder / 'gpt'}",
                                      "--max_tokens=256", "--eval_tokens=500"]))[script]
    keys = [*keys, f"--dataset={folder / 'data'}", f"--out_dir={out}"]
    for more in ([], ["--resume"]):
        status, _, err = run(main, *keys, *more)
        assert status == 1 and f"holds {name}, which is not of this run" in err
        assert [(p.name, p.read_text()) for p in out.iterdir()] == [(name, "mine")]
    status, _, err = run(main, *keys, "--overwrite")
    assert status == 0, err
    assert not (out / name).is_file() or (out / name).read_bytes() != b"mine"

def test_results_are_printed_where_they_cannot_be_kept(copy):
    folder, _ = copy
    (folder / "cocomix" / "eval.jsonl").mkdir()
    (folder / "cocomix" / "concepts.pt").mkdir()
    found, printed = row(folder)
    assert "left out: a line in eval.jsonl" in printed and "loss" in found
    status, out, err = run(sample.main, folder / "cocomix", "--inspect", "--max_new_tokens=4")
    assert status == 0 and "--out_dir=FOLDER" in out, err
    elsewhere = folder / "elsewhere"
    row(folder, f"--out_dir={elsewhere}")
    assert run(concepts.main, folder / "cocomix", f"--out_dir={elsewhere}")[0] == 0
    assert {p.name for p in Path(elsewhere).iterdir()} == {"eval.jsonl", "concepts.pt",
                                                           "concepts.html"}
    status, _, err = run(evaluation.main, folder / "cocomix", f"--write={folder}")
    assert status == 1 and "name a file" in err

def test_tokens_hash_sees_every_token_of_a_small_split():
    tokens = np.arange(1 << 12, dtype="<u2")
    before = tokens_hash(tokens)
    for i in (0, 1, 2000, len(tokens) - 1):
        changed = tokens.copy()
        changed[i] += 1
        assert tokens_hash(changed) != before
    assert tokens_hash(tokens[:-1]) != before

def test_the_config_of_a_folder_is_named(monkeypatch):
    monkeypatch.chdir(Path(train.__file__).parent)
    assert config_of(Path("out/stdlib/gpt")) == Path("config/stdlib_gpt.py")
    assert config_of(Path("out/stdlib")) == "config/…"
