"""Batches, token files, tokenizers and the two prepare scripts."""
import gzip
import importlib.util
import json
import lzma
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from config import UserError
from conftest import run

ROOT = Path(data.__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batches(tokens, **more):
    return data.Batches(tokens, **{**dict(block_size=8, batch_size=12, vocab_size=1 << 16, seed=3), **more})


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("shift", [True, False])
def test_an_epoch_holds_every_block_exactly_once(ranks, shift):
    tokens = np.arange(8 * 60 + (8 if shift else 1), dtype="<u2")  # 60 blocks: five steps of 12
    parts = [batches(tokens, shift=shift, rank=r, world_size=ranks) for r in range(ranks)]
    assert parts[0].blocks == 60
    for epoch in range(3):
        rows = torch.cat([part[step][0] for step in range(5 * epoch, 5 * epoch + 5) for part in parts])
        starts = rows[:, 0].sort().values
        offset = starts[0].item()
        assert torch.equal(starts, offset + 8 * torch.arange(60))
        assert torch.equal(rows, rows[:, :1] + torch.arange(8))
        assert 0 <= offset < 8 if shift else offset == 0


def test_epochs_differ_in_order_and_offset_and_seeds_differ():
    tokens = np.arange(8 * 60 + 8, dtype="<u2")
    b = batches(tokens)
    offsets = {min(b.starts(5 * e + i).min() for i in range(5)) for e in range(12)}
    assert len(offsets) > 3
    assert not np.array_equal(b.starts(0) - b.starts(0).min(), b.starts(5) - b.starts(5).min())
    assert not np.array_equal(b.starts(0), batches(tokens, seed=4).starts(0))


def test_every_position_has_the_next_token_as_target():
    x, y = batches(np.arange(500, dtype="<u2"))[7]
    assert x.shape == y.shape == (12, 8) and x.dtype == torch.int64 and torch.equal(y, x + 1)


def test_ranks_take_slices_of_one_global_batch_and_steps_need_no_history():
    tokens = np.arange(1000, dtype="<u2")
    whole = batches(tokens)
    for step in (0, 3, 40, 7):
        parts = torch.cat([batches(tokens, rank=r, world_size=3)[step][0] for r in range(3)])
        assert torch.equal(whole[step][0], parts)


def test_prefetched_batches_are_the_same():
    b = batches(np.arange(1000, dtype="<u2"))
    got = list(b.prefetch(4, 9, torch.device("cpu")))
    assert len(got) == 5 and all(torch.equal(x, b[4 + i][0]) and torch.equal(y, b[4 + i][1]) and labels is None for i, (x, y, labels) in enumerate(got))
    assert list(b.prefetch(4, 4, torch.device("cpu"))) == []


def test_sequential_gives_every_token_but_the_first_as_a_target_once():
    for n in (81, 85, 9, 5):
        tokens = np.arange(n, dtype="<u2")
        rows = list(data.sequential(tokens, 8, 3, 100))
        assert torch.equal(torch.cat([y.flatten() for _, y in rows]), torch.arange(1, n))
        assert all(torch.equal(y, x + 1) and x.shape[0] <= 3 for x, y in rows)


def test_a_file_of_openwebtexts_size_opens_and_gives_a_batch_at_once_and_in_little_memory(tmp_path):
    n = 9_035_582_198
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(1 << 24)
        if not 0 <= os.fstat(file.fileno()).st_blocks * 512 < 1 << 20:
            pytest.skip("this filesystem has no sparse files")
        file.truncate(2 * n)
    (tmp_path / "meta.json").write_text(json.dumps(dict(tokenizer="gpt2", tokenizer_hash="gpt2", vocab_size=50257, train_tokens=n, val_tokens=0)))
    tracemalloc.start()
    start = time.process_time()  # whatever else the machine does
    x, _ = data.Batches(data.load_tokens(tmp_path, "train"), 1024, 512, 50257)[12345]
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert x.shape == (512, 1024) and seconds < 2 and peak < 64 << 20


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "train.bin").write_bytes(b""), "train.bin has 0 bytes"),
    (lambda f: (f / "train.bin").write_bytes(b"1" * 39), "train.bin has 39 bytes but meta.json says 40: cut short"),
    (lambda f: (f / "train.bin").unlink(), "train.bin is missing"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json is damaged"),
    (lambda f: (f / "meta.json").unlink(), "no dataset"),
])
def test_damaged_datasets_are_named(tmp_path, damage, message):
    np.arange(20, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text(json.dumps(dict(tokenizer="gpt2", tokenizer_hash="gpt2", vocab_size=50257, train_tokens=20, val_tokens=0)))
    assert len(data.load_tokens(tmp_path, "train")) == 20
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        data.load_tokens(tmp_path, "train")


def test_tokens_beyond_the_vocabulary_and_short_files_are_named():
    with pytest.raises(UserError, match="beyond the vocabulary of 50"):
        batches(np.full(500, 50, dtype="<u2"), vocab_size=50)[0]
    with pytest.raises(UserError, match="beyond the vocabulary of 50"):
        list(data.sequential(np.full(20, 50, dtype="<u2"), 8, 3, 50))
    with pytest.raises(UserError, match="only 9 tokens, too few for block_size=8"):
        batches(np.arange(9, dtype="<u2"))


# -- tokenizers -------------------------------------------------------------------------------------

def test_bpe_merges_the_commonest_pair_first():
    ranks = data.train_bpe(["ab ab ab ab abc abc bc"], 300)
    merges = sorted((r, t) for t, r in ranks.items() if r >= 256)
    assert merges[0][1] == b"ab"     # 6 times; " a" stands 5 times
    assert merges[1][1] == b" ab"    # 5 times
    assert [t for _, t in merges[2:]] == [b" abc", b" b", b" bc"]  # once each: ties in byte order, until no pair is left


def test_bpe_equals_the_plain_algorithm():
    """Recounting all pairs after each merge, as the algorithm is usually stated."""
    import random
    import regex
    rng = random.Random(0)
    text = " ".join("".join(rng.choice("abcd") for _ in range(rng.randint(1, 7))) for _ in range(400))
    words = [[bytes([b]) for b in w.encode()] for w in regex.findall(data.SPLIT_PATTERN, text)]
    plain = []
    while len(plain) < 60:
        count = {}
        for w in words:
            for pair in zip(w, w[1:]):
                count[pair] = count.get(pair, 0) + 1
        pair = min(count, key=lambda p: (-count[p], p))
        plain.append(pair[0] + pair[1])
        for w in words:
            j = 0
            while j + 1 < len(w):
                if (w[j], w[j + 1]) == pair:
                    w[j:j + 2] = [plain[-1]]
                j += 1
    ranks = data.train_bpe([text], 256 + 60 + 1)
    ours = [t for t, r in sorted(ranks.items(), key=lambda i: i[1]) if r >= 256]
    assert ours == list(dict.fromkeys(plain))[:len(ours)] and len(ours) >= 55


def test_stdlib_tokenizer_round_trips_and_has_at_most_4096_tokens():
    tokenizer = data.load_tokenizer("stdlib")
    assert tokenizer.n_vocab <= 4096 and tokenizer.eot_token == tokenizer.n_vocab - 1
    text = Path(json.__file__).read_text() + "\n\t größer ✓ <|endoftext|>"
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2.5 and tokenizer.eot_token not in ids


@pytest.mark.parametrize("content", [b"", b"not base64\n", b"QQ== 0\n", b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match="is not a tokenizer"):
        data.load_tokenizer(str(tmp_path / "x.tiktoken"))
    with pytest.raises(UserError, match="no tokenizer"):
        data.load_tokenizer("nowhere")


# -- data/stdlib ------------------------------------------------------------------------------------

def test_stdlib_prepares_whole_modules_apart_and_a_second_call_does_nothing(tmp_path):
    prepare = script("stdlib")
    status, out, err = run(prepare.main, f"--out={tmp_path}")
    assert status == 0, err
    meta = data.load_meta(tmp_path)
    assert meta["vocab_size"] <= 4096 and meta["train_tokens"] > 1_500_000 and 50_000 < meta["val_tokens"] < meta["train_tokens"] / 8
    tokenizer = data.load_tokenizer("stdlib")
    val = tokenizer.decode(data.load_tokens(tmp_path, "val")[:].tolist())
    train = tokenizer.decode(data.load_tokens(tmp_path, "train")[:].tolist())
    source = Path(__import__("textwrap").__file__).read_text()
    assert source in val and source not in train
    assert Path(__import__("ast").__file__).read_text() in train
    before = (tmp_path / "train.bin").stat().st_mtime_ns
    status, out, _ = run(prepare.main, f"--out={tmp_path}")
    assert status == 0 and "already prepared" in out and (tmp_path / "train.bin").stat().st_mtime_ns == before


# -- data/text --------------------------------------------------------------------------------------

TEXTS = ["The first document.\nIt has two lines. ", "Ein zweites, größeres – mit Umlauten.", "A third   one\n\n\n with white space."] * 40


def decoded(folder, split):
    meta = data.load_meta(folder)
    tokenizer = data.load_tokenizer(meta["tokenizer"])
    return tokenizer.decode(data.load_tokens(folder, split)[:].tolist())


@pytest.mark.parametrize("pack", [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_text_files_of_every_kind(tmp_path, pack):
    suffix, opener = pack
    with opener(tmp_path / f"a.jsonl{suffix}", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(text=t)) + "\n\n" for t in TEXTS)
    with opener(tmp_path / f"b.txt{suffix}", "wt", encoding="utf-8") as file:
        file.write("".join(TEXTS))
    (tmp_path / f"c.txt{suffix}").write_bytes((tmp_path / f"b.txt{suffix}").read_bytes())
    status, _, err = run(script("text").main, "--input", tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.txt{suffix}", "--val", tmp_path / f"c.txt{suffix}",
                         "--tokenizer=bpe:400", f"--out={tmp_path / 'd'}")
    assert status == 0, err
    assert decoded(tmp_path / "d", "train") == "".join(t + "<|endoftext|>" for t in TEXTS) + "".join(TEXTS) + "<|endoftext|>"
    assert decoded(tmp_path / "d", "val") == "".join(TEXTS) + "<|endoftext|>"
    assert data.load_meta(tmp_path / "d")["vocab_size"] <= 400


def test_a_long_text_is_cut_where_no_token_reaches_across(tmp_path):
    text = Path(__import__("argparse").__file__).read_text()
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "val.txt").write_text(text)
    status, _, err = run(script("text").main, f"--input={tmp_path / 'long.txt'}", f"--val={tmp_path / 'val.txt'}", "--tokenizer=stdlib", f"--out={tmp_path / 'd'}")
    assert status == 0, err
    tokenizer = data.load_tokenizer("stdlib")
    assert data.load_tokens(tmp_path / "d", "train").tolist() == tokenizer.encode_ordinary(text) + [tokenizer.eot_token]


def test_without_val_every_20th_piece_is_held_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=f"document {i}.")) + "\n" for i in range(100)))
    assert run(script("text").main, f"--input={tmp_path / 'a.jsonl'}", "--tokenizer=stdlib", f"--out={tmp_path / 'd'}")[0] == 0
    assert decoded(tmp_path / "d", "val") == "".join(f"document {i}.<|endoftext|>" for i in range(19, 100, 20))
    assert decoded(tmp_path / "d", "train").count("<|endoftext|>") == 95


