"""Writing datasets: BPE training, data/stdlib and data/text."""
import argparse
import ast
import gzip
import importlib.util
import json
import lzma
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import regex
from conftest import run

from support.bpe import train_bpe
from support.tokens import ROOT, SPLIT_PATTERN, load_meta, load_tokenizer, load_tokens

def script(name):
    """The module data/NAME/prepare.py."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def decoded(folder, split):
    tokenizer = load_tokenizer(load_meta(folder)["tokenizer"])
    return tokenizer.decode(load_tokens(folder, split)[:].tolist())

# -- BPE -------------------------------------------------------------------------------------------

def test_bpe_merges_the_most_frequent_pair_first():
    ranks = train_bpe(["ab ab ab ab abc abc bc"], 300)
    merges = [token for token, rank in sorted(ranks.items(), key=lambda i: i[1]) if rank >= 256]
    assert merges[:2] == [b"ab", b" ab"]  # 6 times (" a" 5 times), then 5 times
    assert merges[2:] == [b" abc", b" b", b" bc"]  # once each: byte order, until no pair is left

def test_bpe_equals_the_plain_algorithm():
    """Recounting all pairs after each merge."""
    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abcd", k=rng.randint(1, 7))) for _ in range(400))
    words = [[bytes([b]) for b in w.encode()] for w in regex.findall(SPLIT_PATTERN, text)]
    plain = []
    while len(plain) < 60:
        count = {}
        for w in words:
            for pair in zip(w, w[1:], strict=False):
                count[pair] = count.get(pair, 0) + 1
        pair = min(count, key=lambda p: (-count[p], p))
        plain.append(pair[0] + pair[1])
        for w in words:
            j = 0
            while j + 1 < len(w):
                if (w[j], w[j + 1]) == pair:
                    w[j:j + 2] = [plain[-1]]
                j += 1
    ranks = train_bpe([text], 256 + 60 + 1)
    ours = [token for token, rank in sorted(ranks.items(), key=lambda i: i[1]) if rank >= 256]
    assert ours == list(dict.fromkeys(plain))[:len(ours)] and len(ours) >= 55

# -- data/stdlib -----------------------------------------------------------------------------------

def test_stdlib_holds_out_whole_modules_and_a_second_call_does_nothing(tmp_path):
    prepare = script("stdlib")
    status, out, err = run(prepare.main, f"--out={tmp_path}")
    assert status == 0, err
    meta = load_meta(tmp_path)
    assert meta["vocab_size"] <= 4096 and meta["train_tokens"] > 1_500_000
    assert 50_000 < meta["val_tokens"] < meta["train_tokens"] / 8
    train, val = decoded(tmp_path, "train"), decoded(tmp_path, "val")
    held_out = Path(textwrap.__file__).read_text()
    assert held_out in val and held_out not in train and Path(ast.__file__).read_text() in train
    before = (tmp_path / "train.bin").stat().st_mtime_ns
    status, out, _ = run(prepare.main, f"--out={tmp_path}")
    assert status == 0 and "already prepared" in out
    assert (tmp_path / "train.bin").stat().st_mtime_ns == before

@pytest.mark.parametrize("name, content", [
    ("train.bin", b"12"), pytest.param("meta.json", b"{", marks=pytest.mark.slow)])
def test_a_damaged_stdlib_dataset_is_prepared_again(tmp_path, name, content):
    prepare = script("stdlib")
    assert run(prepare.main, f"--out={tmp_path}")[0] == 0
    (tmp_path / name).write_bytes(content)
    status, out, err = run(prepare.main, f"--out={tmp_path}")
    assert status == 0 and "already prepared" not in out, err
    assert len(load_tokens(tmp_path, "train")) > 1_500_000

# -- data/text -------------------------------------------------------------------------------------

TEXTS = ["The first document.\nIt has two lines. ", "Ein zweites, größeres – mit Umlauten.",
         "A third   one\n\n\n with white space."] * 40

def prepare_text(folder, *argv):
    """The command with files in `folder` and its output in `folder`/d."""
    argv = [arg.format(folder) for arg in argv]
    return run(script("text").main, *argv, f"--out={folder / 'd'}")

def hundred_documents(path):
    lines = [json.dumps(dict(text=f"document {i}.")) + "\n" for i in range(100)]
    path.write_text("".join(lines))

@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_text_files_of_every_kind(tmp_path, suffix, opener):
    with opener(tmp_path / f"a.jsonl{suffix}", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(text=t)) + "\n\n" for t in TEXTS)
    for name in "bc":
        with opener(tmp_path / f"{name}.txt{suffix}", "wt", encoding="utf-8") as file:
            file.write("".join(TEXTS))
    status, _, err = prepare_text(tmp_path, "--input", "{}/a.jsonl" + suffix, "{}/b.txt" + suffix,
                                  "--val", "{}/c.txt" + suffix, "--tokenizer=bpe:400")
    assert status == 0, err
    one, whole = "".join(t + "<|endoftext|>" for t in TEXTS), "".join(TEXTS) + "<|endoftext|>"
    assert decoded(tmp_path / "d", "train") == one + whole
    assert decoded(tmp_path / "d", "val") == whole
    assert load_meta(tmp_path / "d")["vocab_size"] <= 400

def test_a_long_text_is_cut_only_between_tokens(tmp_path):
    text = Path(argparse.__file__).read_text()
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "val.txt").write_text(text)
    status, _, err = prepare_text(tmp_path, "--input={}/long.txt", "--val={}/val.txt",
                                  "--tokenizer=stdlib")
    assert status == 0, err
    tokenizer = load_tokenizer("stdlib")
    expected = tokenizer.encode_ordinary(text) + [tokenizer.eot_token]
    assert load_tokens(tmp_path / "d", "train").tolist() == expected

def test_without_val_every_20th_piece_is_held_out(tmp_path):
    hundred_documents(tmp_path / "a.jsonl")
    assert prepare_text(tmp_path, "--input={}/a.jsonl", "--tokenizer=stdlib")[0] == 0
    held_out = "".join(f"document {i}.<|endoftext|>" for i in range(19, 100, 20))
    assert decoded(tmp_path / "d", "val") == held_out
    assert decoded(tmp_path / "d", "train").count("<|endoftext|>") == 95

def test_a_second_call_on_the_same_text_does_nothing_and_on_other_text_refuses(tmp_path):
    hundred_documents(tmp_path / "a.jsonl")
    command = ["--input={}/a.jsonl", "--tokenizer=stdlib"]
    assert prepare_text(tmp_path, *command)[0] == 0
    before = (tmp_path / "d" / "train.bin").stat().st_mtime_ns
    status, out, _ = prepare_text(tmp_path, *command)
    assert status == 0 and "already prepared" in out
    assert (tmp_path / "d" / "train.bin").stat().st_mtime_ns == before
    status, _, err = prepare_text(tmp_path, *command, "--bpe_chars=2000")
    assert status == 1 and "holds a dataset of other files or keys" in err
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(text="other " * 99)) + "\n")
    status, _, err = prepare_text(tmp_path, *command)
    assert status == 1 and "holds a dataset of other files or keys" in err

def test_files_given_twice_add_up_and_odd_text_passes(tmp_path):
    """A byte-order mark, half a surrogate pair, a very long word and a very long run of spaces."""
    half = json.dumps(dict(text="half \ud83d a pair")).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + half + b"\n")
    long = "ACGT" * 20_000 + " " * 100_000 + "end"
    (tmp_path / "b.txt").write_text(long)
    (tmp_path / "v.txt").write_text("held out")
    command = ["--input={}/a.jsonl", "--input={}/b.txt", "--tokenizer=bpe:400"]
    status, _, err = prepare_text(tmp_path, *command, "--val={}/none")
    assert status == 1 and "No such file" in err
    status, _, err = prepare_text(tmp_path, *command, "--val={}/v.txt")
    assert status == 0, err
    expected = f"half \ufffd a pair<|endoftext|>{long}<|endoftext|>"
    assert decoded(tmp_path / "d", "train") == expected

@pytest.mark.slow
def test_memory_use_does_not_grow_with_the_input(tmp_path):
    code = ("import sys, resource, runpy; sys.argv = ['prepare.py'] + sys.argv[1:]\n"
            f"try: runpy.run_path({str(ROOT / 'text/prepare.py')!r}, run_name='__main__')\n"
            "finally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for megabytes in (8, 64):
        with open(tmp_path / "big.txt", "w") as file:
            for i in range(megabytes * 20_000):
                file.write(f"line {i % 977} of a file of some size that goes on\n")
        argv = [f"--input={tmp_path / 'big.txt'}", "--tokenizer=stdlib", f"--out={tmp_path / 'd'}"]
        out = subprocess.run([sys.executable, "-c", code, *argv, "--force"], capture_output=True,
                             text=True, check=True).stdout
        peaks.append(int(out.rsplit("peak", 1)[1]))
    assert peaks[1] < 1.15 * peaks[0]
