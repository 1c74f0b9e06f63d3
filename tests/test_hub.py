"""data/openwebtext and data/openwebmath: the hub's parquet files → token files, on small files of the same form made here."""
import errno
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data
from data import hub
from conftest import run
from test_data import script

datasets = pytest.importorskip("datasets", reason="needs datasets (requirements.txt)")
ROOT = Path(data.__file__).resolve().parent.parent
DOCUMENTS = [f"document {i}, " + "word " * (i % 7) + "größer." for i in range(300)]
TOKENIZER = data.load_tokenizer("stdlib")


def parquet(folder, documents, files=3):
    """The documents in parquet files named as on the hub, with a column that is not wanted."""
    import pyarrow
    import pyarrow.parquet
    (folder / "data").mkdir(parents=True)
    for i in range(files):
        texts = documents[len(documents) * i // files:len(documents) * (i + 1) // files]
        pyarrow.parquet.write_table(pyarrow.table(dict(url=["http://"] * len(texts), text=texts)), folder / "data" / f"train-{i:05}-of-{files:05}-0123abcd.parquet", row_group_size=40)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return parquet(tmp_path_factory.mktemp("hub") / "small", DOCUMENTS)


def prepare(source, out, *more, name="openwebtext"):
    return run(script(name).main, f"--source={source}", f"--out={out}", "--tokenizer=stdlib", *more)


def encoded(documents):
    return b"".join(np.array(ids + [TOKENIZER.eot_token], dtype="<u2").tobytes() for ids in TOKENIZER.encode_ordinary_batch(documents))


def written(out):
    return {split: (out / f"{split}.bin").read_bytes() for split in ("train", "val")} | {"meta": (out / "meta.json").read_text()}


def test_what_is_held_out_is_what_nanogpt_holds_out():
    for n in (40_001, 123_457):
        split = datasets.Dataset.from_dict(dict(number=np.arange(n))).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        assert hub.held_out_of(n).tolist() == split["test"]["number"][:]


@pytest.mark.parametrize("name", ["openwebtext", "openwebmath"])
def test_a_small_try_takes_the_first_documents_and_holds_twenty_out(small, tmp_path, name):
    status, out, err = prepare(small, tmp_path, "--num_docs=150", name=name)
    assert status == 0, err
    files = written(tmp_path)
    held_out = [DOCUMENTS[i] for i in np.random.default_rng(2357).permutation(150)[:20]]
    meta = data.load_meta(tmp_path)
    assert files["val"] == encoded(held_out) and files["train"] == encoded([text for text in DOCUMENTS[:150] if text not in held_out])
    assert meta["train_tokens"] == len(files["train"]) // 2 and meta["val_tokens"] == len(files["val"]) // 2 and meta["documents"] == 150
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert f"{meta['train_tokens']:,} train tokens" in out


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_what_was_stopped_goes_on_and_gives_the_same_files(small, tmp_path, monkeypatch, stop_after):
    assert prepare(small, tmp_path / "whole", "--num_docs=300")[0] == 0
    keep, parts = data.write_tokens, []

    def stopped(path, pieces, tokenizer, bar=None):
        def some():
            for i, piece in enumerate(pieces):
                if len(parts) == 2 * stop_after + 1 and i == 7:
                    raise KeyboardInterrupt
                yield piece
        parts.append(path)
        return keep(path, some(), tokenizer, bar)
    monkeypatch.setattr(data, "write_tokens", stopped)
    status, _, err = prepare(small, tmp_path / "again", "--num_docs=300")
    assert status == 130 and f"stopped; {stop_after} of 3 files are done, the same command goes on" in err
    assert not (tmp_path / "again/meta.json").exists() and len(list((tmp_path / "again").glob("parts-*/val-*.bin"))) == stop_after
    monkeypatch.setattr(data, "write_tokens", lambda path, *more: (parts.append(path), keep(path, *more))[1])
    parts.clear()
    assert prepare(small, tmp_path / "again", "--num_docs=300")[0] == 0
    assert len(parts) == 2 * (3 - stop_after)  # what was whole was kept
    assert written(tmp_path / "again") == written(tmp_path / "whole")


def test_other_keys_after_a_stop_begin_anew(small, tmp_path, monkeypatch):
    assert prepare(small, tmp_path / "whole", "--num_docs=250")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_meta", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert prepare(small, tmp_path / "again", "--num_docs=300")[0] == 130
    assert prepare(small, tmp_path / "again", "--num_docs=250")[0] == 0
    assert written(tmp_path / "again") == written(tmp_path / "whole") and not list((tmp_path / "again").glob("parts-*"))


def test_a_second_call_does_nothing_and_another_dataset_is_not_written_over(small, tmp_path):
    assert prepare(small, tmp_path, "--num_docs=150")[0] == 0
    before = (tmp_path / "train.bin").stat().st_mtime_ns
    status, out, _ = prepare("/nowhere", tmp_path, "--num_docs=150")
    assert status == 0 and "already prepared" in out and (tmp_path / "train.bin").stat().st_mtime_ns == before
    status, _, err = prepare(small, tmp_path, "--num_docs=160")
    assert status == 1 and "num_docs=150" in err and "--force" in err and len(err.strip().splitlines()) == 1
    assert prepare(small, tmp_path, "--num_docs=160", "--force")[0] == 0 and data.load_meta(tmp_path)["documents"] == 160


def lines(err):
    return [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line and "file/s" not in line and "doc/s" not in line]


@pytest.mark.parametrize("damage, message", [
    (lambda f: shutil.rmtree(f / "data"), "no train-*.parquet under"),
    (lambda f: (f / "data/train-00001-of-00003-0123abcd.parquet").write_bytes(b"PAR1"), "can't be read"),
    (lambda f: datasets.Dataset.from_dict(dict(words=["a"])).to_parquet(f / "data/train-00001-of-00003-0123abcd.parquet"), "text"),
    (lambda f: None, "has 300 documents in 3 files instead of 8,013,769"),
])
def test_wrong_files_end_in_one_line(small, tmp_path, damage, message):
    shutil.copytree(small, tmp_path / "hub")
    damage(tmp_path / "hub")
    status, _, err = prepare(tmp_path / "hub", tmp_path / "out")
    assert status == 1 and message in lines(err)[-1] and lines(err)[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_file_that_breaks_off_keeps_what_is_done(small, tmp_path, monkeypatch):
    keep = datasets.load_dataset

    def load(*args, data_files, **more):
        if "00001" in data_files:
            raise ConnectionError("reset by peer")
        return keep(*args, data_files=data_files, **more)
    monkeypatch.setattr(datasets, "load_dataset", load)
    status, _, err = prepare(small, tmp_path, "--num_docs=300")
    assert status == 1 and "train-00001" in lines(err)[-1] and "reset by peer" in lines(err)[-1] and "goes on" in lines(err)[-1]
    assert len(list(tmp_path.glob("parts-*/val-*.bin"))) == 1


def test_disk_space_is_checked_first(small, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    status, _, err = prepare(small, tmp_path, "--num_docs=300")
    assert status == 1 and "0.0 GB free" in lines(err)[-1] and "--out" in lines(err)[-1] and not list(tmp_path.glob("parts-*/*.bin"))


@pytest.mark.parametrize("name", ["openwebtext", "openwebmath"])
def test_offline_ends_in_one_line_that_names_the_way_by_hand(tmp_path, monkeypatch, name):
    def refused(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    status, _, err = run(script(name).main, f"--out={tmp_path}", "--tokenizer=stdlib")
    assert status == 1 and len(lines(err)) == 1 and "--source=FOLDER" in err and "hf://datasets/" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_again_and_again_it_gives_the_same_files(tmp_path):
    source = parquet(tmp_path / "hub", DOCUMENTS * 40, files=12)
    assert prepare(source, tmp_path / "whole", "--num_docs=12_000")[0] == 0
    command = [sys.executable, ROOT / "data/openwebtext/prepare.py", f"--source={source}", f"--out={tmp_path / 'again'}", "--tokenizer=stdlib", "--num_docs=12_000"]
    kills = 0
    for wanted in (1, 4, 8):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list((tmp_path / "again").glob("parts-*/val-*.bin"))) < wanted:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    subprocess.run(command, check=True, capture_output=True)
    assert written(tmp_path / "again") == written(tmp_path / "whole")