def test_a_second_call_on_the_same_text_does_nothing_and_on_other_text_refuses(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=f"document {i}.")) + "\n" for i in range(100)))
    command = [f"--input={tmp_path / 'a.jsonl'}", "--tokenizer=stdlib", f"--out={tmp_path / 'd'}"]
    assert run(script("text").main, *command)[0] == 0
    before = (tmp_path / "d" / "train.bin").stat().st_mtime_ns
    status, out, _ = run(script("text").main, *command)
    assert status == 0 and "already prepared" in out and (tmp_path / "d" / "train.bin").stat().st_mtime_ns == before
    for change in (lambda: command.append("--bpe_chars=2000"), lambda: (tmp_path / "a.jsonl").write_text(json.dumps(dict(text="other " * 99)) + "\n")):
        change()
        status, _, err = run(script("text").main, *command)
        assert status == 1 and "holds a dataset of other files or keys" in err
        command[3:] = []


@pytest.mark.slow
def test_memory_stays_flat_however_large_the_input(tmp_path):
    import subprocess
    import sys
    peaks = []
    for megabytes in (8, 64):
        with open(tmp_path / "big.txt", "w") as file:
            for i in range(megabytes * 20_000):
                file.write(f"line {i % 977} of a file of some size that goes on\n")
        code = ("import sys, resource, runpy; sys.argv = ['prepare.py'] + sys.argv[1:]\n"
                f"try: runpy.run_path({str(ROOT / 'data/text/prepare.py')!r}, run_name='__main__')\n"
                "finally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        out = subprocess.run([sys.executable, "-c", code, f"--input={tmp_path / 'big.txt'}", "--tokenizer=stdlib", f"--out={tmp_path / 'd'}", "--force"],
                             capture_output=True, text=True, check=True)
        peaks.append(int(out.stdout.rsplit("peak", 1)[1]))
    assert peaks[1] < 1.15 * peaks[0]


