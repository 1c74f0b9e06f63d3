"""Writing datasets: BPE training, data/stdlib and data/text."""
import argparse
import ast
import contextlib
import errno
import gzip
import importlib.util
import io
import json
import lzma
import random
import re
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import regex
from conftest import run

from support.bpe import train_bpe
from support.prepare import locked, write_tokens
from support.tokens import (
    PIECE,
    ROOT,
    SPLIT_PATTERN,
    cut,
    load_meta,
    load_tokenizer,
    load_tokens,
)

END = "<|endoftext|>"

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
def test_a_damaged_stdlib_dataset_is_prepared_again(tmp_path, monkeypatch, name, content):
    prepare = script("stdlib")
    monkeypatch.setattr(prepare, "HERE", tmp_path.resolve())
    assert run(prepare.main, f"--out={tmp_path}")[0] == 0
    (tmp_path / name).write_bytes(content)
    status, out, err = run(prepare.main, f"--out={tmp_path}")
    assert status == 0 and "already prepared" not in out, err
    assert len(load_tokens(tmp_path, "train")) > 1_500_000

def test_train_bpe_writes_a_file_of_its_own(tmp_path, monkeypatch):
    prepare, before = script("stdlib"), (ROOT / "stdlib/bpe.tiktoken").read_bytes()
    splits = dict(train=[("some text " * 99, True)], val=[("other text", True)])
    monkeypatch.setattr(prepare, "read_library", lambda: (splits, "hash"))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_dataset", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(prepare.main, f"--out={tmp_path}", "--train_bpe=300")
    status, _, err = run(prepare.main, f"--out={tmp_path}", "--train_bpe=300")
    assert status == 0 and load_meta(tmp_path)["vocab_size"] < 300, err
    assert decoded(tmp_path, "val") == "other text" + END
    assert (ROOT / "stdlib/bpe.tiktoken").read_bytes() == before
    status, _, err = run(prepare.main, f"--out={tmp_path}")
    assert status == 1 and "--force" in err and load_meta(tmp_path)["vocab_size"] < 300

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

FIRST, SECOND = TEXTS[:2]

@pytest.mark.parametrize("name", ["A.JSONL", "a.jsonl.GZ", "a.Jsonl.zst", "a.txt.ZST", "a.MD.XZ"])
def test_suffixes_in_any_case_and_zst(tmp_path, name):
    opener = dict(gz=gzip.open, xz=lzma.open, zst=open_zst).get(name.lower().split(".")[-1], open)
    line = json.dumps(dict(text=FIRST)) if "jsonl" in name.lower() else FIRST
    with opener(tmp_path / name, "wt") as file:
        file.write(line)
    (tmp_path / "v.TXT").write_text(SECOND)
    command = [f"--input={{}}/{name}", "--val={}/v.TXT", "--tokenizer=stdlib"]
    status, _, err = prepare_text(tmp_path, *command)
    assert status == 0, err
    assert decoded(tmp_path / "d", "train") == FIRST + END
    assert decoded(tmp_path / "d", "val") == SECOND + END

def open_zst(path, mode):
    pyarrow = pytest.importorskip("pyarrow")
    return io.TextIOWrapper(pyarrow.output_stream(open(path, "wb"), compression="zstd"))

def test_zst_in_several_frames_cut_short_and_without_the_package(tmp_path, monkeypatch):
    with open_zst(tmp_path / "a.txt.zst", "wt") as file:
        file.write(prose(200_000))
    frame = (tmp_path / "a.txt.zst").read_bytes()
    (tmp_path / "two.txt.zst").write_bytes(frame * 2)
    prepare = script("text")
    assert "".join(t for t, _ in prepare.pieces(tmp_path / "two.txt.zst")) == 2 * prose(200_000)

    def error(content):
        (tmp_path / "a.txt.zst").write_bytes(content)
        command = ["--input={}/a.txt.zst", "--val={}/two.txt.zst", "--tokenizer=stdlib"]
        status, _, err = prepare_text(tmp_path, *command)
        assert status == 1
        return err.strip().splitlines()[-1]

    assert "a.txt.zst is damaged or cut short" in error(frame[:-5])
    assert "a.txt.zst is damaged or cut short" in error(b"plain text")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "a.txt.zst: .zst needs pyarrow; run pip install pyarrow" in error(frame)

