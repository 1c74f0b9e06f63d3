"""Tokenizers, reading token files, and batches."""
import argparse
import json
import os
import time
import tracemalloc
from pathlib import Path

from support.runtime import UserError

import numpy as np
import pytest
import tiktoken
import torch

import support.tokens
from support.tokens import (
    END_OF_TEXT,
    ROOT,
    Batches,
    dataset_dir,
    encode_text,
    load_tokenizer,
    load_tokens,
    sequential,
    tokenizer_hash,
    tokens_hash,
)

def batches(tokens, **more):
    defaults = dict(block_size=8, batch_size=12, vocab_size=1 << 16, seed=3)
    return Batches(tokens, **defaults | more)

@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("shift", [True, False])
def test_an_epoch_holds_every_block_exactly_once(ranks, shift):
    tokens = np.arange(8 * 60 + (8 if shift else 1), dtype="<u2")  # 60 blocks: five steps of 12
    parts = [batches(tokens, shift=shift, rank=r, world_size=ranks) for r in range(ranks)]
    assert parts[0].blocks == 60
    for epoch in range(3):
        steps = range(5 * epoch, 5 * epoch + 5)
        rows = torch.cat([part[step][0] for step in steps for part in parts])
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

def test_batches_are_those_of_november_2026():
    """A run resumed with newer code must see the batches it would have seen."""
    b = batches(np.arange(1000, dtype="<u2"))
    assert b.starts(0).tolist() == [742, 542, 582, 822, 550, 334, 278, 246, 142, 190, 230, 726]
    assert b.starts(25).tolist() == [918, 814, 798, 870, 502, 662, 854, 422, 14, 22, 838, 782]

def test_every_position_has_the_next_token_as_target():
    x, y = batches(np.arange(500, dtype="<u2"))[7]
    assert x.shape == y.shape == (12, 8) and x.dtype == torch.int64 and torch.equal(y, x + 1)

def test_ranks_take_slices_of_one_global_batch_and_steps_need_no_history():
    tokens = np.arange(1000, dtype="<u2")
    whole = batches(tokens)
    for step in (0, 3, 40, 7):
        parts = [batches(tokens, rank=r, world_size=3)[step][0] for r in range(3)]
        assert torch.equal(whole[step][0], torch.cat(parts))

def test_prefetched_batches_are_the_same():
    b, cpu = batches(np.arange(1000, dtype="<u2")), torch.device("cpu")
    got = list(b.prefetch(4, 9, cpu))
    assert len(got) == 5
    for step, (x, y, labels) in enumerate(got, 4):
        assert torch.equal(x, b[step][0]) and torch.equal(y, b[step][1]) and labels is None
    assert list(b.prefetch(4, 4, cpu)) == []

def test_sequential_gives_every_token_but_the_first_as_a_target_once():
    for n in (81, 85, 9, 5):
        tokens = np.arange(n, dtype="<u2")
        rows = list(sequential(tokens, 8, 3, 100))
        assert torch.equal(torch.cat([y.flatten() for _, y in rows]), torch.arange(1, n))
        assert all(torch.equal(y, x + 1) and x.shape[0] <= 3 for x, y in rows)

def write_meta(folder, train_tokens):
    (folder / "meta.json").write_text(json.dumps(dict(
        tokenizer="gpt2", tokenizer_hash="gpt2", vocab_size=50257, train_tokens=train_tokens,
        val_tokens=0)))

def test_a_file_of_openwebtexts_size_gives_a_batch_at_once_and_in_little_memory(tmp_path):
    n = 9_035_582_198
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(1 << 24)
        if not 0 <= os.fstat(file.fileno()).st_blocks * 512 < 1 << 20:
            pytest.skip("this filesystem has no sparse files")
        file.truncate(2 * n)
    write_meta(tmp_path, n)
    tracemalloc.start()
    start = time.process_time()  # independent of what else runs on the machine
    x, _ = Batches(load_tokens(tmp_path, "train"), 1024, 512, 50257)[12345]
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert x.shape == (512, 1024) and seconds < 2 and peak < 64 << 20

@pytest.mark.parametrize("name, content, message", [
    ("train.bin", b"", "train.bin has 0 bytes"),
    ("train.bin", b"1" * 39, "train.bin has 39 bytes but meta.json says 40: cut short"),
    ("train.bin", None, "train.bin is missing"),
    ("meta.json", b"{", "meta.json is damaged"),
    ("meta.json", None, "no dataset"),
])
def test_damaged_datasets_are_named(tmp_path, name, content, message):
    np.arange(20, dtype="<u2").tofile(tmp_path / "train.bin")
    write_meta(tmp_path, 20)
    assert len(load_tokens(tmp_path, "train")) == 20
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokens(tmp_path, "train")

