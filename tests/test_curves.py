"""Comparing runs from their logs: learning curves, their table and their picture."""
import math

from support.runtime import UserError

import pytest

from support import curves
from support.log import read_log

def log(losses, every=100, seed=1, flops=10, concept_flops=0, speed=50):
    """A run's log with an evaluation every so many tokens."""
    head = dict(step=0, seed=seed, max_iters=len(losses), flops_per_token=flops,
                concept_flops_per_token=concept_flops)
    return [head] + [dict(step=i, tokens=every * i, val_loss=loss, seconds=every * i / speed)
                     for i, loss in enumerate(losses, 1)]

def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]

def test_the_perplexity_of_a_broken_loss_is_no_number():
    assert curves.perplexity(800) == math.inf and math.isnan(curves.perplexity(math.nan))

def test_tokens_to_reach_a_loss_are_interpolated():
    curve = [100, 200, 300, 400], [5.0, 4.0, 3.0, 3.5]
    assert curves.tokens_to_reach(*curve, 3.75) == pytest.approx(225)
    assert curves.tokens_to_reach(*curve, 3.0) == 300
    assert curves.tokens_to_reach(*curve, 5.5) == 100
    assert curves.tokens_to_reach(*curve, 2.9) is None

def test_the_table_compares_each_run_with_the_first():
    found = curves.read_curves({
        "ntp": log([5.0, 4.0, 3.5, 3.25]),
        "fast": log([4.0, 3.25, 3.0, 2.0], flops=10, concept_flops=20),
        "slow": log([6.0, 5.0, 4.5, 4.0])})
    rows = [cells(line) for line in curves.learning_curves(found, columns=2).splitlines()]
    assert rows[0] == ["run", "seeds", "loss at 0.00M", "loss at 0.00M", "vs first",
                       "tokens needed", "FLOPs needed", "FLOPs", "seconds"]
    assert rows[2] == ["ntp", "1", "4.000", "3.250", "–", "–", "–", "4.00e+03", "8"]
    assert rows[3] == ["fast", "1", "3.250", "2.000", "-1.250", "50.0%", "150.0%", "1.20e+04", "8"]
    assert rows[4][2:7] == ["5.000", "4.000", "0.750", "not reached", "not reached"]

def test_seeds_of_one_method_are_one_curve():
    logs = {"ntp-1": log([5.0, 3.0], seed=1), "ntp-22": log([6.0, 3.5], seed=22)}
    found = curves.read_curves({**logs, "other-9": log([1.0], seed=1)})
    assert list(found) == ["ntp", "other-9"]
    assert found["ntp"].losses == {1: [5.0, 3.0], 22: [6.0, 3.5]}
    assert len(found["other-9"].losses) == 1
    logs = {"ntp": log([5.0]), "ntp-1": log([6.0]), "ntp-2": log([7.0], seed=2)}
    assert {name: curve.losses for name, curve in curves.read_curves(logs).items()} == {
        "ntp": {1: [5.0], 2: [7.0]}, "ntp-1": {1: [6.0]}}
    table = curves.learning_curves({"ntp": found["ntp"]})
    assert "5.500 ± 0.500 | 3.250 ± 0.250" in table

def test_runs_are_compared_seed_by_seed():
    found = curves.read_curves({
        "ntp-1": log([6.0, 3.0], seed=1), "ntp-2": log([6.0, 4.0], seed=2),
        "better-1": log([3.0, 2.5], seed=1), "better-2": log([4.5, 3.5], seed=2),
        "equal-1": log([6.0, 3.0], seed=1), "other-3": log([1.0, 1.0], seed=3)})
    rows = [cells(line) for line in curves.learning_curves(found).splitlines()]
    versus = {row[0]: row[4:7] for row in rows}
    assert versus["better"] == ["-0.500 ± 0.000", "62.5% ± 12.5%", "62.5% ± 12.5%"]
    assert versus["equal"] == ["0.000", "100.0%", "100.0%"]
    assert versus["other"] == versus["ntp"] == ["–", "–", "–"]
    assert curves.spread([-0.0001]) == "0.000" and curves.spread([-0.01]) == "-0.010"

def test_runs_without_a_shared_evaluation_are_refused():
    found = curves.read_curves({"a": log([5.0], every=100), "b": log([5.0], every=70)})
    with pytest.raises(UserError, match="share no evaluation"):
        curves.learning_curves(found)
    with pytest.raises(UserError, match="no evaluation after the start"):
        curves.read_curves({"a": log([])})

