"""What a person can do wrong ends in one line that says what is wrong, with the value and the
remedy: exit status 1, no traceback, nothing written. Tables for all commands, run in this process.
"""
import errno
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from support.runtime import UserError

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_SAE, run
from test_experiments import experiment
from test_prepare import script

import bench
import concepts
import eval as evaluation
import sae
import sample
import train
from sae import SAE
from support.checkpoint import load_checkpoint
from support.published import sae_file
from support.tokens import load_tokenizer, tokenizer_hash

ROOT = Path(train.__file__).resolve().parent

# -- broken files ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bad(tmp_path_factory, chain, dataset):
    """Broken things to point the commands at."""
    folder = tmp_path_factory.mktemp("bad")
    break_datasets(folder, Path(dataset))
    break_checkpoints(folder, Path(chain["ntp"]) / "ckpt.pt", Path(chain["cocomix"]) / "ckpt.pt")
    break_saes(folder, Path(chain["sae"]))
    break_texts(folder)
    break_scripts(folder)
    return folder

def break_datasets(folder, dataset):
    meta = json.loads((dataset / "meta.json").read_text())
    stdlib = tokenizer_hash("stdlib", load_tokenizer("stdlib"))
    changed = dict(short=meta, beyond=meta, odd=meta, list=[1],
                   big=meta | dict(vocab_size=70_000), words=meta | dict(vocab_size="many"),
                   nothing=meta | dict(train_tokens=0),
                   other=meta | dict(tokenizer="stdlib", tokenizer_hash=stdlib),
                   replaced=meta | dict(tokenizer="stdlib", tokenizer_hash="another"))
    for name, content in changed.items():
        shutil.copytree(dataset, folder / name)
        (folder / name / "meta.json").write_text(json.dumps(content))
    os.truncate(folder / "short/train.bin", 101)
    os.truncate(folder / "nothing/train.bin", 0)
    np.full(20_000, 60_000, dtype="<u2").tofile(folder / "beyond/train.bin")
    with open(folder / "odd/val.bin", "ab") as file:
        file.write(b"x")