def test_tokens_beyond_the_vocabulary_and_short_files_are_named():
    with pytest.raises(UserError, match="beyond the vocabulary of 50"):
        batches(np.full(500, 50, dtype="<u2"), vocab_size=50)[0]
    with pytest.raises(UserError, match="beyond the vocabulary of 50"):
        list(sequential(np.full(20, 50, dtype="<u2"), 8, 3, 50))
    with pytest.raises(UserError, match="train.bin has only 9 tokens, too few for block_size=8"):
        batches(np.arange(9, dtype="<u2"))
    with pytest.raises(UserError, match="val.bin has only 9 tokens"):
        batches(np.arange(9, dtype="<u2"), split="val")

def test_a_name_under_data_and_a_path_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(support.tokens, "ROOT", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    named, here = tmp_path / "data/mine", tmp_path / "mine"
    for folder in (named, here):
        folder.mkdir(parents=True)
    with pytest.raises(UserError, match="no dataset 'mine': .*data/text/prepare.py --input"):
        dataset_dir("mine")
    (here / "meta.json").touch()  # an unfinished folder under data/ doesn't hide it
    assert dataset_dir("mine").samefile(here)
    (named / "meta.json").touch()
    with pytest.raises(UserError, match="'mine' can be .*/data/mine or ./mine"):
        dataset_dir("mine")
    for path in ("./mine", "mine/", "data/../mine", here, str(here)):
        assert dataset_dir(path).samefile(here), path
    assert dataset_dir("data/mine").samefile(named) and dataset_dir(named).samefile(named)
    monkeypatch.chdir(tmp_path / "data")  # here, both are the same
    assert dataset_dir("mine").samefile(named)
    with pytest.raises(UserError, match=r"no dataset '\.\./other': no \.\./other/meta"):
        dataset_dir("../other")
    (here / "meta.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert dataset_dir("mine").samefile(named)

def test_byte_order_marks_and_blank_lines_are_no_damage(tmp_path):
    np.arange(20, dtype="<u2").tofile(tmp_path / "train.bin")
    write_meta(tmp_path, 20)
    (tmp_path / "meta.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "meta.json").read_bytes())
    assert len(load_tokens(tmp_path, "train")) == 20
    lines = (ROOT / "stdlib/bpe.tiktoken").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "x.tiktoken").write_bytes(lines + b"  \r\n\r\n")
    other, tokenizer = load_tokenizer(str(tmp_path / "x.tiktoken")), load_tokenizer("stdlib")
    assert tokenizer_hash("x", other) == tokenizer_hash("stdlib", tokenizer)

def test_stdlib_tokenizer_round_trips_and_has_at_most_4096_tokens():
    tokenizer = load_tokenizer("stdlib")
    assert tokenizer.n_vocab <= 4096 and tokenizer.eot_token == tokenizer.n_vocab - 1
    text = Path(json.__file__).read_text() + "\n\t größer ✓ <|endoftext|>"
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2.5
    assert tokenizer.eot_token not in ids

@pytest.mark.parametrize("content", [b"", b"not base64\n", b"QQ== 0\n", b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(str(tmp_path / "x.tiktoken"))
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer("nowhere")

@pytest.mark.parametrize("text", [
    "", " ", "a", f"{END_OF_TEXT}", f"a{END_OF_TEXT}{END_OF_TEXT} b ", f" {END_OF_TEXT}\n\n",
    Path(argparse.__file__).read_text(), "größer ✓ 😀 \ud83d\n" * 9_000])
def test_encode_text_gives_tiktokens_tokens(text):
    tokenizer = load_tokenizer("stdlib")
    assert encode_text(tokenizer, text) == tokenizer.encode_ordinary(text)
    assert encode_text(tokenizer, text, special=True) == tokenizer.encode(
        text, allowed_special="all")

@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "\n" * 200_000, "x" * 200_000])
def test_long_runs_are_encoded_in_pieces(text):
    """tiktoken's stack overflows on a million spaces with GPT-2's pattern."""
    ranks = {bytes([b]): b for b in range(256)}
    pattern = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks,
                                  special_tokens={END_OF_TEXT: 256})
    assert tokenizer.decode(encode_text(tokenizer, text)) == text

def test_tokens_hash_sees_every_part_of_a_large_split():
    tokens = np.arange(500, dtype="<u2")
    before = tokens_hash(tokens, size=8)
    for i in range(0, 500, 7):  # up to parts · size tokens, all of them count
        changed = tokens.copy()
        changed[i] += 1
        assert tokens_hash(changed, size=8) != before, i
    changed = tokens.copy()
    changed[-1] += 1
    assert tokens_hash(changed, parts=4, size=8) != tokens_hash(tokens, parts=4, size=8)
