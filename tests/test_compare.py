"""Comparing runs from their logs, and the experiments under results/."""
import json
import shutil
import sys
from pathlib import Path

import pytest

import config
import eval as evaluation
import sae
import train
from config import UserError, read_log
from conftest import TINY, run

ROOT = Path(evaluation.__file__).resolve().parent
sys.path.insert(0, str(ROOT / "results"))
import run as experiment


def log(losses, every=100, seed=1, flops=10, concept_flops=0, speed=50):
    head = dict(step=0, seed=seed, max_iters=len(losses), flops_per_token=flops, concept_flops_per_token=concept_flops)
    return [head] + [dict(step=i + 1, tokens=every * (i + 1), val_loss=loss, seconds=every * (i + 1) / speed) for i, loss in enumerate(losses)]


def test_tokens_to_reach_a_loss_are_read_off_between_two_evaluations():
    curve = [100, 200, 300, 400], [5.0, 4.0, 3.0, 3.5]
    assert evaluation.tokens_to_reach(*curve, 3.75) == pytest.approx(225)
    assert evaluation.tokens_to_reach(*curve, 3.0) == 300 and evaluation.tokens_to_reach(*curve, 5.5) == 100
    assert evaluation.tokens_to_reach(*curve, 2.9) is None


def test_the_table_tells_what_the_first_runs_end_costs_the_others():
    curves = evaluation.curves({"ntp": log([5.0, 4.0, 3.5, 3.25]), "fast": log([4.0, 3.25, 3.0, 2.0], flops=10, concept_flops=20), "slow": log([6.0, 5.0, 4.5, 4.0])})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in evaluation.course(curves, columns=2).splitlines()]
    assert rows[0] == ["run", "seeds", "loss at 0.00M", "loss at 0.00M", "over the first", "tokens needed", "FLOPs needed", "FLOPs", "seconds"]
    assert rows[2] == ["ntp", "1", "4.000", "3.250", "–", "–", "–", "4.00e+03", "8"]
    assert rows[3] == ["fast", "1", "3.250", "2.000", "-1.250", "50.0%", "150.0%", "1.20e+04", "8"]
    assert rows[4][2:7] == ["5.000", "4.000", "0.750", "not reached", "not reached"]


def test_seeds_of_one_row_are_one_curve_with_its_spread():
    curves = evaluation.curves({"ntp-1": log([5.0, 3.0], seed=1), "ntp-22": log([6.0, 3.5], seed=22), "other-9": log([1.0], seed=1)})
    assert list(curves) == ["ntp", "other-9"]
    assert curves["ntp"].loss == [5.5, 3.25] and curves["ntp"].seeds == [1, 22] and len(curves["other-9"].losses) == 1
    assert "3.250 ± 0.250" in evaluation.course({"ntp": curves["ntp"]})


def test_a_row_is_set_against_the_first_seed_by_seed():
    lines = {"ntp-1": log([6.0, 3.0], seed=1), "ntp-2": log([6.0, 4.0], seed=2), "better-1": log([3.0, 2.5], seed=1), "better-2": log([4.5, 3.5], seed=2),
             "as one-1": log([6.0, 3.0], seed=1), "other-3": log([1.0, 1.0], seed=3)}
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[4:7] for line in evaluation.course(evaluation.curves(lines)).splitlines()}
    assert rows["better"] == ["-0.500 ± 0.000", "62.5% ± 12.5%", "62.5% ± 12.5%"]
    assert rows["as one"] == ["0.000", "100.0%", "100.0%"] and rows["other"] == rows["ntp"] == ["–", "–", "–"]
    assert evaluation.spread([-0.0001]) == "0.000" and evaluation.spread([-0.01]) == "-0.010"


def test_runs_without_a_shared_evaluation_are_refused():
    with pytest.raises(UserError, match="share no evaluation"):
        evaluation.course(evaluation.curves({"a": log([5.0], every=100), "b": log([5.0], every=70)}))
    with pytest.raises(UserError, match="no evaluation after the start"):
        evaluation.curves({"a": log([])})