class Touch:
    """Unpickled, it would create a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)

def break_checkpoints(folder, ntp, cocomix):
    whole = ntp.read_bytes()
    one_bit = bytearray(whole)
    one_bit[len(whole) // 2] ^= 4
    for name, content in dict(cut=whole[:len(whole) // 2], flipped=b"\0" * 64 + whole[64:],
                              byte=one_bit).items():
        (folder / name).mkdir()
        (folder / name / "ckpt.pt").write_bytes(content)
    run_of_ntp, run_of_cocomix = (torch.load(path, weights_only=True) for path in (ntp, cocomix))
    model, settings = run_of_ntp["model"], run_of_cocomix["model_config"]
    elsewhere = run_of_ntp["train_config"] | dict(dataset=str(folder / "other"))
    contents = dict(
        weights=run_of_ntp | dict(model=model | {"wpe.weight": model["wpe.weight"][:5]}),
        moved=run_of_ntp | dict(train_config=elsewhere),
        optimizer=run_of_cocomix | dict(optimizer={}, step=4),
        step=run_of_cocomix | dict(step="four"),
        shape=run_of_cocomix | dict(model_config=3),
        heads=run_of_cocomix | dict(model_config=settings | dict(n_head=7)),
        pickle=dict(model=Touch(folder / "ran"), model_config={}))
    for name, content in contents.items():
        (folder / name).mkdir()
        torch.save(content, folder / name / "ckpt.pt")
    torch.save({"a": 1}, folder / "not.pt")
    torch.save({"wte.weight": torch.zeros(100, 64)}, folder / "half.bin")

def break_saes(folder, good):
    content = torch.load(good / "sae.pt", weights_only=True)
    changes = dict(nan={"encoder.weight": content["encoder.weight"] * torch.nan},
                   relu=dict(activation="ReLU"), none=dict(activation_state_dict=dict(k=0)))
    for name, change in changes.items():
        torch.save(content | change, folder / f"{name}.pt")
    torch.save(sae_file(SAE(24, 48, 6)), folder / "wide.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    shutil.copytree(good, folder / "sae-list")
    (folder / "sae-list/sae.json").write_text("[]")

def break_texts(folder):
    hex_digits = os.urandom(5000).hex().encode()
    contents = {
        "latin.txt": "größer".encode("latin-1"), "latin-prompt.txt": b"\xff\xfe\xfa",
        "bad.jsonl": b'{"text": "a"}\n{"txt": "b"}\n', "empty.jsonl": b"", "tiny.txt": b"short",
        "half.jsonl": b'{"text": "a"}\n{"text": "b\n', "deep.jsonl": b"[" * 100_000 + b"\n",
        "cut.txt.gz": gzip.compress(hex_digits)[:2000], "wrong.txt.xz": b"hello", "a.csv": b"a,b",
        "hub/train-0.parquet": b"x",
        "tasks/piqa.jsonl": b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 7}\n'}
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

def break_scripts(folder):
    contents = {
        "raises.py": "raise RuntimeError('no')", "value.py": "n_layer = [1, 2]",
        "key.py": "n_layers = 3", "syntax.py": "a = (", "zero.py": "n_layer = 10 ** 400",
        "nul.py": "out_dir = 'a\\0b'", "no-runs/experiment.py": "out = 'x'",
        "odd-runs/experiment.py": "out, runs = 'x', 3",
        "fails/experiment.py":
            f"out, runs = {str(folder / 'x')!r}, dict(a={str(folder / 'raises.py')!r})"}
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

# -- the tables ------------------------------------------------------------------------------------

TRAIN = {  # what is wrong: (arguments, what the line must say)
    "an unknown dataset": ("--dataset=openwebtext2", "no dataset 'openwebtext2'", "prepare.py"),
    "data not prepared": ("--dataset={bad}/none", "no dataset", "data/text/prepare.py"),
    "a .bin cut short":
        ("--dataset={bad}/short", "train.bin has 101 bytes", "prepare the dataset again"),
    "tokens beyond the vocabulary": ("--dataset={bad}/beyond", "token 60000", "vocabulary of 257"),
    "a vocabulary over 65536": ("--dataset={bad}/big", "vocab_size=70000", "65536"),
    "a block larger than the data": ("{data} --block_size=9000", "block_size=9000", "needs 18000"),
    "width not divisible": ("{data} --n_embd=17", "n_embd=17", "n_head=2"),
    "a mixer outside the stack":
        ("{data} --method=pause --insert_layer=3", "insert_layer=3", "0 to 2"),
    "more concepts kept than there are": ("{cocomix} --concept_k=49", "concept_k=49", "48"),
    "more labels than active concepts": ("{cocomix} --attr_k=7", "attr_k=7", "6"),
    "an SAE of another width": ("{cocomix} --sae={bad}/wide.pt", "width 24", "have 16"),
    "an SAE of another layer": ("{cocomix} --concept_layer=0", "layer 1", "--concept_layer=1"),
    "a layer the concept model lacks":
        ("{cocomix} --concept_layer=5", "concept_layer=5", "3 blocks"),
    "an SAE of another concept model":
        ("{cocomix} --concept_model={chain}/ntp", "another concept model", "sae.py"),
    "a missing SAE": ("{cocomix} --sae={bad}/nowhere", "no SAE at", "sae.py"),
    "a file that is no SAE": ("{cocomix} --sae={bad}/not.pt", "not.pt is not an SAE"),
    "a text file as an SAE": ("{cocomix} --sae={bad}/tiny.txt", "can't be read as an SAE"),
    "a missing concept model":
        ("{cocomix} --concept_model={bad}/nowhere", "no checkpoint at", "nowhere"),
    "another tokenizer": ("{cocomix} --dataset={bad}/other", "another tokenizer", "'stdlib'"),
    "a dataset whose tokenizer was replaced":
        ("--dataset={bad}/replaced", "tokenizer 'stdlib' is not the one that wrote", "again"),
    "a block over the concept model's": ("{cocomix} --block_size=64", "block_size=64", "32"),
    "an unknown key": ("--learningrate=3", "unknown key 'learningrate'", "'learning_rate'"),
    "a wrong type": ("--n_layer=two", "n_layer='two'", "an integer"),
    "an unknown method": ("--method=npt", "method='npt'", "cocomix"),
    "an unknown device": ("{data} --device=tpu", "device='tpu'", "not available"),
    "no config file": ("config/stdlib_npt.py", "no config file", "stdlib_ntp.py"),
    "a config file that raises": ("{bad}/raises.py", "does not run", "RuntimeError: no"),
    "an argument that is no config file":
        ("out/a", "unexpected argument 'out/a'", ".py, the run's folder --out_dir=out/a"),
    "resuming a damaged checkpoint":
        ("{data} --out_dir={bad}/cut --resume", "can't be read as a checkpoint", "cut short"),
    "one dash": ("-seed=3", "unexpected argument '-seed=3'", "--seed=3"),
    "a device that computes nothing": ("{data} --device=meta", "device='meta'", "cpu, cuda or mps"),
    "an empty out_dir": ("{data} --out_dir=", "out_dir is empty", "--out_dir=out/run"),
    "a learning rate that would rise":
        ("{data} --min_lr=1", "min_lr=1.0 is over learning_rate=0.001"),
    "resume and overwrite": ("{data} --resume --overwrite", "exclude each other"),
    "pause vectors that are not inserted":
        ("{data} --method=pause --mix=none", "insert nothing", "method='ntp'"),
    "a model larger than memory":
        ("{data} --n_embd=1099511627776", "out of memory", "--micro_batch_size"),
    "a loss that overflows":
        ("{data} --learning_rate=1e30 --grad_clip=0", "not finite", "learning_rate below"),
    "a GPT-2 that is not fetched by name":
        ("{data} --method=cocomix --concept_model=gpt2-xxl", "no checkpoint at", "gpt2-xl"),
    "starting from a wider model":
        ("{data} --n_embd=24 --init_from={chain}/gpt", "another shape", "give it --n_embd=16"),
    "starting from a model with biases":
        ("{data} --bias=false --init_from={chain}/gpt", "give it --bias=True"),
    "starting from a shorter context":
        ("{data} --block_size=64 --init_from={chain}/gpt", "block_size=64 is over the 32"),
    "starting from another tokenizer":
        ("--dataset={bad}/other --init_from={chain}/gpt", "another tokenizer than the dataset"),
    "starting from nowhere": ("{data} --init_from={bad}/nowhere", "no checkpoint at", "gpt2"),
    "nanoGPT's init_from": ("{data} --init_from=resume", "--resume continues a run", "scratch"),
    "a key without dashes": ("{data} max_iters=2", "write --max_iters=2"),
    "a config without its suffix": ("config/stdlib_ntp", "did you mean config/stdlib_ntp.py?"),
    "a config without its folder": ("stdlib_ntp.py", "did you mean config/stdlib_ntp.py?"),
    "a seed too large": ("--seed=99999999999999999999", "seed=", "4294967295"),
    "meta.json that is a list":
        ("--dataset={bad}/list", "meta.json is damaged", "prepare the dataset again"),
    "meta.json with words for numbers":
        ("--dataset={bad}/words", "vocab_size='many'", "prepare the dataset again"),
    "an empty .bin":
        ("--dataset={bad}/nothing", "train.bin has 0 bytes", "prepare the dataset again"),
    "a .bin of odd size": ("--dataset={bad}/odd", "val.bin has 8001 bytes", "8000"),
    "a file as a dataset": ("{data}/train.bin", "no dataset", "--input FILES"),
    "a folder where nothing can be written":
        ("{data} --out_dir=/proc/self", "can't be written", "another folder"),
    "a file as out_dir": ("{data} --out_dir={dataset}/train.bin", "can't be made", "--out_dir"),
    "too many layers": ("--n_layer=1000000000", "n_layer='1000000000'", "from 1 to 1000"),
    "too large a batch": ("--batch_size=1e12", "batch_size='1e12'", "1000000"),
    "a micro batch in words": ("--micro_batch_size=half", "micro_batch_size='half'", "auto"),
    "a learning rate that is NaN": ("--learning_rate=nan", "learning_rate='nan'", "a number"),
    "a seed that is no integer": ("--seed=1.5", "seed='1.5'", "an integer"),
    "everything dropped": ("--dropout=1", "dropout='1'", "0.99"),
    "a key without value": ("--n_layer --n_head=2", "--n_layer needs", "an integer"),
    "a config file with a list": ("{bad}/value.py", "n_layer=[1, 2]", "an integer"),
    "a config file with an unknown key": ("{bad}/key.py", "unknown key 'n_layers'", "'n_layer'"),
    "a config file that is no Python": ("{bad}/syntax.py", "does not run", "line 1"),
    "an enormous number": ("{bad}/zero.py", "n_layer=1000", "from 1 to 1000"),
    "a path with a null byte": ("{bad}/nul.py", "out_dir='a", "text"),
    "a config file of another script":
        ("config/stdlib_sae.py", "another script's", "n_concepts, k, k_aux"),
    "an SAE with weights that are NaN":
        ("{cocomix} --sae={bad}/nan.pt", "not finite", "train it again"),
    "an SAE of another kind": ("{cocomix} --sae={bad}/relu.pt", "a ReLU autoencoder", "only TopK"),
    "an SAE that keeps none": ("{cocomix} --sae={bad}/none.pt", "k=0 of 48"),
    "a tensor as an SAE": ("{cocomix} --sae={bad}/tensor.pt", "not an SAE", "Tensor"),
    "a checkpoint as an SAE": ("{cocomix} --sae={chain}/ntp/ckpt.pt", "not an SAE"),
    "a damaged sae.json":
        ("{cocomix} --sae={bad}/sae-list", "sae.json is damaged", "train the SAE again"),
    "a published SAE for another model":
        ("{cocomix} --sae=openai --concept_layer=12", "concept_layer=12", "3 blocks"),
    "an SAE as concept model":
        ("{cocomix} --concept_model={chain}/sae", "is an SAE's folder", "name the run"),
    "a part of GPT-2": ("{cocomix} --concept_model={bad}/half.bin", "not GPT-2's weights"),
    "labels that are not stored":
        ("{cocomix} --labels=disk --shift_blocks=false", "no labels at", "--write_labels"),
    "labels from disk for shifted blocks": ("{cocomix} --labels=disk", "--shift_blocks=false"),
    "labels from disk without concepts":
        ("{data} --labels=disk --shift_blocks=false", "labels='disk'", "method='ntp'"),
    "resuming a run of another shape":
        ("{data} --out_dir={chain}/ntp --seed=1 --resume --n_embd=32", "n_embd=16", "take it back"),
    "resuming without the optimizer's state":
        ("{cocomix} --seed=1 --out_dir={bad}/optimizer --resume",
         "the optimizer's state", "--overwrite"),
    "resuming at a step that is text":
        ("{cocomix} --seed=1 --out_dir={bad}/step --resume",
         "not a checkpoint of this kind", "step"),
}

SAMPLE = {
    "no checkpoint": ("{bad}/nowhere", "no checkpoint at", "train it first"),
    "a checkpoint cut short": ("{bad}/cut", "can't be read as a checkpoint", "cut short"),
    "a checkpoint with flipped bytes":
        ("{bad}/flipped", "can't be read as a checkpoint", "damaged"),
    "a pickle that would run code": ("{bad}/pickle", "can't be read as a checkpoint"),
    "weights that do not fit": ("{bad}/weights", "do not fit", "wpe"),
    "a file that is no checkpoint": ("{bad}/not.pt", "is not a checkpoint"),
    "a concept that does not exist": ("{chain}/cocomix --steer=48:2", "steer='48:2'", "0 to 47"),
    "a negative concept": ("{chain}/cocomix --steer=-1:2", "steer='-1:2'", "0 to 47"),
    "a factor that is NaN": ("{chain}/cocomix --steer=3:nan", "steer='3:nan'", "-1000 to 1000"),
    "a factor that is huge": ("{chain}/cocomix --steer 3:1e30", "steer='3:1e30'", "-1000 to 1000"),
    "a missing factor": ("{chain}/cocomix --steer=3", "steer='3'", "CONCEPT:FACTOR"),
    "a factor in a sweep":
        ("{chain}/cocomix --steer=3:2 --steer_sweep", "steer='3:2'", "--steer=17"),
    "steering by a word without a concept":
        ("{chain}/cocomix --steer=qqq:2 --device=cpu", "steer='qqq'", "--find"),
    "the concept model of a run that has none":
        ("{chain}/ntp --model=concept", "has no concepts", "cocomix"),
    "steering without concepts": ("{chain}/ntp --steer=3:2", "has no concepts", "cocomix"),
    "inspecting without concepts": ("{chain}/ntp --inspect", "has no concepts", "cocomix"),
    "a prompt file that is not there": ("{chain}/ntp --start=FILE:{bad}/no", "No such file", "no"),
    "a prompt that is not UTF-8": ("{chain}/ntp --start=FILE:{bad}/latin-prompt.txt", "not UTF-8"),
    "a negative temperature": ("{chain}/ntp --temperature=-1", "temperature='-1'", "at least 0"),
    "a run where an SAE is": ("{chain}/sae", "is an SAE's folder", "out/stdlib/cocomix"),
    "a config file where a run is":
        ("config/stdlib_ntp.py", "unexpected config file", "takes a run"),
    "a flipped bit among the weights": ("{bad}/byte", "can't be read as a checkpoint", "damaged"),
    "a model config that is none": ("{bad}/shape", "not a checkpoint of this kind", "model_config"),
    "heads that do not divide the width": ("{bad}/heads", "n_embd=16", "n_head=7"),
    "a folder as a prompt": ("{chain}/ntp --start=FILE:{bad}", "Is a directory"),
    "no samples": ("{chain}/ntp --num_samples=0", "num_samples='0'", "at least 1"),
    "a run named by nanoGPT's key": ("--out_dir={chain}/ntp", "name the run without a key"),
    "two runs to sample from": ("{chain}/ntp {chain}/cocomix", "unexpected argument", "cocomix"),
    "words without a factor":
        ("{chain}/cocomix --steer=kitchen --device=cpu", "steer='kitchen'", "CONCEPT:FACTOR"),
    "a superscript as a concept":
        ("{chain}/cocomix --steer=²:3 --device=cpu", "steer='²'", "no concept matches"),
    "a concept steered twice": ("{chain}/cocomix --steer=3:1,3:2", "steer='3:2'", "already"),
}

CONCEPTS = {
    "finding a word without a concept":
        ("{chain}/cocomix --find=qqq --device=cpu", "find='qqq'", "a part of one"),
    "concepts of a run that has none": ("{chain}/ntp", "has no concepts", "cocomix"),
    "labels of a run": ("{chain}/cocomix --write_labels", "takes a config file"),
    "labels by an SAE that is not there":
        ("--write_labels {teacher} --block_size=32 --device=cpu --sae={bad}/nowhere", "no SAE at"),
    "a report of a config file":
        ("config/stdlib_sae.py", "config/stdlib_sae.py is for --write_labels", "a run is read"),
    "a report with other labels": ("{chain}/cocomix --attr_k=2", "--attr_k is for --write_labels"),
    "downloading an SAE that is not published":
        ("--download --sae=mine", "sae='mine' is not fetched", "openai"),
    "a picture of norms that are not asked for":
        ("{chain}/cocomix --plot={bad}/x.png", "--weights", "both"),
    "finding in a run without concepts": ("{chain}/ntp --find=a", "has no concepts", "cocomix"),
}

EVAL = {
    "measuring the steering of two runs":
        ("{chain}/cocomix {chain}/ntp --steering", "one run, not 2", "ntp"),
    "measuring the steering of a run without concepts":
        ("{chain}/ntp --steering", "nothing to steer", "cocomix"),
    "no run to evaluate": ("{bad}/nowhere", "no checkpoint at"),
    "a picture of an unknown kind":
        ("{chain}/ntp --plot={bad}/x.docx --device=cpu", "plot=", "docx"),
    "a dataset whose tokenizer has changed":
        ("{bad}/moved --device=cpu", "is not the one that this run", "prepare the dataset with"),
    "an SAE to evaluate": ("{chain}/sae", "is an SAE's folder"),
    "nothing to compare": ("--compare {bad}", "no log at"),
    "a folder as a file of rows":
        ("{chain}/ntp --write={bad} --device=cpu", "is a folder", "name a file"),
    "an unknown task": ("{chain}/ntp --tasks=foo --device=cpu", "foo", "piqa"),
    "an answer that is none of a task's endings":
        ("{chain}/ntp --tasks=piqa --eval_data={bad}/tasks --tokens=100 --device=cpu",
         "number 7 of 2", "piqa"),
    "a task without documents":
        ("{chain}/ntp --tasks=arc_easy --eval_data={bad}/tasks --tokens=100 --device=cpu",
         "arc_easy"),
    "learning curves of an SAE":
        ("--compare {chain}/sae", "no evaluation after the start", "--eval_interval"),
}

SAES = {
    "an SAE that keeps more latents than it has":
        ("{teacher} --n_concepts=4 --k=5 --out_dir={bad}/x", "k=5", "n_concepts=4"),
    "an SAE on the last layer":
        ("--concept_model={chain}/gpt --dataset={dataset} --concept_layer=2 --out_dir={bad}/x",
         "concept_layer=2", "block above"),
    "an SAE over another SAE": ("{teacher} --out_dir={chain}/sae", "holds a run", "--resume"),
    "an SAE in no folder": ("{teacher} --out_dir=", "out_dir is empty", "--out_dir=out/run"),
    "an SAE that overflows":
        ("{teacher} {small} --max_tokens=51200 --learning_rate=1e30 --out_dir={bad}/y",
         "at step 2: not finite", "below 1e+30"),
    "an SAE larger than memory":
        ("{teacher} --n_concepts=99999999999999 --device=cpu --out_dir={bad}/x", "out of memory"),
}

TEXT = {
    "val that is also input":
        ("--input={bad}/tiny.txt --val={bad}/tiny.txt {out}", "both input and val"),
    "a folder without text": ("--input={bad}/short {out}", "expected .txt, .md or .jsonl"),
    "empty input": ("--input={bad}/empty.jsonl --val={bad}/tiny.txt {out}", "too short: 0 train"),
    "no input": ("", "--input", "needed"),
    "no input file": ("--input={bad}/none.txt", "No such file", "none.txt"),
    "an input of another kind": ("--input={bad}/a.csv {out}", "a.csv: expected .txt, .md or"),
    "text that is not UTF-8": ("--input={bad}/latin.txt {out}", "latin.txt is not UTF-8", "0xf6"),
    "JSON without text": ("--input={bad}/bad.jsonl {out}", "bad.jsonl, line 2", "text"),
    "JSON cut short": ("--input={bad}/half.jsonl {out}", "half.jsonl, line 2", "JSON"),
    "a .gz cut short": ("--input={bad}/cut.txt.gz {out}", "cut.txt.gz is damaged"),
    "too short to hold out": ("--input={bad}/tiny.txt {out}", "too short", "--val"),
    "an unknown tokenizer":
        ("--input={bad}/tiny.txt --tokenizer=gpt5 --out={bad}/x",
         "no tokenizer 'gpt5'", "bpe:4096"),
    "a BPE of an impossible size":
        ("--input={bad}/tiny.txt --tokenizer=bpe:99 --out={bad}/x", "bpe:99", "257 to 65536"),
    "JSON nested too deeply":
        ("--input={bad}/deep.jsonl {out}", "deep.jsonl, line 1", "not JSON"),
    "an .xz file that is none": ("--input={bad}/wrong.txt.xz {out}", "wrong.txt.xz is damaged"),
    "a file as a folder for a dataset":
        ("--input={bad}/latin.txt --tokenizer=stdlib --out={dataset}/train.bin/x",
         "Not a directory", "train.bin/x"),
    "a dataset that would be overwritten":
        ("--input={bad}/tiny.txt --tokenizer=stdlib --out={dataset}", "holds a dataset", "--force"),
}

STDLIB = {
    "an argument": ("here", "unexpected argument 'here'"),
    "a BPE too small": ("--train_bpe=12", "train_bpe='12'", "300 to 4096"),
}

HUB = {
    "too few documents": ("--num_docs=3", "num_docs='3'", "at least 21"),
    "a missing source":
        ("--source={bad}/nowhere --out={bad}/x --tokenizer=stdlib",
         "no train-*.parquet under", "nowhere"),
    "a parquet file that is damaged":
        ("--source={bad}/hub --out={bad}/x --tokenizer=stdlib", "can't be read", "--source=FOLDER"),
    "an unknown tokenizer for the hub":
        ("--source={bad}/hub --out={bad}/x --tokenizer=gpt5", "no tokenizer 'gpt5'"),
}

BENCH = {
    "nothing to measure": ("", "name config files", "bench.py config/"),
    "a missing config file": ("config/stdlib_npt.py", "no config file", "stdlib_ntp.py"),
    "the official recipe without its concept loss":
        ("config/cocomix_69m.py --official --concept_weight=0 --device=cpu", "concept_weight=0"),
    "rows for CoCoMix without a CoCoMix config":
        ("config/ntp_69m.py --official --device=cpu", "none among these configs", "CoCoMix"),
    "a width to count that is not divisible":
        ("config/ntp_69m.py --n_embd=17 --count", "n_embd=17", "n_head"),
}

RESULTS = {
    "no experiment": ("{bad}", "name the folder of an experiment", "results/stdlib-ablations"),
    "an experiment without runs": ("{bad}/no-runs", "runs={}", "a dict"),
    "an experiment whose runs are 3": ("{bad}/odd-runs", "runs=3", "a dict"),
    "a row that no run belongs to": ("{bad}/fails --only=b", "only='b'", "there are a"),
    "a command that fails": ("{bad}/fails", "ended with status 1", "RuntimeError: no"),
}

COMMANDS = [(train.main, TRAIN), (sample.main, SAMPLE), (concepts.main, CONCEPTS),
            (evaluation.main, EVAL), (sae.main, SAES), (script("text").main, TEXT),
            (script("stdlib").main, STDLIB), (script("openwebtext").main, HUB),
            (bench.main, BENCH), (experiment.main, RESULTS)]
CASES = [pytest.param(main, arguments, needed, id=f"{main.__module__}: {title}")
         for main, table in COMMANDS for title, (arguments, *needed) in table.items()]
# These are noticed only after the first checkpoint is written.
AFTER_STEP_0 = TRAIN["tokens beyond the vocabulary"][0], TRAIN["a loss that overflows"][0]

def messages(err):
    """The lines on stderr, less the progress bars."""
    lines = err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not re.search(r"\[\d\d:\d\d[<,]", line)]

@pytest.mark.parametrize("main, arguments, needed", CASES)
def test_one_line_says_what_is_wrong(main, arguments, needed, bad, chain, dataset, tmp_path):
    root, data = chain["root"], f"--dataset={dataset}"
    teacher = f"{data} --concept_model={root}/gpt --concept_layer=1"
    filled = arguments.format(
        bad=bad, chain=root, dataset=dataset, data=data, teacher=teacher, small=" ".join(TINY_SAE),
        out=f"--tokenizer=stdlib --out={bad}/x",
        cocomix=f"--method=cocomix {teacher} --sae={root}/sae")
    defaults = [*TINY, f"--out_dir={tmp_path / 'out'}"] if main is train.main else []
    status, out, err = run(main, *defaults, *filled.split())
    assert status == 1, (status, out, err)
    line, = messages(err)
    assert line.startswith("error: ") and all(text in line for text in needed), line
    if arguments not in AFTER_STEP_0:
        assert not (tmp_path / "out" / "ckpt.pt").exists()
    assert not any((bad / name).exists() for name in ("x/meta.json", "x/sae.pt", "ran"))

def test_debug_shows_the_traceback(chain):
    with pytest.raises(UserError):
        run(sample.main, f"{chain['root']}/nowhere", "--debug")

def test_a_real_process_prints_no_traceback():
    process = subprocess.run([sys.executable, str(ROOT / "train.py"), "--n_layer=two"],
                             capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == ""
    assert len(process.stderr.strip().splitlines()) == 1

def test_without_a_network_the_place_for_the_sae_is_named(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setenv("COCOMIX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="can't be fetched .* by hand as .*sae-openai-layer5.pt"):
        sae.load_sae("openai", 5, 768)

@pytest.mark.parametrize("home", ["none", "read-only"])
def test_without_a_home_the_sae_needs_another_folder(tmp_path, monkeypatch, home):
    """As in a container whose user has no entry in /etc/passwd."""
    monkeypatch.delenv("COCOMIX_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/proc/self")  # where nothing can be written
    if home == "none":
        def no_home():
            raise RuntimeError("Could not determine home directory.")
        monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="set COCOMIX_CACHE to"):
        sae.load_sae("openai", 5, 768)
    if home == "none":  # no home is needed then
        monkeypatch.setenv("COCOMIX_CACHE", str(tmp_path))
        (tmp_path / "sae-openai-layer5.pt").touch()
        with pytest.raises(UserError, match="can't be read as an SAE"):
            sae.load_sae("openai", 5, 768)

@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_line(dataset, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *TINY, f"--dataset={dataset}",
               f"--out_dir={tmp_path}", "--compile=true"]
    env = os.environ | dict(CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c"))
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    line, = messages(process.stderr)
    assert process.returncode == 1 and line.startswith("error: torch.compile failed (")
    assert "C++ compiler" in line and "--compile=false" in line

LIMITED = """
import resource, signal, sys
sys.path.insert(0, {root!r})
from support import runtime
import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
runtime.run(train.main)
"""

@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_keeps_the_last_good_checkpoint(dataset, tmp_path, what):
    """The process may write files up to a size; beyond it, writing fails as on a full disk."""
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    assert run(train.main, *argv)[0] == 0
    # half of a checkpoint is enough for step 0, which has no optimizer state yet
    limit = (tmp_path / "ckpt.pt").stat().st_size // 2 if what == "checkpoint" else 100
    code = LIMITED.format(root=str(ROOT), limit=limit)
    process = subprocess.run([sys.executable, "-c", code, *argv, "--overwrite"],
                             capture_output=True, text=True)
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1 and "error: " in last, process.stderr
    assert "Traceback" not in process.stderr
    assert load_checkpoint(tmp_path)["step"] == (0 if what == "checkpoint" else 8)
    assert not list(tmp_path.glob("*.tmp"))

def test_a_folder_that_cannot_be_created(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    out = f"--out_dir={tmp_path / 'file' / 'run'}"
    status, _, err = run(train.main, *TINY, f"--dataset={dataset}", out)
    line, = err.strip().splitlines()
    assert status == 1 and "can't be made" in line and "--out_dir" in line
