"""The benchmark: what it compares is the same computation, and what it prints is what it measured."""
import json

import pytest
import torch

import bench
import config
import train
from concepts import Guidance
from conftest import TINY, run, tiny_gpt
from test_concepts import concept_model
from test_model import batch


def test_the_official_recipe_done_plainly_gives_our_loss_and_gradients():
    teacher, model = concept_model(k=30), tiny_gpt(insert="concept")  # so many that four of them raise the loss everywhere
    teacher.sae.latent_bias += 3  # and all of them active
    (x, y, _), cfg = batch(), config.parse(train.Config, ["--method=cocomix"])[0]
    ours = train.step_losses(model, cfg, x, y, Guidance(teacher.labels(x, y))).total
    expected = torch.autograd.grad(ours, list(model.parameters()))
    teacher.gpt.requires_grad_(), teacher.sae.requires_grad_()
    plain, attributions = bench.official_losses(model, teacher, x, y, 0.1)
    assert attributions.grad_fn is not None and all(p.grad is not None for p in teacher.gpt.parameters())  # as there
    torch.testing.assert_close(plain, ours)
    for a, b in zip(torch.autograd.grad(plain, list(model.parameters())), expected):
        torch.testing.assert_close(a, b)


def test_rows_are_measured_side_by_side(chain, dataset, tmp_path):
    (tmp_path / "ntp.py").write_text('method = "ntp"\n')
    for name, method in (("mine", "cocomix"), ("taught", "cocomix_kd")):
        (tmp_path / f"{name}.py").write_text(f'method = "{method}"\nconcept_model = "{chain["gpt"]}"\nsae = "{chain["sae"]}"\n')
    status, out, err = run(bench.main, tmp_path / "ntp.py", tmp_path / "mine.py", tmp_path / "taught.py", *TINY, f"--dataset={dataset}", "--disk", "--official", "--rounds=2", "--parts",
                           "--memory=false", f"--write={tmp_path / 'b.jsonl'}")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [r["row"] for r in rows] == ["ntp", "mine", "mine, labels from disk", "mine, official", "taught", "taught, labels from disk"]
    assert rows[0]["speed_ratio"] == rows[0]["flop_per_s_ratio"] == 1
    for r in rows:
        assert r["tokens_per_s"] > 0 and r["flop_per_s"] == pytest.approx(r["tokens_per_s"] * r["flops_per_token"], rel=1e-3)
        printed = next(line for line in out.splitlines() if line.startswith(f"| {r['row']} |")).split("|")[2]
        assert float(printed.replace(",", "")) == pytest.approx(r["tokens_per_s"], rel=1e-3) and r["mfu"] is None
    assert 0 < rows[1]["concept_share"] < 1.5 and rows[2]["concept_share"] is None and rows[2]["flops_per_token"] < rows[1]["flops_per_token"]
    assert rows[1]["flops_per_token"] <= rows[4]["flops_per_token"] and rows[2]["flops_per_token"] < rows[5]["flops_per_token"] < rows[4]["flops_per_token"]  # the teacher is asked all the same
    assert 0 < rows[5]["concept_share"] < 1.5 and "concept forward" in rows[5]["parts"] and "attribution" not in rows[5]["parts"]
    assert {"blocks", "head and loss", "optimizer"} == set(rows[0]["parts"])
    assert {"concept forward", "concept backward", "attribution", "TopK of the SAE", "concept head and loss", "compress", "lower blocks", "upper blocks", "head and loss",
            "optimizer"} == set(rows[1]["parts"])


def test_the_official_recipe_makes_its_labels_itself(chain, dataset, tmp_path):
    (tmp_path / "mine.py").write_text(f'method = "cocomix"\nlabels = "disk"\nconcept_model = "{chain["gpt"]}"\nsae = "{chain["sae"]}"\n')
    status, out, err = run(bench.main, tmp_path / "mine.py", *TINY, f"--dataset={dataset}", "--disk", "--official", "--rounds=1", "--memory=false", f"--write={tmp_path / 'b.jsonl'}")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [r["row"] for r in rows] == ["mine", "mine, official"] and rows[0]["flops_per_token"] < rows[1]["flops_per_token"]


@pytest.mark.slow
def test_peak_memory_is_of_a_process_for_each_row(dataset, tmp_path):
    (tmp_path / "ntp.py").write_text("")
    status, out, err = run(bench.main, tmp_path / "ntp.py", *TINY, f"--dataset={dataset}", "--rounds=1", f"--write={tmp_path / 'b.jsonl'}")
    assert status == 0 and 0.05 < json.loads((tmp_path / "b.jsonl").read_text())["peak_gib"] < 3, err


def test_a_concept_model_that_a_run_does_not_ask_is_not_timed(chain, dataset):
    cfg, _ = config.parse(bench.Config, [*TINY, f"--dataset={dataset}", "--method=cocomix", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}", "--concept_weight=0"])
    row = bench.Row("mixing only", cfg, torch.device("cpu"))
    assert row.concept_model is None and row.concept_flops == 0
    status, _, err = run(bench.main, "config/stdlib_ntp.py", "--count", "--dataset=typo")
    assert status == 1 and "no dataset 'typo'" in err


def test_without_a_config_file_it_says_so():
    status, _, err = run(bench.main, "--rounds=1")
    assert status == 1 and "name config files" in err