def test_a_folder_and_files_of_several_kinds(tmp_path):
    folder = tmp_path / "texts [1]"
    (folder / "b/.hidden").mkdir(parents=True)
    for name in ("b/2.md", "b/10.txt", "c.jsonl", "a.txt"):
        text = name if not name.endswith("jsonl") else json.dumps(dict(text=name, id=1))
        (folder / name).write_text(text)
    for name in ("b/picture.png", "b/._2.md", "b/.hidden/x.txt"):
        (folder / name).write_bytes(b"\xff\xfe")
    (tmp_path / "last.TXT").write_text("last")
    command = ["--input", "{}/texts [1]", "{}/texts [1]/a.txt", "{}/last.TXT",
               "--val={}/last.TXT", "--tokenizer=stdlib"]
    status, _, err = prepare_text(tmp_path, *command)
    assert status == 1 and "last.TXT is both input and val" in err
    (tmp_path / "v.txt").write_text("held out")
    command[-2] = "--val={}/v.txt"
    status, _, err = prepare_text(tmp_path, *command)
    assert status == 0, err
    names = ["a.txt", "b/10.txt", "b/2.md", "c.jsonl", "last"]
    assert decoded(tmp_path / "d", "train") == "".join(name + END for name in names)
    status, out, _ = prepare_text(tmp_path, *command)
    assert status == 0 and "already prepared" in out
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "texts [1]/b/picture.png"):
        status, _, err = prepare_text(tmp_path, f"--input={{}}/{wrong}")
        assert status == 1 and f"{wrong}: expected .txt, .md or .jsonl" in err

def test_the_text_can_be_in_another_field(tmp_path):
    lines = [dict(text="no", content=f"document {i}.") for i in range(40)]
    lines[3] = dict(meta=dict(content="no", a=[1, {}]), content=prose(200_000))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "v.txt").write_text("held out")
    command = ["--input={}/a.jsonl", "--val={}/v.txt", "--tokenizer=stdlib"]
    status, _, err = prepare_text(tmp_path, *command, "--field=content")
    assert status == 0, err
    expected = "".join(line["content"] + END for line in lines)
    assert decoded(tmp_path / "d", "train") == expected
    assert "already prepared" in prepare_text(tmp_path, *command, "--field=content")[1]
    status, _, err = prepare_text(tmp_path, *command)
    assert status == 1 and "other files or keys" in err
    status, _, err = prepare_text(tmp_path, *command, "--field=body", "--force")
    last = err.strip().splitlines()[-1]
    assert status == 1 and "a.jsonl, line 1: " in last and "'body'" in last and "--field" in last

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