def test_a_picture_without_a_suffix_is_drawn_as_png_and_svg(tmp_path):
    curves = evaluation.curves({"ntp-1": log([5.0, 3.0]), "ntp-2": log([5.0, 3.5], seed=2)})
    assert evaluation.plot(tmp_path / "c", curves).split() == [str(tmp_path / "c.png"), str(tmp_path / "c.svg")]
    svg = (tmp_path / "c.svg").read_bytes()
    evaluation.plot(tmp_path / "again.svg", curves)
    assert (tmp_path / "again.svg").read_bytes() == svg  # the same figure, the same bytes
    evaluation.plot(tmp_path / "panels.svg", curves, {"first": ["ntp", "not there"], "second": ["ntp"], "empty": ["not there"]})
    panels = (tmp_path / "panels.svg").read_text()  # matplotlib keeps each text as a comment beside its outlines
    assert [panels.count(f"<!-- {text} -->") for text in ("training tokens", "first", "second", "empty")] == [2, 1, 1, 0]


def test_a_claimed_order_holds_where_every_seed_has_it_so():
    ends = {"a": (3.0, 4.0), "b": (3.5, 4.25), "c": (2.5, 4.5)}
    curves = evaluation.curves({f"{name}-{seed}": log([9.0, end], seed=seed) for name, both in ends.items() for seed, end in zip((1, 2), both)})
    rows = experiment.orders(curves, {"first": ("a", "b"), "second": ("b", "a"), "third": ("a", "c"), "not run": ("a", "d")}).splitlines()[2:]
    assert [row.split(" | ")[3:] for row in rows] == [["-0.375 ± 0.125", "holds |"], ["0.375 ± 0.125", "does not hold |"], ["0.000 ± 0.500", "seeds disagree |"]]


