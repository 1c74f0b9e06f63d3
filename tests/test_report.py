"""What concepts.py shows of a run: the table, the words that are found, the HTML report."""
import html.parser
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run

import concepts
import sample
from model import load_model
from support import report
from support.checkpoint import load_checkpoint
from support.concept_index import AFTER, BEFORE, describe, index_of_run, used
from support.report import write_report
from support.tokens import Batches, load_tokenizer, tokenizer_of_run, tokens_of_run

CPU = torch.device("cpu")

@pytest.fixture(scope="module")
def cocomix(chain, tmp_path_factory):
    """A copy of the tiny CoCoMix run, and its index over 4,000 training tokens."""
    folder = tmp_path_factory.mktemp("report") / "cocomix"
    shutil.copytree(chain["cocomix"], folder, ignore=shutil.ignore_patterns("concepts.*"))
    content = load_checkpoint(folder)
    model, concept_model = load_model(content), concepts.concept_model_of_run(content, CPU)
    index = index_of_run(folder, content, model, concept_model, CPU, 4000)
    return folder, content, model, concept_model, index

class Page(html.parser.HTMLParser):
    """What a page links to, and the text of its scripts."""
    def __init__(self, text):
        super().__init__()
        self.links, self.scripts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag == "script":
            self.scripts.append("")
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += text

def test_the_report_is_one_file_with_the_whole_index(cocomix):
    folder, content, model, concept_model, index = cocomix
    status, out, err = run(concepts.main, folder, "--device=cpu", "--top=3")
    assert status == 0 and f"report: {folder / 'concepts.html'}" in out, err
    page = Page((folder / "concepts.html").read_text())
    assert not page.open and len(page.scripts) == 2
    assert all(link.startswith("#/") for link in page.links)
    assert "innerHTML" not in page.scripts[1] and "insertAdjacent" not in page.scripts[1]
    data = json.loads(page.scripts[0])
    assert sorted(e["id"] for e in data["entries"]) == sorted(used(index))
    assert data["tokens"] == 4000 and data["concepts"] == 48
    tokenizer = load_tokenizer(content["tokenizer"])
    for e in data["entries"]:
        assert e == json.loads(json.dumps(describe(index, e["id"], tokenizer)))

    x, y = Batches(tokens_of_run(content, "val"), 32, 4, 257, shift=False)[0]
    labels, predicted = concept_model.labels(x, y), model(x).concepts.indices[..., :4]
    tokens = [[chr(t) for t in row] for row in x.tolist()]
    passages = data["passages"]
    assert [[token for token, _, _ in passage] for passage in passages] == tokens
    assert [[label for _, _, label in passage] for passage in passages] == labels.tolist()
    found = [[[i for i, _ in pairs] for _, pairs, _ in passage] for passage in passages]
    assert found == predicted.tolist()

def test_a_passage_may_have_characters_of_several_tokens(cocomix, monkeypatch):
    _, content, model, concept_model, _ = cocomix
    text = np.frombuffer(("привет " * 99).encode(), np.uint8).astype("<u2")
    monkeypatch.setattr(report, "tokens_of_run", lambda *_: text)
    tokenizer = load_tokenizer(content["tokenizer"])
    found = report.passages(content, model, concept_model, tokenizer, n=1)
    assert "привет" in "".join(token for token, _, _ in found[0])

def test_the_command_in_a_report_elsewhere_names_the_run(cocomix, tmp_path):
    out = tmp_path / "my report"
    status, _, err = run(concepts.main, cocomix[0], "--device=cpu", f"--out_dir={out}")
    assert status == 0, err
    data = json.loads(Page((out / "concepts.html").read_text()).scripts[0])
    assert data["command"] == f"python sample.py {cocomix[0]}"

def test_files_of_others_are_kept_until_overwrite(cocomix, tmp_path):
    shutil.copytree(cocomix[0], tmp_path / "run", ignore=shutil.ignore_patterns("concepts.*"))
    common = [tmp_path / "run", "--device=cpu", "--tokens=2000"]
    report, index = tmp_path / "run/concepts.html", tmp_path / "run/concepts.pt"
    report.write_text("<html>my notes</html>")
    status, out, err = run(concepts.main, *common)
    assert status == 1 and "--overwrite" in err and "building" not in out  # before the work
    assert report.read_text() == "<html>my notes</html>"
    report.unlink()
    for other in (b"text", None):
        if other is None:
            torch.save(dict(mine=torch.ones(3)), index)
        else:
            index.write_bytes(other)
        before = index.read_bytes()
        status, out, err = run(concepts.main, *common)
        assert status == 0 and "--overwrite" in out and index.read_bytes() == before, err
    assert run(concepts.main, *common, "--overwrite")[0] == 0 and index.read_bytes() != before
    assert run(concepts.main, *common)[0] == 0  # its own files are replaced
    assert "building" not in run(concepts.main, *common)[1]

