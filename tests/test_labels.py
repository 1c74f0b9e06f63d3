"""Label files: equal to labels computed while training, resumable, refused if they do not fit."""
import json
import shutil

from support.runtime import UserError

import numpy as np
import pytest
import torch
from conftest import TINY, StopAt, run

import concepts
import train
from support.labels import HEADER, open_labels, write_labels
from support.log import read_log
from support.prepare import locked
from support.tokens import load_tokens

CPU = torch.device("cpu")

@pytest.fixture
def own_dataset(dataset, tmp_path):  # label files are written next to the data
    return shutil.copytree(dataset, tmp_path / "data")

def label_keys(chain, dataset):
    return dict(dataset=str(dataset), block_size=32, concept_model=chain["gpt"], sae=chain["sae"],
                concept_layer=1, device="cpu")

def arguments(chain, dataset, *more):
    return [f"--{name}={value}" for name, value in label_keys(chain, dataset).items()] + [*more]

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

@pytest.mark.parametrize("choice", [["--select=activation", "--attr_k=3"],
                                    ["--attribution_sign=abs"]], ids=" ".join)
def test_training_on_stored_labels_equals_training_on_the_fly(
        chain, own_dataset, tmp_path, double, choice):
    keys = arguments(chain, own_dataset, *choice)

    def log(name, *more):
        status, _, err = run(train.main, *TINY, *keys, "--method=cocomix", "--shift_blocks=false",
                             f"--out_dir={tmp_path / name}", *more)
        assert status == 0, err
        return read_log(tmp_path / name / "log.jsonl")

    assert run(concepts.main, "--write_labels", *keys)[0] == 0
    disk, fly = log("disk", "--labels=disk"), log("fly")
    compared = {"loss", "concept_loss", "val_loss", "val_concept_loss", "grad_norm"}
    for a, b in zip(disk, fly, strict=True):
        for name in compared & {*a, *b}:
            assert a[name] == b[name]
    assert disk[0]["concept_flops_per_token"] == fly[0]["concept_flops_per_token"] > 0
    kd = log("kd", "--labels=disk", "--method=cocomix_kd", "--kd_weight=0")
    assert kd[-1]["val_loss"] == pytest.approx(fly[-1]["val_loss"], abs=1e-6)