def test_a_picture_without_a_suffix_is_drawn_as_png_and_svg(tmp_path):
    found = curves.read_curves({"ntp-1": log([5.0, 3.0]), "ntp-2": log([5.0, 3.5], seed=2)})
    written = curves.plot(tmp_path / "c", found).split()
    assert written == [str(tmp_path / "c.png"), str(tmp_path / "c.svg")]
    svg = (tmp_path / "c.svg").read_bytes()
    curves.plot(tmp_path / "again.svg", found)
    assert (tmp_path / "again.svg").read_bytes() == svg  # the same figure, the same bytes

@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_picture_replaces_only_pictures(tmp_path, suffix):
    found, path = curves.read_curves({"ntp": log([5.0, 3.0])}), tmp_path / f"c.{suffix}"
    curves.picture_path(path)  # not there
    curves.plot(path, found)
    curves.picture_path(path)  # one that we drew
    path.write_text("CoCoMix, drawn by someone else")
    with pytest.raises(UserError, match="is there already .* --overwrite"):
        curves.picture_path(path)
    curves.picture_path(path, overwrite=True)

def test_rows_are_added_to_files_of_rows_only(tmp_path):
    path, other = tmp_path / "new" / "rows.jsonl", tmp_path / "log.jsonl"
    curves.append_rows(path)
    for row in dict(run="a", loss=1.23456789), dict(row="b"), dict(model="c", loss=None):
        curves.append_rows(path, row)
    assert path.read_text() == (
        '{"run": "a", "loss": 1.234568}\n{"row": "b"}\n{"model": "c", "loss": null}\n')
    path.write_text('{"run": "a"}\n{"run": "b", "lo')  # a crash
    curves.append_rows(path, dict(run="c"))
    assert [row["run"] for row in read_log(path)] == ["a", "c"]
    for content in (b'{"step": 0}\n', b"# notes\n", b"\n", b"\xff\x00" * 9):
        other.write_bytes(content)
        with pytest.raises(UserError, match="log.jsonl is a file of something else"):
            curves.append_rows(other, dict(run="a"))
        assert other.read_bytes() == content

def test_panels_without_runs_are_left_out(tmp_path):
    found = curves.read_curves({"ntp": log([5.0, 3.0])})
    panels = {"first": ["ntp", "missing"], "second": ["ntp"], "empty": ["missing"]}
    curves.plot(tmp_path / "panels.svg", found, panels)
    svg = (tmp_path / "panels.svg").read_text()  # matplotlib writes each text as a comment, too
    texts = "training tokens", "first", "second", "empty"
    assert [svg.count(f"<!-- {text} -->") for text in texts] == [2, 1, 1, 0]

def test_of_several_evaluations_the_most_complete_on_the_runs_own_text_counts():
    lines = [{"tokens": 8, "limit": None, "val_tokens": 50, "perplexity": 5.0, "piqa/acc": 0.5},
             {"tokens": 8, "limit": 2, "val_tokens": 90, "perplexity": 7.0, "piqa/acc": 0.25},
             {"tokens": 8, "limit": None, "val_tokens": 99, "perplexity": 1.0, "dataset": "other"},
             {"tokens": 4, "limit": None, "val_tokens": 10, "perplexity": 9.0, "dataset": None}]
    merged = curves.merge_evaluations(lines)
    assert [(line["tokens"], line["perplexity"]) for line in merged] == [(4, 9.0), (8, 7.0)]
    assert merged[1]["piqa/acc"] == 0.5 and "piqa/acc" not in merged[0]
    measured = {measure: float(i) for i, measure in enumerate(curves.MEASURES)}
    row, = curves.merge_evaluations([{"tokens": 8} | measured])
    assert row["average_accuracy"] == 5 and row["task_perplexity"] == 1.5

def test_seconds_are_those_at_the_median_speed():
    log = [dict(step=0, seed=1)] + [
        dict(step=i, tokens=100 * i, tokens_per_s=s) for i, s in enumerate((10, 20, 90), 1)]
    log.append(dict(step=3, tokens=300, val_loss=2.0, seconds=99.0))
    assert curves.read_curves({"a": log})["a"].seconds == [15.0]

@pytest.mark.parametrize("name", ["a$_$", "_base", "$x", "100%"])
def test_names_of_any_kind_are_drawn(tmp_path, name, monkeypatch):
    import matplotlib.figure
    texts, save = [], matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **options):
        texts.extend(t.get_text() for t in figure.axes[0].get_legend().get_texts())
        save(figure, *args, **options)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    curves.plot(tmp_path / "x.png", curves.read_curves({name: log([3.0, 2.0])}))
    assert [text.strip() for text in texts] == [name]