def write_log(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_experiment_draws_the_finished_runs_that_are_there(tmp_path):
    (tmp_path / "experiment.py").write_text('out = "out"\nruns = {"NTP": "train.py", "Pause + KD": "train.py --method=pause", "KD": "train.py"}\nseeds = (1, 2)\npanels = {"none": ["KD"]}\nshort = ("KD", "Pause + KD")\n')
    lines = log([5.0, 4.0], seed=2)
    write_log(tmp_path / "pause_kd-2.jsonl", lines)
    write_log(tmp_path / "ntp-1.jsonl", lines[:-1])                                                      # cut short
    write_log(tmp_path / "kd-2.jsonl", [lines[0] | dict(command="train.py --another"), *lines[1:]])      # made otherwise
    write_log(tmp_path / "pause_kd-1.jsonl", [log([5.0, 4.5], seed=1)[0] | dict(concept_model_hash="another"), *log([5.0, 4.5], seed=1)[1:]])
    assert "'Pause + KD' had different concept models" in run(experiment.main, tmp_path, "--draw")[1]
    (tmp_path / "pause_kd-1.jsonl").unlink()
    status, out, err = run(experiment.main, tmp_path, "--draw")
    table = (tmp_path / "table.md").read_text()
    assert status == 0 and "| Pause + KD | 1 |" in out and "NTP" not in table and "| KD" not in table and (tmp_path / "curves.svg").is_file(), err
    assert (tmp_path / "short.md").read_text() == table and (tmp_path / "short.png").is_file()


@pytest.mark.parametrize("text, message", [
    ('runs = {}', "runs={}: expected a dict"), ('runs = {"a": 1}', "names and commands are texts"), ('runs = {"a": "train.py"}\nseeds = ()', "seeds=()"),
    ('runs = {"a": "train.py", "A": "train.py"}', "more than case"), ('runs = {"a": "train.py"}\nat_once = 0', "at_once=0"),
    ('runs = {"a": "train.py"}\npanels = {"x": 5}', "panels: expected lists"), ('runs = {"a": "train.py"}\norders = {"x": ["a"]}', "two rows each"),
    ('runs = {"a": "train.py"}\nonce = ("b",)', "'b' in once, short, panels or orders is no row"), ('runs = {"a": "train.py --seed=1"}\nevery = "--seed=2"', "both set --seed"),
    ('runs = {"a": "train.py"}\nafter = {"../a.txt": "eval.py"}', "is no name of a .txt file"), ("runs = {'a': 'train.py \"b'}", "is no command"), ('runs = {"a": "train.py"}\npanels = {"x": [["a"]]}', "is no row of runs")])
def test_what_is_wrong_in_an_experiment_is_named(tmp_path, text, message):
    (tmp_path / "experiment.py").write_text(f'out = "out"\n{text}\n')
    status, _, err = run(experiment.main, tmp_path)
    assert status == 1 and message in err, err


def test_what_commands_print_after_an_experiment_is_kept_until_they_change(tmp_path):
    (tmp_path / "say.py").write_text("import sys; print(*sys.argv[1:]); sys.exit(sys.argv[1] == 'fail')")
    say, kept = str(tmp_path / "say.py"), tmp_path / "said.txt"
    experiment.run_after(tmp_path, {"said.txt": f"{say} 'one thing'"}, anew=[])
    assert kept.read_text() == f"$ python {say} 'one thing'\none thing\n"
    kept.write_text(kept.read_text() + "as it was")
    experiment.run_after(tmp_path, {"said.txt": f"{say} 'one thing'"}, anew=[])
    assert kept.read_text().endswith("as it was")
    experiment.run_after(tmp_path, {"said.txt": f"{say} another"}, anew=[])
    assert kept.read_text().endswith("another\nanother\n")
    assert kept.read_text() and experiment.run_after(tmp_path, {"said.txt": f"{say} another"}, anew=[1]) is None and kept.is_file()
    with pytest.raises(UserError, match="ended with status 1"):
        experiment.run_after(tmp_path, {"said.txt": f"{say} fail"}, anew=[1])
    assert not kept.exists()  # not what older runs gave


@pytest.mark.slow
def test_an_experiment_runs_what_is_missing_and_keeps_logs_table_and_curves(dataset, tmp_path, monkeypatch):
    folder, out = tmp_path / "results", tmp_path / "out"
    folder.mkdir()
    tiny = " ".join([*TINY, f"--dataset={dataset}"])
    (folder / "experiment.py").write_text(f'out = "{out}"\nevery = "{tiny}"\nruns = {{"NTP": "train.py", "Pause + KD": "train.py --method=pause"}}\nat_once = 2\n')
    calls, keep = [], experiment.call
    monkeypatch.setattr(experiment, "call", lambda *a: (calls.append(a[0]), keep(*a)))
    status, stdout, err = run(experiment.main, folder)
    assert status == 0 and len(calls) == 2, err
    assert "| NTP | 1 |" in (folder / "table.md").read_text() and "| Pause + KD | 1 |" in stdout and (folder / "curves.svg").is_file()
    assert read_log(folder / "pause_kd-1337.jsonl")[0]["machine"].endswith("2 runs at once")
    cut = folder / "ntp-1337.jsonl"
    cut.write_text("".join(json.dumps(line) + "\n" for line in read_log(cut)[:-1]))
    assert run(experiment.main, folder)[0] == 0 and read_log(cut)[-1]["step"] == read_log(cut)[0]["max_iters"]
    assert len(calls) == 3 and "train.py --n_layer" in calls[2] and calls[2].endswith("--resume")  # only what is missing
    edited = (folder / "experiment.py").read_text().replace('"train.py --method=pause"', '"train.py --method=pause --beta1=0.8"') + 'once = ("NTP",)\nseeds = (1337, 2)\n'
    (folder / "experiment.py").write_text(edited)
    before = cut.read_bytes()
    assert run(experiment.main, folder)[0] == 0 and len(calls) == 5  # the row whose command is another, and its second seed; NTP stands, once
    assert all("--beta1=0.8" in call for call in calls[3:]) and cut.read_bytes() == before and not (folder / "ntp-2.jsonl").exists()
    shutil.rmtree(out / "pause_kd-2"), (folder / "pause_kd-2.jsonl").unlink()
    (folder / "experiment.py").write_text(edited.replace("0.8", "0.7"))
    assert run(experiment.main, folder, "--only=Pause")[0] == 0 and len(calls) == 7  # and once more: what the old command left is removed
    assert "beta1=0.7" in read_log(folder / "pause_kd-1337.jsonl")[0]["command"]
    (folder / "experiment.py").write_text(f'out = "{out}"\nruns = {{"broken": "train.py --n_head=7 --n_embd=16 --dataset={dataset}"}}\n')
    status, _, err = run(experiment.main, folder)
    assert status == 1 and "n_embd=16 is not divisible" in err


def test_each_row_of_an_experiment_is_a_run_that_its_script_accepts():
    for name, rows in (("stdlib-ablations", 25), ("books-cpu", 19), ("books-h200", 8)):
        e = config.read_config_file(ROOT / "results" / name / "experiment.py")
        for row, command in {**e.get("before", {}), **e["runs"]}.items():
            script, *argv = f"{command} {e['every'] if row in e['runs'] else ''}".split()
            cfg, rest = config.parse({"train.py": train, "sae.py": sae}[script].Config, [str(ROOT / a) if a.startswith("config/") else a for a in argv])
            assert not rest and (script == "sae.py" or train.model_config(cfg, 4096, 2048, 160)), row
        names = [experiment.file_name(row) for row in e["runs"]]
        assert len(set(names)) == len(names) == rows