def test_files_named_twice_add_up_and_odd_text_passes(tmp_path):
    """A byte-order mark, half a surrogate pair, a very long word and a very long run of spaces."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(dict(text="half \ud83d a pair")).encode() + b"\n")
    (tmp_path / "b.txt").write_text("ACGT" * 20_000 + " " * 100_000 + "end")
    status, _, err = run(script("text").main, f"--input={tmp_path / 'a.jsonl'}", f"--input={tmp_path / 'b.txt'}", f"--val={tmp_path / 'none'}", "--tokenizer=bpe:400", f"--out={tmp_path / 'd'}")
    assert status == 1 and "no input file" in err
    (tmp_path / "v.txt").write_text("held out")
    status, _, err = run(script("text").main, f"--input={tmp_path / 'a.jsonl'}", f"--input={tmp_path / 'b.txt'}", f"--val={tmp_path / 'v.txt'}", "--tokenizer=bpe:400", f"--out={tmp_path / 'd'}")
    assert status == 0, err
    assert decoded(tmp_path / "d", "train") == "half \ufffd a pair<|endoftext|>" + "ACGT" * 20_000 + " " * 100_000 + "end<|endoftext|>"


@pytest.mark.parametrize("damage", [lambda f: (f / "train.bin").write_bytes(b"12"), pytest.param(lambda f: (f / "meta.json").write_text("{"), marks=pytest.mark.slow)])
def test_a_damaged_stdlib_dataset_is_prepared_again(tmp_path, damage):
    prepare = script("stdlib")
    assert run(prepare.main, f"--out={tmp_path}")[0] == 0
    damage(tmp_path)
    status, out, err = run(prepare.main, f"--out={tmp_path}")
    assert status == 0 and "already prepared" not in out and len(data.load_tokens(tmp_path, "train")) > 1_500_000, err
