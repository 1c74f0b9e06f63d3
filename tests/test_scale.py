"""At the paper's scale: compiled, within memory, in many processes; on the CPU here, `cuda` tests where there is a GPU."""
import functools

import pytest
import torch

import train
from conftest import TINY, run

torch_compile = torch.compile


def guided(chain, method, *more):
    return [f"--method={method}", f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}", *more]


METHODS = {"ntp": [], "kd": [], "pause_kd": [], "cocomix": [], "cocomix paper": ["--attribution=paper"], "cocomix activation": ["--select=activation"],
           "cocomix predicted only": ["--mix=none"], "cocomix_kd": [], "cocomix hidden": ["--target=cos", "--checkpoint_blocks"], "cocomix unlabelled": ["--concept_weight=0"]}


def graphs(monkeypatch, *argv, **compile_with):
    """How many graphs torch.compile has made when each line of the log is written: [(line, graphs)]; a break is an error."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    seen = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch_compile, fullgraph=True, **compile_with))

    class Counting(train.config.Log):
        def write(self, values):
            seen.append((values, counters["stats"]["unique_graphs"]))
            super().write(values)
    monkeypatch.setattr(train.config, "Log", Counting)
    status, _, err = run(train.main, *argv, "--compile")
    assert status == 0, err
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_no_graph_break_and_nothing_is_compiled_after_the_first_evaluation_and_step(name, chain, dataset, tmp_path, monkeypatch):
    argv = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--eval_interval=2", "--micro_batch_size=2", *guided(chain, name.split()[0], *METHODS[name])]
    seen = graphs(monkeypatch, *argv, backend="eager")
    first = next(i for i, (line, _) in enumerate(seen) if "loss" in line)
    assert "val_loss" in seen[1][0] and first == 2
    assert len(seen) > 10 and {count for _, count in seen[first:]} == {seen[first][1]}, [count for _, count in seen]
