"""The benchmark measures what it names, and prints what it measured."""
import json

import pytest
import torch
from conftest import TINY, run

import bench
from support.cli import parse

def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def write_config(path, chain, method, more=""):
    path.write_text(f'method = "{method}"\nconcept_model = "{chain["gpt"]}"\n'
                    f'sae = "{chain["sae"]}"\n{more}')
    return path

def run_bench(tmp_path, dataset, *argv):
    """(the rows of --write, stdout)"""
    status, out, err = run(bench.main, *argv, *TINY, f"--dataset={dataset}", "--memory=false",
                           f"--write={tmp_path / 'b.jsonl'}")
    assert status == 0, err
    return read_rows(tmp_path / "b.jsonl"), out

def test_rows_are_measured_side_by_side(chain, dataset, tmp_path):
    (tmp_path / "ntp.py").write_text('method = "ntp"\n')
    files = [tmp_path / "ntp.py", write_config(tmp_path / "mine.py", chain, "cocomix"),
             write_config(tmp_path / "taught.py", chain, "cocomix_kd")]
    keys = ["--disk", "--official", "--rounds=2"]
    rows, out = run_bench(tmp_path, dataset, *files, *keys)
    assert [r["row"] for r in rows] == ["ntp", "mine", "mine, labels from disk", "mine, official",
                                        "taught", "taught, labels from disk"]
    assert rows[0]["speed_ratio"] == rows[0]["flop_per_s_ratio"] == 1
    for r in rows:
        assert r["tokens_per_s"] > 0 and r["mfu"] is None
        flop_per_s = r["tokens_per_s"] * r["flops_per_token"]
        assert r["flop_per_s"] == pytest.approx(flop_per_s, rel=1e-3)
        line, = [line for line in out.splitlines() if line.startswith(f"| {r['row']} |")]
        printed = float(line.split("|")[2].replace(",", ""))
        assert printed == pytest.approx(r["tokens_per_s"], rel=1e-3)
    ntp, mine, stored, _, taught, taught_stored = rows
    assert 0 < mine["concept_share"] < 1.5 and stored["concept_share"] is None
    flops = [r["flops_per_token"] for r in (stored, taught_stored, taught)]
    assert flops[0] < mine["flops_per_token"] <= flops[2] and flops == sorted(set(flops))
    # with stored labels the teacher's distribution is still needed
    assert 0 < taught_stored["concept_share"] < 1.5

def test_the_profile_lists_the_operations_of_a_step(chain, dataset, tmp_path):
    file = write_config(tmp_path / "mine.py", chain, "cocomix")
    _, out = run_bench(tmp_path, dataset, file, "--official", "--rounds=1", "--profile")
    _, results, profile = out.split("\n\n")  # none of the official recipe
    assert "mine, official" in results and profile.startswith("mine\n")
    rows = [line.split() for line in profile.splitlines()[1:]]
    assert len(rows) == 15 and {"aten::mm", "aten::addmm"} <= {row[3] for row in rows}
    times, shares = [float(row[0]) for row in rows], [float(row[2].strip("%")) for row in rows]
    assert times == sorted(times, reverse=True) and 50 < sum(shares) <= 100.5

def test_the_official_recipe_computes_its_own_labels(chain, dataset, tmp_path):
    file = write_config(tmp_path / "mine.py", chain, "cocomix", 'labels = "disk"\n')
    rows, _ = run_bench(tmp_path, dataset, file, "--disk", "--official", "--rounds=1")
    assert [r["row"] for r in rows] == ["mine", "mine, official"]
    assert rows[0]["flops_per_token"] < rows[1]["flops_per_token"]

def test_the_official_recipe_freezes_nothing(chain, dataset):
    argv = ["--method=cocomix", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"]
    cfg, _ = parse(bench.Config, [*TINY, f"--dataset={dataset}", *argv])
    row = bench.Row("mine", cfg, torch.device("cpu"), "official")
    assert row.held.grad_fn is not None
    assert all(p.grad is not None for p in row.concept_model.gpt.parameters())

@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_per_row(dataset, tmp_path):
    (tmp_path / "ntp.py").write_text("")
    argv = [*TINY, f"--dataset={dataset}", "--rounds=1", f"--write={tmp_path / 'b.jsonl'}"]
    status, _, err = run(bench.main, tmp_path / "ntp.py", *argv)
    assert status == 0 and 0.05 < read_rows(tmp_path / "b.jsonl")[0]["peak_gib"] < 3, err

def test_a_concept_model_that_a_run_does_not_need_is_not_timed(chain, dataset):
    argv = ["--method=cocomix", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}",
            "--concept_weight=0"]
    cfg, _ = parse(bench.Config, [*TINY, f"--dataset={dataset}", *argv])
    row = bench.Row("mixing only", cfg, torch.device("cpu"))
    assert row.concept_model is None and row.concept_flops == 0

def test_hours_are_those_of_a_measurement_of_the_same_shapes(dataset, tmp_path, monkeypatch):
    def hours(*argv):
        argv = [*TINY, "--method=ntp", f"--dataset={dataset}", *argv]
        return bench.count("mine", parse(bench.Config, argv)[0])["hours"]

    path = tmp_path / "measured.jsonl"
    monkeypatch.setattr(bench, "MEASURED", path)
    assert hours() == "not measured"
    (tmp_path / "mine.py").write_text("")
    argv = [*TINY, f"--dataset={dataset}", "--rounds=1", "--memory=false", f"--write={path}"]
    assert run(bench.main, tmp_path / "mine.py", *argv)[0] == 0
    (line,) = read_rows(path)
    path.write_text(json.dumps(line | dict(tokens_per_s=0.01)) + "\n")
    assert hours() == "28" and hours("--max_iters=80") == "284"  # 1,024 and 10,240 tokens
    assert hours("--n_layer=5") == hours("--block_size=16") == "not measured"

def test_errors_are_one_line():
    status, _, err = run(bench.main, "--rounds=1")
    assert status == 1 and "name config files" in err
    status, _, err = run(bench.main, "config/stdlib_ntp.py", "--count", "--dataset=typo")
    assert status == 1 and "no dataset 'typo'" in err

def test_results_are_not_added_to_another_file(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    argv = "config/stdlib_ntp.py", f"--write={tmp_path / 'notes.md'}"
    status, _, err = run(bench.main, *argv)
    assert status == 1 and "notes.md is a file of something else" in err
    assert (tmp_path / "notes.md").read_text() == "mine"