def test_stored_labels_are_those_of_every_unshifted_block_and_writing_resumes(
        chain, own_dataset, monkeypatch):
    keys = concepts.Config(**label_keys(chain, own_dataset))
    concept_model, _ = concepts.load_concept_model(keys, CPU)
    tokens = np.array(load_tokens(own_dataset, "train")).astype(int)
    path = write_labels(concept_model, keys, 257, CPU)
    stored = np.array(open_labels(concept_model, keys))
    assert stored.shape == ((len(tokens) - 1) // 32, 32, 4)
    assert stored.dtype == np.uint16 and stored.max() < 48
    x, y = torch.tensor(tokens[320:352])[None], torch.tensor(tokens[321:353])[None]
    assert np.array_equal(stored[10], concept_model.labels(x, y)[0])

    content, part = path.read_bytes(), path.with_suffix(".part")
    path.unlink()
    calls, labels = [], concept_model.labels

    def interrupted(x, y):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return labels(x, y)

    monkeypatch.setattr(concept_model, "labels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_labels(concept_model, keys, 257, CPU)
    with open(part, "ab") as file:
        file.write(b"half a row")
    write_labels(concept_model, keys, 257, CPU)
    # 3 calls with up to 8192 tokens, the second one twice, and one for the last block that is there
    assert len(calls) == 5
    assert path.read_bytes() == content and not part.exists()

@pytest.fixture
def written(chain, own_dataset):
    """(concept model, keys, label file) of labels that are written."""
    keys = concepts.Config(**label_keys(chain, own_dataset))
    concept_model, _ = concepts.load_concept_model(keys, CPU)
    return concept_model, keys, write_labels(concept_model, keys, 257, CPU)

def test_a_crash_that_leaves_zeros_is_noticed(written):
    concept_model, keys, path = written
    content, part = path.read_bytes(), path.with_suffix(".part")
    path.unlink()
    header = json.loads(content[:HEADER])
    del header["labels"]  # unfinished
    half = len(content) // 2
    part.write_bytes(json.dumps(header).encode().ljust(HEADER) + content[HEADER:half] + bytes(half))
    write_labels(concept_model, keys, 257, CPU)
    assert path.read_bytes() == content

@pytest.mark.parametrize("byte", [0, 255])
def test_damaged_labels_are_refused(written, byte):
    concept_model, keys, path = written
    content = bytearray(path.read_bytes())
    content[-200:-100] = bytes([byte]) * 100
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged or cut short; remove it"):
        open_labels(concept_model, keys)

def test_unfinished_labels_of_another_model_are_kept(written, chain):
    concept_model, keys, path = written
    part = path.rename(path.with_suffix(".part"))
    content = part.read_bytes()
    concept_model.sae.latent_bias.data += 1
    with pytest.raises(UserError, match="unfinished labels of another sae: finish them, or remove"):
        write_labels(concept_model, keys, 257, CPU)
    assert part.read_bytes() == content
    part.write_bytes(b"")  # nothing in it to keep
    write_labels(concept_model, keys, 257, CPU)

def test_a_run_that_learned_from_another_sae_does_not_blame_its_labels(
        chain, own_dataset, tmp_path):
    sae = shutil.copytree(chain["sae"], tmp_path / "sae")
    keys = [*arguments(chain, own_dataset), f"--sae={sae}"]
    argv = [*TINY, *keys, "--method=cocomix", "--labels=disk", "--shift_blocks=false",
            f"--out_dir={tmp_path / 'run'}"]
    assert run(concepts.main, "--write_labels", *keys)[0] == 0
    with StopAt(5):
        run(train.main, *argv)
    state = torch.load(sae / "sae.pt")
    state["latent_bias"] += 1
    torch.save(state, sae / "sae.pt")
    status, _, err = run(train.main, *argv, "--resume")
    assert status == 1 and "not what this run learned from" in err and "labels" not in err

def test_two_at_the_same_time_do_not_mix(chain, own_dataset):
    with locked(own_dataset):
        status, _, err = run(concepts.main, "--write_labels", *arguments(chain, own_dataset))
    assert status == 1 and f"another process is writing files in {own_dataset}" in err
    assert not list(own_dataset.glob("labels_*"))

def test_labels_of_something_else_are_refused(chain, own_dataset, tmp_path):
    write = [concepts.main, "--write_labels", *arguments(chain, own_dataset)]
    assert run(*write)[0] == 0

    def error(*more):
        status, _, err = run(train.main, *TINY, *arguments(chain, own_dataset), "--method=cocomix",
                             "--labels=disk", f"--out_dir={tmp_path / 'run'}", *more)
        assert status == 1 and len(err.strip().splitlines()) == 1
        return err

    unshifted = "--shift_blocks=false"
    assert unshifted in error()
    assert "no labels at" in error(unshifted, "--select=activation")
    assert "no labels at" in error(unshifted, "--attr_k=2")

    other = shutil.copytree(chain["sae"], tmp_path / "sae")
    state = torch.load(other / "sae.pt")
    state["latent_bias"] += 1
    torch.save(state, other / "sae.pt")
    assert "labels of another sae" in error(unshifted, f"--sae={other}")
    status, _, err = run(*write, f"--sae={other}")  # and they are not overwritten
    assert status == 1 and "labels of another sae" in err
    (other / "sae.json").unlink()
    err = error(unshifted, f"--sae={other}", f"--concept_model={chain['ntp']}")
    assert "labels of another concept_model, sae" in err

    path = next(own_dataset.glob("labels_*.bin"))
    path.write_bytes(path.read_bytes()[:-2])
    assert "cut short" in error(unshifted) and "cut short" in run(*write)[2]
    assert "not for method='ntp'" in error(unshifted, "--method=ntp")