def prose(n, seed=0):
    """n characters of words and white space, without two spaces or lines that are the same."""
    rng = random.Random(seed)
    words = (f"{rng.choice('abcdefgh') * rng.randint(1, 9)}{i}" for i in range(n // 3 + 1))
    return "".join(word + rng.choice((" ", "\n", "  ", "\n\t ")) for word in words)[:n]

@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_one_long_document_ends_only_where_a_held_out_piece_interrupts_it(tmp_path, kind):
    text = prose(50 * PIECE)
    content = text if kind == "txt" else json.dumps(dict(text=text))
    (tmp_path / f"a.{kind}").write_text(content)
    status, _, err = prepare_text(tmp_path, f"--input={{}}/a.{kind}", "--tokenizer=stdlib")
    assert status == 0, err
    train = decoded(tmp_path / "d", "train").split(END)
    val = decoded(tmp_path / "d", "val").split(END)
    assert len(train) == 4 and len(val) == 3 and train.pop() == val.pop() == ""
    assert train[0] + val[0] + train[1] + val[1] + train[2] == text
    assert all(0.9 * PIECE < len(piece) <= PIECE for piece in val)

def test_documents_and_pieces_are_held_out_alike(tmp_path):
    """Short and long documents, one of which is held out in part, one at its end."""
    texts = [f"document {i}" for i in range(27)]
    texts[17], texts[20] = prose(int(3.5 * PIECE)), prose(int(16.5 * PIECE), 1)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    assert prepare_text(tmp_path, "--input={}/a.jsonl", "--tokenizer=stdlib")[0] == 0
    train, val = (decoded(tmp_path / "d", split).split(END)[:-1] for split in ("train", "val"))
    assert len(val) == 2 and train[:17] == texts[:17] and train[-6:] == texts[-6:]
    assert train[17] + val[0] + train[18] == texts[17]
    assert train[19:21] == texts[18:20] and train[21] + val[1] == texts[20]

@pytest.mark.parametrize("n, what", [(19, "it has 19"), (1, "it has 1"), (0, "it has 0")])
def test_too_few_documents_to_hold_one_out(tmp_path, n, what):
    (tmp_path / "a.jsonl").write_text((json.dumps(dict(text="x " * 999)) + "\n") * n)
    status, _, err = prepare_text(tmp_path, "--input={}/a.jsonl", "--tokenizer=stdlib")
    last = err.strip().splitlines()[-1]
    assert status == 1 and "hold out" in last and what in last and "--val" in last
    assert not list((tmp_path / "d").iterdir())

def test_end_of_text_in_a_file_is_ordinary_text(tmp_path):
    (tmp_path / "a.txt").write_text(f"one{END}two")
    (tmp_path / "b.jsonl").write_text(json.dumps(dict(text=END * 3)))
    command = ["--input={}/a.txt", "--val={}/b.jsonl", "--tokenizer=stdlib"]
    assert prepare_text(tmp_path, *command)[0] == 0
    end = load_tokenizer("stdlib").eot_token
    for split, text in dict(train=f"one{END}two", val=END * 3).items():
        assert decoded(tmp_path / "d", split) == text + END
        assert load_tokens(tmp_path / "d", split).tolist().count(end) == 1

# -- long documents --------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "", "a", prose(3 * PIECE), "x" * (2 * PIECE), " " * (2 * PIECE) + "x", "word " * PIECE,
    prose(PIECE - 1) + "x" * 3 * PIECE + prose(PIECE), "größer\u3000✓😀\n" * PIECE,
    prose(PIECE) + "\n" * PIECE + prose(9)])
def test_cutting_a_text_changes_no_token(tmp_path, text):
    pieces = list(cut([(text, True), ("next", False), (" one", True)]))
    assert pieces[-1] == ("next one", True) and sum(ends for _, ends in pieces) == 2
    assert "".join(piece for piece, _ in pieces[:-1]) == text
    assert all(len(piece) <= PIECE for piece, _ in pieces)
    parts = [(text[i:i + 777], False) for i in range(0, len(text), 777)] + [("", True)]
    assert "".join(piece for piece, _ in cut(parts)) == text
    if not re.search(r"\S{9000}|\s{9000}", text):  # such a run is cut anywhere
        tokenizer = load_tokenizer("stdlib")
        write_tokens(tmp_path / "x.bin", parts, tokenizer)
        expected = tokenizer.encode_ordinary(text) + [tokenizer.eot_token]
        assert np.fromfile(tmp_path / "x.bin", "<u2").tolist() == expected

ODD = 'quote " backslash \\ slash / tab \t 😀😀 é \u2028 \x7f \ud83d lone \ude00 ' + "\\" * 9

