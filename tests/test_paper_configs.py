"""The configs of the paper's sizes: sizes and baselines, counted without allocating memory."""
from dataclasses import asdict
from pathlib import Path

import pytest

import bench
from support.cli import parse

ROOT = Path(bench.__file__).resolve().parent
SIZES = {"69m": 69, "124m": None, "386m": 386, "1b": 1380}  # millions active in the paper
METHODS = ("ntp", "kd", "pause", "pause_kd", "cocomix")
PATHS = [path for size in SIZES for path in sorted((ROOT / "config").glob(f"*_{size}.py"))]

def parsed(name):
    return parse(bench.Config, [str(ROOT / "config" / f"{name}.py")])[0]

@pytest.fixture(scope="module")
def counted():
    return {path.stem: bench.count(path.stem, parsed(path.stem)) for path in PATHS}

def test_every_method_has_every_size_with_the_papers_active_parameters(counted):
    names = {f"{method}_{size}" for method in METHODS for size in SIZES}
    assert set(counted) == names | {"gpt2_124m", "cocomix_openwebmath_386m"}
    for size, millions in SIZES.items():
        cocomix = counted[f"cocomix_{size}"]["active_params"]
        for method in METHODS:
            active = counted[f"{method}_{size}"]["active_params"]
            assert active == pytest.approx(cocomix, rel=0.02), (method, size)
            assert millions is None or active == pytest.approx(millions, rel=0.02), (method, size)
    assert counted["gpt2_124m"]["params"] == pytest.approx(124.44, abs=0.04)
    openwebmath = counted["cocomix_386m"] | dict(row="cocomix_openwebmath_386m")
    assert counted["cocomix_openwebmath_386m"] == openwebmath

@pytest.mark.parametrize("size", SIZES)
def test_methods_of_a_size_differ_only_in_the_method(size):
    own = {"method", "out_dir", "n_embd", "concept_model", "sae", "insert_layer"}
    configs = {method: asdict(parsed(f"{method}_{size}")) for method in METHODS}
    shared = {k: v for k, v in configs["cocomix"].items() if k not in own}
    for method, cfg in configs.items():
        assert cfg["method"] == method and cfg["out_dir"] == f"out/{method}_{size}"
        assert cfg["max_tokens"] == 20_000_000_000
        assert {k: v for k, v in cfg.items() if k not in own} == shared
        same_width = configs["cocomix" if method == "cocomix" else "ntp"]
        assert cfg["n_embd"] == same_width["n_embd"]
    mixers = ("pause", "pause_kd", "cocomix")
    assert len({configs[method]["insert_layer"] for method in mixers}) == 1

def test_batches_and_learning_rates_are_the_papers():
    configs = [parsed(f"cocomix_{size}") for size in SIZES]
    tokens = [cfg.batch_size * cfg.block_size for cfg in configs]
    assert tokens == [2 ** 19, 2 ** 19, 2 ** 19, 2 ** 20]
    assert [cfg.learning_rate for cfg in configs] == [6e-4, 6e-4, 3e-4, 2e-4]
    assert [cfg.insert_layer for cfg in configs] == [3, 5, 5, 5]

def test_concept_model_flops(counted):
    """Distillation costs the teacher's forward, labels also the gradient of its upper blocks."""
    forward = counted["gpt2_124m"]["flops"] / 3
    assert counted["kd_69m"]["concept_flops"] == pytest.approx(forward)
    assert counted["pause_kd_1b"]["concept_flops"] == pytest.approx(forward)
    assert counted["ntp_69m"]["concept_flops"] is counted["pause_69m"]["concept_flops"] is None
    lower = 6 * (24 * 768 ** 2 + 2 * 768 * 1024) / 1e6
    attention = 6 * 2 * 768 * 1024 / 1e6  # in the backward it has two products per product
    expected = forward + (forward - lower) + attention + 2 * 768 * 32768 / 1e6
    assert counted["cocomix_69m"]["concept_flops"] == pytest.approx(expected)

def test_the_table_of_configs_is_that_of_the_command(counted):
    table = (ROOT / "results/configs/table.md").read_text().strip()
    assert bench.table(counted.values(), bench.COUNTED) == table

def test_hours_come_from_measured_tokens_per_second(tmp_path, monkeypatch):
    (tmp_path / "h200.jsonl").write_text('{"row": "ntp_69m", "tokens_per_s": 1000000.0}\n'
                                         '{"row": "ntp_69m, official", "tokens_per_s": 1.0}\n')
    monkeypatch.setattr(bench, "MEASURED", tmp_path / "h200.jsonl")
    hours = [bench.count(name, parsed(name))["hours"] for name in ("ntp_69m", "kd_69m")]
    assert hours == ["6", "not measured"]
