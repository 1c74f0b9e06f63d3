"""data/openwebtext and data/openwebmath, on small parquet files like the hub's, written here."""
import errno
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import run
from test_prepare import script

from support import hub
from support.prepare import locked
from support.tokens import ROOT, load_meta, load_tokenizer

datasets = pytest.importorskip("datasets", reason="needs datasets (requirements.txt)")
DOCUMENTS = [f"document {i}, " + "word " * (i % 7) + "größer." for i in range(300)]
TOKENIZER = load_tokenizer("stdlib")

def parquet(folder, documents, files=3):
    """Write parquet files named as on the hub, with an extra column."""
    import pyarrow
    import pyarrow.parquet
    (folder / "data").mkdir(parents=True)
    for i in range(files):
        texts = documents[len(documents) * i // files:len(documents) * (i + 1) // files]
        table = pyarrow.table(dict(url=["http://"] * len(texts), text=texts))
        name = f"train-{i:05}-of-{files:05}-0123abcd.parquet"
        pyarrow.parquet.write_table(table, folder / "data" / name, row_group_size=40)
    return folder

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return parquet(tmp_path_factory.mktemp("hub") / "small", DOCUMENTS)

def prepare(source, out, *more, name="openwebtext"):
    argv = [f"--source={source}", f"--out={out}", "--tokenizer=stdlib"]
    return run(script(name).main, *argv, *more)

def encoded(documents):
    ids = [TOKENIZER.encode_ordinary(text) + [TOKENIZER.eot_token] for text in documents]
    return np.concatenate(ids).astype("<u2").tobytes()

def written(out):
    names = "train.bin", "val.bin", "meta.json"
    return {name: (out / name).read_bytes() for name in names}

def last_line(err):
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    return lines[-1]

def test_the_held_out_documents_are_nanogpts():
    for n in (40_001, 123_457):
        split = datasets.Dataset.from_dict(dict(number=np.arange(n))).train_test_split(
            test_size=0.0005, seed=2357, shuffle=True)
        assert hub.held_out_of(n).tolist() == split["test"]["number"][:]

@pytest.mark.parametrize("name", ["openwebtext", "openwebmath"])
def test_a_small_trial_uses_the_first_documents_and_holds_out_twenty(small, tmp_path, name):
    status, out, err = prepare(small, tmp_path, "--num_docs=150", name=name)
    assert status == 0, err
    files, meta = written(tmp_path), load_meta(tmp_path)
    held_out = [DOCUMENTS[i] for i in np.random.default_rng(2357).permutation(150)[:20]]
    assert files["val.bin"] == encoded(held_out)
    assert files["train.bin"] == encoded([d for d in DOCUMENTS[:150] if d not in held_out])
    assert meta["train_tokens"] == len(files["train.bin"]) // 2
    assert meta["val_tokens"] == len(files["val.bin"]) // 2 and meta["documents"] == 150
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    assert f"{meta['train_tokens']:,} train tokens" in out

@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_an_interrupted_run_resumes_and_gives_the_same_files(
        small, tmp_path, monkeypatch, stop_after):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert prepare(small, whole, "--num_docs=300")[0] == 0
    write_tokens, calls = hub.write_tokens, []

    def write(path, pieces, tokenizer):
        calls.append(path)
        return write_tokens(path, interrupted(pieces), tokenizer)

    def interrupted(pieces):
        for i, piece in enumerate(pieces):
            if len(calls) == stop_after + 1 and i == 7:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(hub, "write_tokens", write)
    status, _, err = prepare(small, again, "--num_docs=300")
    assert status == 130 and f"stopped; {stop_after} of 3 files are done; run the same" in err
    assert not (again / "meta.json").exists()
    assert len(list(again.glob("parts-*/*.bin"))) == stop_after
    calls[:] = ["earlier"] * 10
    assert prepare(small, again, "--num_docs=300")[0] == 0
    assert len(calls) - 10 == 3 - stop_after  # complete parts were kept
    assert written(again) == written(whole)

def test_other_keys_after_an_interruption_start_anew(small, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    whole, again = tmp_path / "whole", tmp_path / "again"
    assert prepare(small, whole, "--num_docs=250")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(hub, "divide", interrupt)
        assert prepare(small, again, "--num_docs=300")[0] == 130
    assert prepare(small, again, "--num_docs=250")[0] == 0
    assert written(again) == written(whole) and not list(again.glob("parts-*"))

def test_a_second_call_does_nothing_and_another_dataset_is_not_overwritten(small, tmp_path):
    assert prepare(small, tmp_path, "--num_docs=150")[0] == 0
    before = (tmp_path / "train.bin").stat().st_mtime_ns
    status, out, _ = prepare(small, tmp_path, "--num_docs=150")
    assert status == 0 and "already prepared" in out
    status, _, err = prepare("/elsewhere", tmp_path, "--num_docs=150")
    assert status == 1 and "source='/" in err and "--force" in err
    assert (tmp_path / "train.bin").stat().st_mtime_ns == before
    status, _, err = prepare(small, tmp_path, "--num_docs=160")
    assert status == 1 and "num_docs=150" in err and "--force" in err
    assert len(err.strip().splitlines()) == 1
    assert prepare(small, tmp_path, "--num_docs=160", "--force")[0] == 0
    assert load_meta(tmp_path)["documents"] == 160

@pytest.mark.parametrize("damage, message", [
    ("no files", "no train-*.parquet under"),
    ("cut short", "can't be read"),
    ("no text", "text"),
    ("none", "has 300 documents in 3 files instead of 8,013,769"),
])
def test_wrong_files_end_in_one_line(small, tmp_path, damage, message):
    shutil.copytree(small, tmp_path / "hub")
    path = tmp_path / "hub/data/train-00001-of-00003-0123abcd.parquet"
    if damage == "no files":
        shutil.rmtree(path.parent)
    elif damage == "cut short":
        path.write_bytes(b"PAR1")
    elif damage == "no text":
        datasets.Dataset.from_dict(dict(words=["a"])).to_parquet(path)
    status, _, err = prepare(tmp_path / "hub", tmp_path / "out")
    assert status == 1 and message in last_line(err) and not list((tmp_path / "out").iterdir())

def test_a_file_that_breaks_off_keeps_finished_files(small, tmp_path, monkeypatch):
    import fsspec
    fsspec_open = fsspec.open

    def opened(url):
        if "00001" in url:
            raise ConnectionError("reset by peer")
        return fsspec_open(url)

    monkeypatch.setattr(fsspec, "open", opened)
    status, _, err = prepare(small, tmp_path, "--num_docs=300")
    line = last_line(err)
    assert status == 1 and "train-00001" in line and "reset by peer" in line and "resume" in line
    assert len(list(tmp_path.glob("parts-*/*.bin"))) == 1

@pytest.mark.parametrize("texts, row, shown", [
    (["a"] * 117 + [None] * 3, 117, "None"), ([b"x"] * 120, 0, "b'x'"), ([7] * 120, 0, "7")])
def test_a_row_without_text_is_named_and_the_old_dataset_is_kept(
        small, tmp_path, texts, row, shown):
    assert prepare(small, tmp_path / "out", "--num_docs=300")[0] == 0
    before = written(tmp_path / "out")
    parquet(tmp_path / "hub", texts, files=1)
    status, _, err = prepare(tmp_path / "hub", tmp_path / "out", "--num_docs=120", "--force")
    assert status == 1 and "--num_docs" in last_line(err)
    assert f"0123abcd.parquet, row {row} (the first is 0): {shown} is not text" in last_line(err)
    assert written(tmp_path / "out") == before

@pytest.mark.parametrize("folder", ["pq[1]", "a*b?", "100%", "[!x] {y}", "größer #1"])
def test_folders_may_have_any_name(small, tmp_path, folder):
    shutil.copytree(small, tmp_path / folder)
    status, _, err = prepare(tmp_path / folder, tmp_path / f"out {folder}", "--num_docs=150")
    assert status == 0, err
    assert prepare(small, tmp_path / "plain", "--num_docs=150")[0] == 0
    for name in ("train.bin", "val.bin"):
        assert written(tmp_path / f"out {folder}")[name] == written(tmp_path / "plain")[name]

def test_another_column_and_folders_of_the_user_are_kept(small, tmp_path):
    shutil.copytree(small, tmp_path / "hub")
    import pyarrow.parquet
    for path in (tmp_path / "hub/data").iterdir():
        table = pyarrow.parquet.read_table(path).rename_columns(["text", "content"])
        pyarrow.parquet.write_table(table, path)
    (tmp_path / "other/parts-2026").mkdir(parents=True)
    command = [tmp_path / "hub", tmp_path / "other", "--num_docs=150"]
    status, _, err = prepare(*command, "--field=body")
    assert status == 1 and "has no column 'body', only text, content" in last_line(err)
    assert "--field" in last_line(err)
    assert prepare(*command, "--field=content")[0] == 0
    assert prepare(small, tmp_path / "plain", "--num_docs=150")[0] == 0
    for name in ("train.bin", "val.bin"):
        assert written(tmp_path / "other")[name] == written(tmp_path / "plain")[name]
    assert (tmp_path / "other/parts-2026").is_dir()
    assert "already prepared" in prepare(*command, "--field=content")[1]
    status, _, err = prepare(*command)
    assert status == 1 and "field='content'" in last_line(err) and "--force" in last_line(err)

def test_two_at_the_same_time_do_not_mix(small, tmp_path):
    with locked(tmp_path):
        status, _, err = prepare(small, tmp_path, "--num_docs=150", "--force")
    assert status == 1 and f"another process is preparing data in {tmp_path}" in last_line(err)
    assert not list(tmp_path.iterdir())
    assert prepare(small, tmp_path, "--num_docs=150")[0] == 0

def test_disk_space_is_checked_first(small, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    status, _, err = prepare(small, tmp_path, "--num_docs=300")
    assert status == 1 and "0.0 GB free" in last_line(err) and "--out" in last_line(err)
    assert not list(tmp_path.glob("parts-*/*.bin"))

@pytest.mark.parametrize("name", ["openwebtext", "openwebmath"])
def test_without_a_network_one_line_says_how_to_copy_files(tmp_path, monkeypatch, name):
    def refused(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    status, _, err = run(script(name).main, f"--out={tmp_path}", "--tokenizer=stdlib")
    assert status == 1 and len(err.strip().splitlines()) == 1
    assert "--source=FOLDER" in err and "hf://datasets/" in err and not list(tmp_path.iterdir())

@pytest.mark.slow
def test_killed_again_and_again_it_gives_the_same_files(tmp_path):
    source = parquet(tmp_path / "hub", DOCUMENTS * 40, files=12)
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert prepare(source, whole, "--num_docs=12_000")[0] == 0
    command = [sys.executable, ROOT / "openwebtext/prepare.py", f"--source={source}",
               f"--out={again}", "--tokenizer=stdlib", "--num_docs=12_000"]
    for wanted in (1, 4, 8):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(again.glob("parts-*/*.bin"))) < wanted:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)
    assert written(again) == written(whole)

def test_a_column_within_a_column_is_no_column(tmp_path):
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.table(dict(meta=[dict(a="x", b="y")] * 40, tags=[["t"]] * 40, text=["z"] * 40))
    pyarrow.parquet.write_table(table, tmp_path / "train-0.parquet")
    status, _, err = prepare(tmp_path, tmp_path / "out", "--num_docs=40", "--field=a")
    assert status == 1 and "no column 'a', only meta, tags, text; name one" in err
    assert prepare(tmp_path, tmp_path / "out", "--num_docs=40")[0] == 0

def test_more_documents_than_there_are(small, tmp_path):
    status, _, err = prepare(small, tmp_path / "out", "--num_docs=301")
    assert status == 1 and "has only 300 documents; use them with --num_docs=300" in err