def test_a_key_given_with_its_default_is_a_given_key(cocomix):
    status, _, err = run(concepts.main, cocomix[0], "--device=cpu", "--attr_k=4")
    assert status == 1 and "--attr_k is for --write_labels" in err
    status, out, err = run(concepts.main, cocomix[0], "--device=cpu", "--sae=openai")
    assert "left out: passages" in out and "openai" in out, (out, err)

def test_no_text_in_the_data_ends_the_reports_script(cocomix, tmp_path):
    *_, index = cocomix
    nasty = '</script><img src="http://x/" onerror="alert(1)">\ud800 \u2028 ]]> <!-- <script>'
    entry = dict(id=7, next=[[nasty, 0.2, 9.0]], current=[], contexts=[])
    write_report(tmp_path / "r.html", nasty, index, [entry], [[[nasty, [[7, 1.0]], [7]]]])
    page = Page((tmp_path / "r.html").read_text())
    assert len(page.scripts) == 2 and page.links == ["#/", "#/read"]
    next_tokens = json.loads(page.scripts[0])["entries"][0]["next"]
    assert next_tokens[0][0] == nasty.replace("\ud800", "?")

def test_the_table_and_find_in_the_terminal(cocomix):
    folder, *_, index = cocomix
    status, out, err = run(concepts.main, folder, "--top=5", "--device=cpu")
    lines = out.strip().splitlines()
    # the counts, the header, 5 concepts, the report, and two empty lines
    assert status == 0 and len(lines) == 10, out
    assert [int(line.split()[0]) for line in lines[3:8]] == used(index)[:5]
    word = chr(index.next_tokens[:, 0].max())
    concept = index.next_tokens[:, 0].argmax().item()
    status, out, err = run(concepts.main, folder, f"--find={word}", "--device=cpu")
    rows = out.strip().splitlines()[3:]
    assert status == 0 and str(concept) in [row.split()[0] for row in rows], out
    assert "report" not in out

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize("where, needed", [
    ("", "by number"), ("#/read", "Passage 4"), ("#/{best}", "Nearest concepts"),
    ("#/99999", "not in this report")])
def test_the_report_opens_in_a_browser_from_disk(cocomix, where, needed, tmp_path):
    folder, *_, index = cocomix
    assert run(concepts.main, folder, "--device=cpu")[0] == 0
    url = (Path(folder) / "concepts.html").as_uri() + where.format(best=used(index)[0])
    page = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
         "--virtual-time-budget=3000", "--dump-dom", url],
        capture_output=True, text=True, timeout=60).stdout
    assert needed in page.partition("</main>")[0]

@pytest.mark.parametrize("keys", [["--find=None"], ["--find=none", "--top=3"]])
def test_every_word_can_be_searched_for(cocomix, keys):
    status, _, err = run(concepts.main, cocomix[0], *keys, "--device=cpu")
    assert status == 1 and keys[0][2:].replace("=", "='") in err  # this text has no such word

def test_a_kept_checkpoint_has_an_index_and_a_report_of_its_own(cocomix, tmp_path):
    folder = shutil.copytree(cocomix[0], tmp_path / "run",
                             ignore=shutil.ignore_patterns("concepts.*"))
    shutil.copy(folder / "ckpt.pt", folder / "step_8.pt")
    status, out, err = run(concepts.main, folder / "step_8.pt", "--tokens=1000", "--device=cpu")
    assert status == 0 and (folder / "concepts-step_8.pt").is_file(), err
    assert f"sample.py {folder}/step_8.pt" in (folder / "concepts-step_8.html").read_text()
    assert not (folder / "concepts.pt").exists() and not (folder / "concepts.html").exists()
    status, out, err = run(sample.main, folder / "step_8.pt", "--inspect", "--max_new_tokens=1",
                           "--device=cpu")
    assert status == 0 and "building" not in out, err

def test_parts_of_characters_are_told_apart(cocomix):
    tokenizer, index = tokenizer_of_run(cocomix[1]), cocomix[4]
    text = "数据模型".encode()  # the tokenizer's tokens are bytes
    window = [-1] * (BEFORE - 7) + list(text[2:9]) + list(text[9:12]) + [97] * (AFTER - 2)
    index = index._replace(
        contexts=torch.tensor(window).expand(48, 6, -1), next_tokens=torch.tensor(
            [list(text[:3]) + [-1] * (index.next_tokens.shape[1] - 3)]).expand(48, -1))
    entry = describe(index, 5, tokenizer)
    before, mark, after, _ = entry["contexts"][0]
    assert (before, mark, after) == ("据模", "\\xe5", "型" + "a" * (AFTER - 2))
    assert [token for token, *_ in entry["next"]] == ["\\xe6", "\\x95", "\\xb0"]
    assert index.name(5, tokenizer) == r"'\xe6' '\x95' '\xb0'"

def test_words_and_weights_exclude_each_other(cocomix):
    status, _, err = run(concepts.main, cocomix[0], "--find=a", "--weights")
    assert status == 1 and "--weights and --find exclude each other" in err
