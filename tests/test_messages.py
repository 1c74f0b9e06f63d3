"""What a person can do wrong ends in one line that says what, with which value, and the remedy: status 1, no
traceback, nothing written. One table for all commands, run in this process."""
import errno
import gzip
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import concepts
import eval as evaluation
import sae
import sample
import train
from conftest import TINY, run
from model import load_checkpoint
from sae import SAE

ROOT = Path(train.__file__).resolve().parent


def main_of(path):
    """The main of a script that lies in a folder of its own."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


text_main, stdlib_main, hub_main, results_main = map(main_of, ("data/text/prepare.py", "data/stdlib/prepare.py", "data/openwebtext/prepare.py", "results/run.py"))


@pytest.fixture(scope="module")
def bad(tmp_path_factory, chain, dataset):
    """Broken things to point the commands at."""
    f = tmp_path_factory.mktemp("bad")
    shutil.copytree(dataset, f / "short")
    with open(f / "short/train.bin", "r+b") as file:
        file.truncate(101)
    shutil.copytree(dataset, f / "beyond")
    np.full(20_000, 60_000, dtype="<u2").tofile(f / "beyond/train.bin")
    shutil.copytree(dataset, f / "big")
    meta = json.loads((f / "big/meta.json").read_text())
    (f / "big/meta.json").write_text(json.dumps(meta | dict(vocab_size=70_000)))
    shutil.copytree(dataset, f / "other")
    (f / "other/meta.json").write_text(json.dumps(meta | dict(tokenizer="stdlib", tokenizer_hash="another")))
    torch.save(SAE(24, 48, 6).published(), f / "wide.pt")
    torch.save({"a": 1}, f / "not.pt")
    for name in ("cut", "flipped", "pickle", "weights"):
        (f / name).mkdir()
    whole = (Path(chain["ntp"]) / "ckpt.pt").read_bytes()
    (f / "cut/ckpt.pt").write_bytes(whole[:len(whole) // 2])
    (f / "flipped/ckpt.pt").write_bytes(b"\0" * 64 + whole[64:])
    content = torch.load(Path(chain["ntp"]) / "ckpt.pt", weights_only=True)
    content["model"]["wpe.weight"] = content["model"]["wpe.weight"][:5]
    torch.save(content, f / "weights/ckpt.pt")

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {f / 'ran'}",)
    torch.save({"model": Runs(), "model_config": {}}, f / "pickle/ckpt.pt")
    (f / "latin.txt").write_bytes("größer".encode("latin-1"))
    (f / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (f / "half.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    (f / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:2000])
    (f / "tiny.txt").write_text("short")
    (f / "empty.jsonl").write_text("")
    (f / "moved").mkdir()
    content = torch.load(Path(chain["ntp"]) / "ckpt.pt", weights_only=True)
    content["train_config"]["dataset"] = str(f / "other")
    torch.save(content, f / "moved/ckpt.pt")
    (f / "a.csv").write_text("a,b")
    (f / "raises.py").write_text("raise RuntimeError('no')")
    (f / "latin-prompt.txt").write_bytes(b"\xff\xfe\xfa")

    for name, changes in (("list", None), ("words", dict(vocab_size="many")), ("nothing", dict(train_tokens=0))):
        shutil.copytree(dataset, f / name)
        (f / name / "meta.json").write_text(json.dumps(meta | changes if changes else [1]))
    (f / "nothing/train.bin").write_bytes(b"")
    shutil.copytree(dataset, f / "odd")
    with open(f / "odd/val.bin", "ab") as file:
        file.write(b"x")
    published = torch.load(Path(chain["sae"]) / "sae.pt", weights_only=True)
    torch.save(published | {"encoder.weight": published["encoder.weight"] * torch.nan}, f / "nan.pt")
    torch.save(published | {"activation": "ReLU"}, f / "relu.pt")
    torch.save(published | {"activation_state_dict": {"k": 0}}, f / "none.pt")
    torch.save(torch.zeros(3), f / "tensor.pt")
    torch.save({"wte.weight": torch.zeros(100, 64)}, f / "half.bin")
    shutil.copytree(chain["sae"], f / "sae-list")
    (f / "sae-list/sae.json").write_text("[]")
    run_of = torch.load(Path(chain["cocomix"]) / "ckpt.pt", weights_only=True)
    for name, changes in (("optimizer", dict(optimizer={}, step=4)), ("step", dict(step="four")), ("shape", dict(model_config=3)), ("heads", dict(model_config=run_of["model_config"] | dict(n_head=7))),
                          ("tokenizer", dict(tokenizer="gone.tiktoken"))):
        (f / name).mkdir()
        torch.save(run_of | changes, f / name / "ckpt.pt")
    (f / "byte").mkdir()
    whole = bytearray((Path(chain["ntp"]) / "ckpt.pt").read_bytes())
    whole[len(whole) // 2] ^= 4
    (f / "byte/ckpt.pt").write_bytes(whole)
    for name, text in (("value", "n_layer = [1, 2]"), ("key", "n_layers = 3"), ("syntax", "a = ("), ("zero", "n_layer = 10 ** 400"), ("nul", "out_dir = 'a\\0b'")):
        (f / f"{name}.py").write_text(text)
    (f / "tasks").mkdir()
    (f / "tasks/piqa.jsonl").write_text(json.dumps(dict(goal="a", sol1="b", sol2="c", label=7)) + "\n")
    (f / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (f / "wrong.txt.xz").write_text("hello")
    (f / "hub").mkdir()
    (f / "hub/train-0.parquet").write_text("x")
    for name, text in (("no-runs", "out = 'x'"), ("odd-runs", "out, runs = 'x', 3"), ("fails", f"out, runs = {str(f / 'x')!r}, dict(a={str(f / 'raises.py')!r})")):
        (f / name).mkdir()
        (f / name / "experiment.py").write_text(text)
    return f


TABLE = {  # what is wrong: (command, arguments, what the line must say)
    "no data yet": (train.main, "--dataset=openwebtext2", "no dataset 'openwebtext2'", "prepare.py"),
    "data not prepared": (train.main, "--dataset={bad}/none", "no dataset", "data/text/prepare.py"),
    "a .bin cut short": (train.main, "--dataset={bad}/short", "train.bin has 101 bytes", "prepare the dataset again"),
    "tokens beyond the vocabulary": (train.main, "--dataset={bad}/beyond", "token 60000", "vocabulary of 257"),
    "a vocabulary over 65536": (train.main, "--dataset={bad}/big", "vocab_size=70000", "65536"),
    "a block larger than the data": (train.main, "--dataset={dataset} --block_size=9000", "block_size=9000", "needs 18000"),
    "width not divisible": (train.main, "--dataset={dataset} --n_embd=17", "n_embd=17", "n_head=2"),
    "insertion outside the stack": (train.main, "--dataset={dataset} --method=pause --insert_layer=3", "insert_layer=3", "0 to 2"),
    "more concepts kept than there are": (train.main, "{cocomix} --concept_k=49", "concept_k=49", "48"),
    "more labels than active concepts": (train.main, "{cocomix} --attr_k=7", "attr_k=7", "6"),
    "an SAE of another width": (train.main, "{cocomix} --sae={bad}/wide.pt", "width 24", "have 16"),
    "an SAE of another layer": (train.main, "{cocomix} --concept_layer=0", "layer 1", "--concept_layer=1"),
    "a layer the concept model lacks": (train.main, "{cocomix} --concept_layer=5", "concept_layer=5", "3 blocks"),
    "an SAE of another concept model": (train.main, "{cocomix} --concept_model={chain}/ntp", "another concept model", "sae.py"),
    "no SAE there": (train.main, "{cocomix} --sae={bad}/nowhere", "no SAE at", "sae.py"),
    "a file that is no SAE": (train.main, "{cocomix} --sae={bad}/not.pt", "not.pt is not an SAE", ""),
    "a text file as an SAE": (train.main, "{cocomix} --sae={bad}/tiny.txt", "can't be read as an SAE", ""),
    "no concept model there": (train.main, "{cocomix} --concept_model={bad}/nowhere", "no checkpoint at", "nowhere"),
    "another tokenizer": (train.main, "{cocomix} --dataset={bad}/other", "another tokenizer", "'stdlib'"),
    "a block over the concept model's": (train.main, "{cocomix} --block_size=64", "block_size=64", "32"),
    "an unknown key": (train.main, "--learningrate=3", "unknown key 'learningrate'", "'learning_rate'"),
    "a wrong type": (train.main, "--n_layer=two", "n_layer='two'", "an integer"),
    "an unknown method": (train.main, "--method=npt", "method='npt'", "cocomix"),
    "an unknown device": (train.main, "--dataset={dataset} --device=tpu", "device='tpu'", "not available"),
    "no config file": (train.main, "config/stdlib_npt.py", "no config file", "stdlib_ntp.py"),
    "a config file that raises": (train.main, "{bad}/raises.py", "does not run", "RuntimeError: no"),
    "two positional arguments": (train.main, "out/a", "unexpected argument 'out/a'", ".py"),
    "resuming a damaged checkpoint": (train.main, "--dataset={dataset} --out_dir={bad}/cut --resume", "can't be read as a checkpoint", "cut short"),
    "no checkpoint": (sample.main, "{bad}/nowhere", "no checkpoint at", "train it first"),
    "a checkpoint cut short": (sample.main, "{bad}/cut", "can't be read as a checkpoint", "cut short"),
    "a checkpoint with flipped bytes": (sample.main, "{bad}/flipped", "can't be read as a checkpoint", "damaged"),
    "a pickle that would run code": (sample.main, "{bad}/pickle", "can't be read as a checkpoint", ""),
    "weights that don't fit": (sample.main, "{bad}/weights", "don't fit", "wpe"),
    "a file that is no checkpoint": (sample.main, "{bad}/not.pt", "is not a checkpoint", ""),
    "a concept that does not exist": (sample.main, "{chain}/cocomix --steer=48:2", "steer='48:2'", "0 to 47"),
    "a negative concept": (sample.main, "{chain}/cocomix --steer=-1:2", "steer='-1:2'", "0 to 47"),
    "a factor that is NaN": (sample.main, "{chain}/cocomix --steer=3:nan", "steer='3:nan'", "-1000 to 1000"),
    "a factor that is huge": (sample.main, "{chain}/cocomix --steer 3:1e30", "steer='3:1e30'", "-1000 to 1000"),
    "a factor that is none": (sample.main, "{chain}/cocomix --steer=3", "steer='3'", "CONCEPT:FACTOR"),
    "a factor in a sweep": (sample.main, "{chain}/cocomix --steer=3:2 --steer_sweep", "steer='3:2'", "--steer=17"),
    "a word that no concept goes with": (sample.main, "{chain}/cocomix --steer=qqq:2 --device=cpu", "steer='qqq'", "--find"),
    "finding what no concept stands with": (concepts.main, "{chain}/cocomix --find=qqq --device=cpu", "find='qqq'", "a part of one"),
    "the concept model of a run without": (sample.main, "{chain}/ntp --model=concept", "has no concepts", "cocomix"),
    "measuring the steering of two runs": (evaluation.main, "{chain}/cocomix {chain}/ntp --steering", "one run, not 2", "ntp"),
    "measuring the steering of a run without concepts": (evaluation.main, "{chain}/ntp --steering", "nothing to steer", "cocomix"),
    "steering without concepts": (sample.main, "{chain}/ntp --steer=3:2", "has no concepts", "cocomix"),
    "inspecting without concepts": (sample.main, "{chain}/ntp --inspect", "has no concepts", "cocomix"),
    "a prompt file that is not there": (sample.main, "{chain}/ntp --start=FILE:{bad}/no", "No such file", "no"),
    "a prompt that is not UTF-8": (sample.main, "{chain}/ntp --start=FILE:{bad}/latin-prompt.txt", "not UTF-8", ""),
    "a negative temperature": (sample.main, "{chain}/ntp --temperature=-1", "temperature='-1'", "at least 0"),
    "no run to evaluate": (evaluation.main, "{bad}/nowhere", "no checkpoint at", ""),
    "a picture of an unknown kind": (evaluation.main, "{chain}/ntp --plot={bad}/x.docx --device=cpu", "plot=", "docx"),
    "concepts of a run without": (concepts.main, "{chain}/ntp", "has no concepts", "cocomix"),
    "an SAE of more kept than latents": (sae.main, "--concept_model={chain}/gpt --dataset={dataset} --concept_layer=1 --n_concepts=4 --k=5 --out_dir={bad}/x", "k=5", "n_concepts=4"),
    "an SAE on a layer that is not there": (sae.main, "--concept_model={chain}/gpt --dataset={dataset} --concept_layer=2 --out_dir={bad}/x", "concept_layer=2", "block above"),
    "an SAE over another SAE": (sae.main, "--concept_model={chain}/gpt --dataset={dataset} --concept_layer=1 --out_dir={chain}/sae", "holds an SAE run", "--resume"),
    "a dataset prepared anew with another tokenizer": (evaluation.main, "{bad}/moved --device=cpu", "another tokenizer now", "prepare it as it was"),
    "a run where an SAE is": (sample.main, "{chain}/sae", "is an SAE's folder", "out/stdlib/cocomix"),
    "a config file where a run is": (sample.main, "config/stdlib_ntp.py", "unexpected config file", "takes a run"),
    "one dash": (train.main, "-seed=3", "unexpected argument '-seed=3'", "--seed=3"),
    "a device that computes nothing": (train.main, "--dataset={dataset} --device=meta", "device='meta'", "cpu, cuda or mps"),
    "no folder": (train.main, "--dataset={dataset} --out_dir=", "out_dir is empty", "--out_dir=out/run"),
    "a rate that would rise": (train.main, "--dataset={dataset} --min_lr=1", "min_lr=1.0 is over learning_rate=0.001", ""),
    "resume and overwrite": (train.main, "--dataset={dataset} --resume --overwrite", "exclude each other", ""),
    "pause vectors that are not inserted": (train.main, "--dataset={dataset} --method=pause --mix=none", "insert nothing", "method='ntp'"),
    "more memory than there is": (train.main, "--dataset={dataset} --n_embd=1099511627776", "out of memory", "--micro_batch_size"),
    "a loss that overflows": (train.main, "--dataset={dataset} --learning_rate=1e30 --grad_clip=0", "not finite", "learning_rate below"),
    "a GPT-2 that is not fetched by name": (train.main, "--dataset={dataset} --method=cocomix --concept_model=gpt2-xl", "only gpt2 is fetched", ""),
    "a seed too large": (train.main, "--seed=99999999999999999999", "seed=", "4294967295"),
    "val that is also input": (text_main, "--input={bad}/tiny.txt --val={bad}/tiny.txt --tokenizer=stdlib --out={bad}/x", "both input and val", ""),
    "a folder as input": (text_main, "--input={bad} --tokenizer=stdlib --out={bad}/x", "is a folder", "*.txt"),
    "empty input": (text_main, "--input={bad}/empty.jsonl --val={bad}/tiny.txt --tokenizer=stdlib --out={bad}/x", "holds no text", ""),
    "no input": (text_main, "", "--input", "needed"),
    "no input file": (text_main, "--input={bad}/none.txt", "no input file", "none.txt"),
    "an input of another kind": (text_main, "--input={bad}/a.csv --tokenizer=stdlib --out={bad}/x", "expected .txt or .jsonl", "a.csv"),
    "text that is not UTF-8": (text_main, "--input={bad}/latin.txt --tokenizer=stdlib --out={bad}/x", "latin.txt is not UTF-8", "0xf6"),
    "JSON without text": (text_main, "--input={bad}/bad.jsonl --tokenizer=stdlib --out={bad}/x", "bad.jsonl, line 2", "text"),
    "JSON cut short": (text_main, "--input={bad}/half.jsonl --tokenizer=stdlib --out={bad}/x", "half.jsonl, line 2", "JSON"),
    "a .gz cut short": (text_main, "--input={bad}/cut.txt.gz --tokenizer=stdlib --out={bad}/x", "cut.txt.gz is damaged", ""),
    "too short to hold out": (text_main, "--input={bad}/tiny.txt --tokenizer=stdlib --out={bad}/x", "too short", "--val"),
    "an unknown tokenizer": (text_main, "--input={bad}/tiny.txt --tokenizer=gpt5 --out={bad}/x", "no tokenizer 'gpt5'", "bpe:4096"),
    "a BPE of an impossible size": (text_main, "--input={bad}/tiny.txt --tokenizer=bpe:99 --out={bad}/x", "bpe:99", "257 to 65536"),
    "white space too deep in JSON": (text_main, "--input={bad}/deep.jsonl --tokenizer=stdlib --out={bad}/x", "deep.jsonl, line 1", "RecursionError"),
    "an .xz that is none": (text_main, "--input={bad}/wrong.txt.xz --tokenizer=stdlib --out={bad}/x", "wrong.txt.xz is damaged", ""),
    "a file where a dataset goes": (text_main, "--input={bad}/latin.txt --tokenizer=stdlib --out={dataset}/train.bin/x", "Not a directory", "train.bin/x"),
    "an argument to a prepare": (stdlib_main, "here", "unexpected argument 'here'", ""),
    "a BPE too small": (stdlib_main, "--train_bpe=12", "train_bpe='12'", "300 to 4096"),
    "too few documents": (hub_main, "--num_docs=3", "num_docs='3'", "at least 100"),
    "no such source": (hub_main, "--source={bad}/nowhere --out={bad}/x --tokenizer=stdlib", "no train-*.parquet under", "nowhere"),
    "a parquet file that is none": (hub_main, "--source={bad}/hub --out={bad}/x --tokenizer=stdlib", "can't be read", "--source=FOLDER"),
    "an unknown tokenizer for the hub": (hub_main, "--source={bad}/hub --out={bad}/x --tokenizer=gpt5", "no tokenizer 'gpt5'", ""),
    "meta.json that is a list": (train.main, "--dataset={bad}/list", "meta.json is damaged", "prepare the dataset again"),
    "meta.json with words for numbers": (train.main, "--dataset={bad}/words", "vocab_size='many'", "prepare the dataset again"),
    "an empty .bin": (train.main, "--dataset={bad}/nothing", "train.bin has 0 bytes", "prepare the dataset again"),
    "a .bin of odd size": (train.main, "--dataset={bad}/odd", "val.bin has 8001 bytes", "8000"),
    "a file as a dataset": (train.main, "--dataset={dataset}/train.bin", "no dataset", "--input FILES"),
    "a folder where nothing can be written": (train.main, "--dataset={dataset} --out_dir=/proc/self", "can't be written", "another folder"),
    "a file as out_dir": (train.main, "--dataset={dataset} --out_dir={dataset}/train.bin", "can't be made", "--out_dir"),
    "more layers than any": (train.main, "--n_layer=1000000000", "n_layer='1000000000'", "from 1 to 1000"),
    "a batch larger than any": (train.main, "--batch_size=1e12", "batch_size='1e12'", "1000000"),
    "half a micro batch": (train.main, "--micro_batch_size=half", "micro_batch_size='half'", "auto"),
    "a rate that is NaN": (train.main, "--learning_rate=nan", "learning_rate='nan'", "a number"),
    "a fraction of a seed": (train.main, "--seed=1.5", "seed='1.5'", "an integer"),
    "all dropped": (train.main, "--dropout=1", "dropout='1'", "0.99"),
    "a key without value": (train.main, "--n_layer --n_head=2", "--n_layer needs", "an integer"),
    "a config file with a list": (train.main, "{bad}/value.py", "n_layer=[1, 2]", "an integer"),
    "a config file with an unknown key": (train.main, "{bad}/key.py", "unknown key 'n_layers'", "'n_layer'"),
    "a config file that is no Python": (train.main, "{bad}/syntax.py", "does not run", "line 1"),
    "a number beyond all": (train.main, "{bad}/zero.py", "n_layer=1000", "from 1 to 1000"),
    "a path with a null byte": (train.main, "{bad}/nul.py", "out_dir='a", "text"),
    "a config file of another script": (train.main, "config/stdlib_sae.py", "another script's", "n_concepts, k, k_aux"),
    "an SAE of weights that are NaN": (train.main, "{cocomix} --sae={bad}/nan.pt", "not finite", "train it again"),
    "an SAE of another kind": (train.main, "{cocomix} --sae={bad}/relu.pt", "a ReLU autoencoder", "only TopK"),
    "an SAE that keeps none": (train.main, "{cocomix} --sae={bad}/none.pt", "k=0 of 48", ""),
    "a tensor as an SAE": (train.main, "{cocomix} --sae={bad}/tensor.pt", "not an SAE", "Tensor"),
    "a checkpoint as an SAE": (train.main, "{cocomix} --sae={chain}/ntp/ckpt.pt", "not an SAE", ""),
    "a damaged sae.json": (train.main, "{cocomix} --sae={bad}/sae-list", "sae.json is damaged", "train the SAE again"),
    "the published SAE for another model": (train.main, "{cocomix} --sae=openai --concept_layer=12", "concept_layer=12", "3 blocks"),
    "an SAE as concept model": (train.main, "{cocomix} --concept_model={chain}/sae", "is an SAE's folder", "name the run"),
    "half of GPT-2": (train.main, "{cocomix} --concept_model={bad}/half.bin", "not GPT-2's weights", ""),
    "labels that were not written": (train.main, "{cocomix} --labels=disk --shift_blocks=false", "no labels at", "--write_labels"),
    "labels from disk for shifted blocks": (train.main, "{cocomix} --labels=disk", "--shift_blocks=false", ""),
    "labels from disk without concepts": (train.main, "--dataset={dataset} --labels=disk --shift_blocks=false", "labels='disk'", "method='ntp'"),
    "resuming a run of another shape": (train.main, "--dataset={dataset} --out_dir={chain}/ntp --seed=1 --resume --n_embd=32", "n_embd=16", "take it back"),
    "resuming without optimizer": (train.main, "{cocomix} --seed=1 --out_dir={bad}/optimizer --resume", "the optimizer's state", "--overwrite"),
    "resuming at a step that is text": (train.main, "{cocomix} --seed=1 --out_dir={bad}/step --resume", "not a checkpoint of this kind", "step"),
    "a flipped bit among the weights": (sample.main, "{bad}/byte", "can't be read as a checkpoint", "damaged"),
    "a model config that is none": (sample.main, "{bad}/shape", "not a checkpoint of this kind", "model_config"),
    "heads that don't divide the width": (sample.main, "{bad}/heads", "n_embd=16", "n_head=7"),
    "a tokenizer that is gone": (sample.main, "{bad}/tokenizer", "no tokenizer 'gone.tiktoken'", ""),
    "a folder as a prompt": (sample.main, "{chain}/ntp --start=FILE:{bad}", "Is a directory", ""),
    "no sample": (sample.main, "{chain}/ntp --num_samples=0", "num_samples='0'", "at least 1"),
    "two runs to sample from": (sample.main, "{chain}/ntp {chain}/cocomix", "unexpected argument", "cocomix"),
    "an SAE to evaluate": (evaluation.main, "{chain}/sae", "is an SAE's folder", ""),
    "nothing to compare": (evaluation.main, "--compare {bad}", "no log at", ""),
    "rows into a folder": (evaluation.main, "{chain}/ntp --write={bad} --device=cpu", "is a folder", "name a file"),
    "labels of a run": (concepts.main, "{chain}/cocomix --write_labels", "takes a config file", ""),
    "labels by an SAE that is not there": (concepts.main, "--write_labels --dataset={dataset} --concept_model={chain}/gpt --concept_layer=1 --block_size=32 --device=cpu --sae={bad}/nowhere", "no SAE at", ""),
    "a report of a config file": (concepts.main, "config/stdlib_sae.py", "config/stdlib_sae.py is for --write_labels", "of a run"),
    "a report with other labels": (concepts.main, "{chain}/cocomix --attr_k=2", "--attr_k is for --write_labels", ""),
    "fetching one's own SAE": (concepts.main, "--download --sae=mine", "sae='mine' is not fetched", "openai"),
    "words without a factor": (sample.main, "{chain}/cocomix --steer=kitchen --device=cpu", "steer='kitchen'", "CONCEPT:FACTOR"),
    "a superscript as a concept": (sample.main, "{chain}/cocomix --steer=²:3 --device=cpu", "steer='²'", "no concept goes with it"),
    "a concept steered twice": (sample.main, "{chain}/cocomix --steer=3:1,3:2", "steer='3:2'", "already"),
    "a picture of what is not asked for": (concepts.main, "{chain}/cocomix --plot={bad}/x.png", "--weights", "both"),
    "finding in a run without concepts": (concepts.main, "{chain}/ntp --find=a", "has no concepts", "cocomix"),
    "an unknown task": (evaluation.main, "{chain}/ntp --tasks=foo --device=cpu", "foo", "piqa"),
    "a task's answer that is none of its endings": (evaluation.main, "{chain}/ntp --tasks=piqa --eval_data={bad}/tasks --tokens=100 --device=cpu", "number 7 of 2", "piqa"),
    "a task that is not there": (evaluation.main, "{chain}/ntp --tasks=arc_easy --eval_data={bad}/tasks --tokens=100 --device=cpu", "arc_easy", ""),
    "a dataset for a run": (evaluation.main, "{chain}/ntp --dataset={dataset}", "--dataset is for --model", "its own"),
    "the course of an SAE": (evaluation.main, "--compare {chain}/sae", "no evaluation after the start", "--eval_interval"),
    "an SAE in no folder": (sae.main, "--concept_model={chain}/gpt --dataset={dataset} --concept_layer=1 --out_dir=", "out_dir is empty", "--out_dir=out/sae"),
    "an SAE that overflows": (sae.main, "--concept_model={chain}/gpt --dataset={dataset} --concept_layer=1 --n_concepts=48 --k=6 --batch_size=256 --max_tokens=51200 --learning_rate=1e30 --device=cpu --out_dir={bad}/y", "at step 2: not finite", "below 1e+30"),
    "an SAE of more memory than there is": (sae.main, "--concept_model={chain}/gpt --dataset={dataset} --concept_layer=1 --n_concepts=99999999999999 --device=cpu --out_dir={bad}/x", "out of memory", ""),
    "nothing to measure": (bench.main, "", "name config files", "bench.py config/"),
    "a config file that is not there to measure": (bench.main, "config/stdlib_npt.py", "no config file", "stdlib_ntp.py"),
    "the official recipe without its concept loss": (bench.main, "config/cocomix_69m.py --official --concept_weight=0 --device=cpu", "concept_weight=0", ""),
    "rows of CoCoMix without one": (bench.main, "config/ntp_69m.py --official --device=cpu", "none among these configs", "CoCoMix"),
    "a row that is not there": (bench.main, "config/stdlib_ntp.py --only_row=7 --device=cpu", "only_row=7", "0 to 0"),
    "a width to count that is not divisible": (bench.main, "config/ntp_69m.py --n_embd=17 --count", "n_embd=17", "n_head"),
    "no experiment": (results_main, "{bad}", "name the folder of an experiment", "results/stdlib-ablations"),
    "an experiment without runs": (results_main, "{bad}/no-runs", "runs={}", "a dict"),
    "an experiment of 3": (results_main, "{bad}/odd-runs", "runs=3", "a dict"),
    "rows that are not there": (results_main, "{bad}/fails --only=b", "only='b'", "there are a"),
    "a command that fails": (results_main, "{bad}/fails", "ended with status 1", "RuntimeError: no"),
    "a dataset in the way": (text_main, "--input={bad}/tiny.txt --tokenizer=stdlib --out={dataset}", "holds a dataset", "--force"),
}


@pytest.mark.parametrize("case", TABLE)
def test_one_line(case, bad, chain, dataset, tmp_path):
    main, arguments, *needed = TABLE[case]
    fill = dict(bad=bad, chain=chain["root"], dataset=dataset, cocomix=f"--dataset={dataset} --method=cocomix --concept_model={chain['gpt']} --sae={chain['sae']}")
    argv = [part.format(**{k: v for k, v in fill.items() if k != "cocomix"}) for part in arguments.replace("{cocomix}", fill["cocomix"]).split()]
    if main is train.main:
        argv = [*TINY, f"--out_dir={tmp_path / 'out'}", *argv]
    status, out, err = run(main, *argv)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and not re.search(r"\[\d\d:\d\d[<,]", line)]  # less the progress bars
    assert status == 1, (status, out, err)
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(text in lines[0] for text in needed), lines[0]
    if case not in ("tokens beyond the vocabulary", "a loss that overflows"):  # seen only after the first checkpoint
        assert not (tmp_path / "out" / "ckpt.pt").exists()
    assert not (bad / "x" / "meta.json").exists() and not (bad / "x" / "sae.pt").exists() and not (bad / "ran").exists()


def test_debug_shows_the_traceback(chain):
    with pytest.raises(train.UserError):
        run(sample.main, f"{chain['root']}/nowhere", "--debug")


def test_a_real_process_prints_no_traceback():
    process = subprocess.run([sys.executable, str(ROOT / "train.py"), "--n_layer=two"], capture_output=True, text=True)
    assert process.returncode == 1 and len(process.stderr.strip().splitlines()) == 1 and process.stdout == ""


def test_no_network(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setenv("COCOMIX_CACHE", str(tmp_path))
    with pytest.raises(train.UserError, match="can't be fetched .* by hand as .*sae-openai-layer5.pt"):
        sae.load_sae("openai", 5, 768)


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_keeps_the_last_good_checkpoint(chain, dataset, tmp_path, what):
    """The process may write files of so many bytes at most: writing more fails as it does on a full disk."""
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    assert run(train.main, *argv, "--max_iters=8")[0] == 0
    size = (tmp_path / "ckpt.pt").stat().st_size
    limit = size // 2 if what == "checkpoint" else 100  # half is enough for step 0, which has no optimizer state yet
    code = (f"import resource, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import config, train; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); config.run(train.main)")
    process = subprocess.run([sys.executable, "-c", code, *argv, "--overwrite"], capture_output=True, text=True)
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1 and "error: " in last and "Traceback" not in process.stderr, process.stderr
    assert load_checkpoint(tmp_path)["step"] == (0 if what == "checkpoint" else 8) and not list(tmp_path.glob("*.tmp"))


def test_a_read_only_folder(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run(train.main, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'file' / 'run'}")
    assert status == 1 and "can't be made" in err and "--out_dir" in err and len(err.strip().splitlines()) == 1
