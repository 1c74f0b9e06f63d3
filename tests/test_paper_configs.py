"""The configs of the paper's sizes, built without memory: sizes, baselines, what the README's table says of them."""
from dataclasses import asdict
from pathlib import Path

import pytest

import bench
import config
import train

ROOT = Path(train.__file__).resolve().parent
SIZES = {"69m": 69, "124m": None, "386m": 386, "1b": 1380}  # active parameters in the paper, millions
METHODS = ("ntp", "kd", "pause", "pause_kd", "cocomix")
PATHS = [path for size in SIZES for path in sorted((ROOT / "config").glob(f"*_{size}.py"))]


def parsed(path):
    return config.parse(bench.Config, [str(path)])[0]


@pytest.fixture(scope="module")
def counted():
    return {path.stem: bench.count(path.stem, parsed(path)) for path in PATHS}


def test_every_method_has_every_size_and_active_parameters_are_the_papers(counted):
    assert set(counted) == {f"{method}_{size}" for method in METHODS for size in SIZES} | {"gpt2_124m", "cocomix_openwebmath_386m"}
    for size, millions in SIZES.items():
        cocomix = counted[f"cocomix_{size}"]["active_params"]
        for method in METHODS:
            active = counted[f"{method}_{size}"]["active_params"]
            assert active == pytest.approx(cocomix, rel=0.02), (method, size)
            assert millions is None or active == pytest.approx(millions, rel=0.02), (method, size)
    assert counted["gpt2_124m"]["params"] == pytest.approx(124.44, abs=0.04)
    assert counted["cocomix_openwebmath_386m"] == counted["cocomix_386m"] | dict(row="cocomix_openwebmath_386m")


def test_methods_of_a_size_differ_in_the_method_alone():
    own = {"method", "out_dir", "n_embd", "concept_model", "sae", "insert_layer"}
    for size in SIZES:
        configs = {method: asdict(parsed(ROOT / "config" / f"{method}_{size}.py")) for method in METHODS}
        for method, cfg in configs.items():
            assert cfg["method"] == method and cfg["out_dir"] == f"out/{method}_{size}" and cfg["max_tokens"] == 20_000_000_000
            assert {k: v for k, v in cfg.items() if k not in own} == {k: v for k, v in configs["cocomix"].items() if k not in own}
            assert cfg["n_embd"] == configs["cocomix" if method == "cocomix" else "ntp"]["n_embd"]
        assert configs["pause"]["insert_layer"] == configs["pause_kd"]["insert_layer"] == configs["cocomix"]["insert_layer"]


def test_batches_and_rates_are_the_papers():
    tokens = {size: parsed(ROOT / "config" / f"cocomix_{size}.py") for size in SIZES}
    assert [cfg.batch_size * cfg.block_size for cfg in tokens.values()] == [2 ** 19, 2 ** 19, 2 ** 19, 2 ** 20]
    assert [cfg.learning_rate for cfg in tokens.values()] == [6e-4, 6e-4, 3e-4, 2e-4] and [cfg.insert_layer for cfg in tokens.values()] == [3, 5, 5, 5]


def test_distillation_costs_the_teachers_forward_and_labels_its_upper_gradient_too(counted):
    forward = counted["gpt2_124m"]["flops"] / 3
    assert counted["kd_69m"]["concept_flops"] == counted["pause_kd_1b"]["concept_flops"] == pytest.approx(forward)
    assert counted["ntp_69m"]["concept_flops"] is None and counted["pause_69m"]["concept_flops"] is None
    blocks = 6 * (24 * 768 ** 2 + 2 * 768 * 1024) / 1e6  # below the concepts
    assert counted["cocomix_69m"]["concept_flops"] == pytest.approx(forward + (forward - blocks) + 2 * 768 * 32768 / 1e6)


def test_the_table_of_configs_is_that_of_the_command(counted):
    assert bench.table(counted.values(), bench.COUNTED) == (ROOT / "results/configs/table.md").read_text().strip()


def test_hours_come_from_measured_tokens_per_second(tmp_path, monkeypatch):
    (tmp_path / "h200.jsonl").write_text('{"row": "ntp_69m", "tokens_per_s": 1000000.0}\n{"row": "ntp_69m, official", "tokens_per_s": 1.0}\n')
    monkeypatch.setattr(bench, "MEASURED", tmp_path / "h200.jsonl")
    row = {name: bench.count(name, parsed(ROOT / "config" / f"{name}.py"))["hours"] for name in ("ntp_69m", "kd_69m")}
    assert row == dict(ntp_69m="6", kd_69m="not measured")