@pytest.mark.parametrize("ascii", [True, False])
def test_the_text_of_a_long_line_is_read_in_pieces(tmp_path, monkeypatch, ascii):
    prepare = script("text")
    texts = [(ODD if ascii else ODD.replace("\ud83d", "").replace("\ude00", ""))[i:] * 5
             for i in range(40)]
    others = [{}, dict(id=3, source="web", score=-1.5e3, ok=True, none=None), dict(meta={"a": [1]})]
    docs = [other | dict(text=t) | dict(after=["}", '"']) for t in texts for other in others]
    path = tmp_path / "a.jsonl"
    for end in ("\n", "\n \n"):
        path.write_text(end.join(json.dumps(doc, ensure_ascii=ascii) for doc in docs))
        for line, piece in ((40, 1), (150, 7), (1 << 20, 16_000)):
            monkeypatch.setattr(prepare, "LONG_LINE", line)
            monkeypatch.setattr(prepare, "PIECE", piece)
            found = "".join(t + END * ends for t, ends in prepare.pieces(path))
            expected = "".join(doc["text"] + END for doc in docs)
            assert plain(found) == plain(expected)

def plain(text):
    """Surrogate pairs as one character, as the tokenizer reads them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

@pytest.mark.parametrize("line", [
    '{"text": "%s', '{"text": "%s"', '{"text": "%s"}}', '{"text": "%s\\x"}', '{"text": "%s\\u12"}',
    '{"text": "%s\t"}', '{"text": 3, "a": "%s"}', '{"txt": "%s"}', '["text", "%s"]', '"%s"',
    '{"n": 1.2.3, "text": "%s"}', '{"text": "%s", "b": }', '{"text": "%s\n"}', '{"text": "%s\\'])
@pytest.mark.parametrize("end", ["", '\n{"text": "next"}\n'])
def test_a_damaged_long_line_is_named(tmp_path, line, end):
    content = '{"text": "first"}\n\n' + line % ("word " * 20_000) + end
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "v.txt").write_text("held out")
    status, _, err = prepare_text(tmp_path, "--input={}/a.jsonl", "--val={}/v.txt",
                                  "--tokenizer=stdlib")
    last = err.strip().splitlines()[-1]
    assert status == 1 and "a.jsonl, line 3: " in last and len(last) < 300
    assert not list((tmp_path / "d").iterdir())

@pytest.mark.parametrize("kind, before", [("txt", {}), ("jsonl", {}), (
    "jsonl", {"meta": {"a": [1, {"text": 'no "'}], "b": "\\é"}, "tags": [[]], 'q"': None})])
@pytest.mark.parametrize("word", ["word ", "ACGT", "\n"])
def test_memory_use_does_not_grow_with_one_long_document(tmp_path, kind, before, word):
    text, prepare = word * (12_000_000 // len(word)), script("text")
    content = text if kind == "txt" else json.dumps(before | dict(text=text))
    (tmp_path / f"a.{kind}").write_text(content)
    total = len(text)
    del text, content
    tracemalloc.start()
    found = sum(len(piece) for piece, _ in prepare.pieces(tmp_path / f"a.{kind}"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == total and peak < 8 << 20

# -- existing datasets -----------------------------------------------------------------------------

@pytest.fixture
def mine(tmp_path):
    """A folder with a dataset in d; other.jsonl is another text."""
    hundred_documents(tmp_path / "a.jsonl")
    lines = [json.dumps(dict(text=f"other {i}")) for i in range(50)]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    assert prepare_text(tmp_path, "--input={}/a.jsonl", "--tokenizer=stdlib")[0] == 0
    return tmp_path

def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

@pytest.mark.parametrize("problem", ["damaged input", "too short", "no tokenizer", "full disk",
                                     "Ctrl-C", "another process"])
def test_an_error_on_the_way_keeps_the_old_dataset(mine, monkeypatch, problem):
    import support.prepare
    before, source, encode = content(mine / "d"), "other.jsonl", support.prepare.encode_into
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:  # the val split
            raise KeyboardInterrupt if problem == "Ctrl-C" else OSError(errno.ENOSPC, "No space")
        return encode(*args)

    if problem in ("damaged input", "too short"):
        source = "new.jsonl"
        lines = (mine / "other.jsonl").read_text().splitlines()
        lines = lines[:10] if problem == "too short" else [*lines, "{"]
        (mine / source).write_text("\n".join(lines))
    elif problem in ("full disk", "Ctrl-C"):
        monkeypatch.setattr(support.prepare, "encode_into", fail)
    tokenizer = "nowhere" if problem == "no tokenizer" else "stdlib"
    command = ["--input={}/" + source, f"--tokenizer={tokenizer}", "--force"]
    with locked(mine / "d") if problem == "another process" else contextlib.nullcontext():
        status, _, err = prepare_text(mine, *command)
    assert status == (130 if problem == "Ctrl-C" else 1), err
    assert content(mine / "d") == before and load_tokens(mine / "d", "val") is not None
    if problem == "another process":
        assert f"another process is preparing data in {mine / 'd'}: wait" in err

@pytest.mark.parametrize("damage", ["none", "no folder", "no meta.json", "cut meta.json",
                                    "cut train.bin", "no val.bin"])
def test_force_replaces_any_dataset(mine, damage):
    whole = content(mine / "d")
    if damage == "no folder":
        shutil.rmtree(mine / "d")
    elif damage != "none":
        what, name = damage.split()
        (mine / "d" / name).unlink()
        if what == "cut":
            (mine / "d" / name).write_bytes(whole[name][:20])
    command = ["--input={}/a.jsonl", "--tokenizer=stdlib"]
    if damage.endswith("meta.json"):  # whose are the .bin files?
        before = content(mine / "d")
        status, _, err = prepare_text(mine, *command)
        assert status == 1 and "meta.json is missing or damaged" in err and "--force" in err
        assert content(mine / "d") == before
    status, _, err = prepare_text(mine, *command, "--force")
    assert status == 0 and content(mine / "d") == whole, err
    status, _, err = prepare_text(mine, "--input={}/other.jsonl", "--tokenizer=stdlib", "--force")
    assert status == 0 and decoded(mine / "d", "val").startswith("other 19"), err

@pytest.mark.parametrize("name", ["meta.json", "train.bin", "val.bin"])
def test_files_of_something_else_are_kept(tmp_path, name):
    hundred_documents(tmp_path / "a.jsonl")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(b"mine")
    for command in ([script("text").main, f"--input={tmp_path / 'a.jsonl'}"],
                    [script("stdlib").main], [script("openwebtext").main]):
        status, _, err = run(*command, f"--out={tmp_path / 'd'}")
        assert status == 1 and "--force" in err, err
        assert content(tmp_path / "d") == {name: b"mine"}

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
@pytest.mark.parametrize("kind, end", [("txt", "\n"), ("txt", " "), ("jsonl", "\\n")])
def test_memory_use_does_not_grow_with_the_input(tmp_path, kind, end):
    code = ("import sys, resource, runpy; sys.argv = ['prepare.py'] + sys.argv[1:]\n"
            f"try: runpy.run_path({str(ROOT / 'text/prepare.py')!r}, run_name='__main__')\n"
            "finally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for megabytes in (8, 64):
        with open(tmp_path / f"big.{kind}", "w") as file:
            file.write('{"text": "' * (kind == "jsonl"))
            for i in range(megabytes * 20_000):
                file.write(f"line {i % 977} of a file of some size that goes on{end}")
            file.write('"}\n' * (kind == "jsonl"))
        argv = [f"--input={tmp_path / f'big.{kind}'}", "--tokenizer=stdlib",
                f"--out={tmp_path / 'd'}"]
        out = subprocess.run([sys.executable, "-c", code, *argv, "--force"], capture_output=True,
                             text=True, check=True).stdout
        peaks.append(int(out.rsplit("peak", 1)[1]))
    assert peaks[1] < 1.15 * peaks[0]

@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_other_encodings_are_refused_with_a_remedy(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_text("größer " * 100, encoding=encoding)
    path.with_name("b.txt").write_text("other " * 100)
    status, _, err = prepare_text(tmp_path, f"--input={path}", f"--val={tmp_path / 'b.txt'}",
                                  "--tokenizer=stdlib")
    assert status == 1 and "is not UTF-8 text" in err
    assert f"iconv -f ENCODING -t UTF-8 {path}" in err
