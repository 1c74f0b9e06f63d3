"""README.md and docs/: what they show of results/ is what lies there, and every file, link, key and
command that they name exists. Quoted code is checked in test_docs.py.

    <!-- from FILE -->
    the content of FILE, in a code fence or not
    <!-- end -->
"""
import re
import shutil
import subprocess
from dataclasses import fields

import pytest
from test_docs import PAGES, ROOT
from test_experiments import experiment
from test_prepare import script

import bench
import concepts
import eval as evaluation
import sae
import sample
import train
from support import hub
from support.cli import parse

CONFIGS = {"train.py": train.Config, "sae.py": sae.Config, "concepts.py": concepts.Config,
           "sample.py": sample.Config, "eval.py": evaluation.Config, "bench.py": bench.Config,
           "data/openwebtext/prepare.py": hub.Config, "data/openwebmath/prepare.py": hub.Config,
           "data/text/prepare.py": script("text").Config,
           "data/stdlib/prepare.py": script("stdlib").Config, "results/run.py": experiment.Config}
FILES = dict.fromkeys(("train.py", "sae.py", "bench.py"), True) | {"concepts.py": "shared"}
DEMO = {f"out/stdlib/{name}" for name in ("gpt", "sae", "ntp", "cocomix")}  # built by make demo
OTHER_KEYS = {"debug", "help", "standalone", "nproc_per_node", "torch"}  # of torchrun, of pip, …
page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

def fences(page):
    """The content of every ``` block without a language or with bash, in order."""
    blocks, lines, kind = [], [], None
    for line in page.read_text().splitlines():
        if not line.startswith("```"):
            lines.append(line)
        elif kind is None:
            kind, lines = line, []
        else:
            if kind in ("```", "```bash"):
                blocks.append("\n".join(lines))
            kind = None
    assert kind is None, "a ``` that is not closed"
    return blocks

# -- files, links, keys ----------------------------------------------------------------------------

def shown(page):
    """[(file, what the page shows of it)]"""
    return re.findall(r"<!-- from (\S+) -->\n(.*?)\n<!-- end -->", page.read_text(), re.S)

@page_by_page
def test_what_is_shown_of_a_file_is_its_content(page):
    assert len(shown(page)) == len(re.findall(r"<!-- from \S+ -->", page.read_text()))
    for file, text in shown(page):
        text = re.sub(r"^```\w*\n|\n```$", "", text)
        assert text.strip() == (ROOT / file).read_text().strip(), file

def test_results_are_shown():
    assert sum(len(shown(page)) for page in PAGES) >= 5

def anchors(page):
    """GitHub's anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

@page_by_page
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link

@page_by_page
def test_files_that_are_named_exist(page):
    """Such as `config/gpt2_124m.py`, but not data/mine/… or names in capitals: data/NAME/…."""
    names = re.findall(r"\b(?:config|support|tests|results|docs|data|assets)/[\w./-]+\.\w+\b",
                       re.sub(r"https?://\S+", "", page.read_text()))
    for name in names:
        placeholder = re.search(r"/[A-Z]+\b(?!\.md)", name) or name.startswith("data/mine")
        assert placeholder or (ROOT / name).exists(), name

@page_by_page
def test_keys_that_are_named_exist(page):
    known = {f.name for cls in CONFIGS.values() for f in fields(cls)} | OTHER_KEYS
    known |= {"nnodes", "rdzv_backend", "rdzv_endpoint"}
    named = re.findall(r"(?<![\w-])--([a-z]\w*)", page.read_text())
    assert set(named) <= known, set(named) - known

# -- commands --------------------------------------------------------------------------------------

STUBS = """
python() { (IFS=$'\\x1f'; echo "$*"); }
torchrun() { while [[ $1 == --* ]]; do shift; done; python "$@"; }
make() { echo "make"$'\\x1f'"$*"; }
PATH=
"""

def commands(page):
    """The arguments of every command in a page's blocks, as bash expands loops, globs, braces."""
    blocks = [block for block in fences(page) if re.match(r"(python|torchrun|make|for|#) ", block)]
    out = subprocess.run(["bash", "-ec", STUBS + "\n".join(blocks)], capture_output=True, text=True,
                         check=True, cwd=ROOT).stdout
    return [line.split("\x1f") for line in out.splitlines()]

def check_command(name, argv, built):
    """Its script takes the arguments, and the runs that it reads are in `built`; adds its own."""
    cfg, rest = parse(CONFIGS[name], argv, files=FILES.get(name, False))
    if name == "results/run.py":
        assert (ROOT / rest[0] / "experiment.py").is_file(), rest
        return
    read = {*rest, *(str(getattr(cfg, key, "")) for key in ("concept_model", "sae"))}
    missing = {path for path in read if path.startswith("out/")} - built
    assert not missing and all(path.startswith("out/") for path in rest), (name, argv)
    if name in ("train.py", "sae.py"):
        built.add(cfg.out_dir)

@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@page_by_page
def test_every_command_is_one_that_its_script_takes(page):
    built, makefile = set(DEMO), (ROOT / "Makefile").read_text()
    for name, *argv in commands(page):
        if name == "make":
            assert re.search(rf"^{argv[0].split()[0]}:", makefile, re.M), argv
        else:
            check_command(name, argv, built)

@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_commands_are_shown():
    seen = [name for page in PAGES for name, *_ in commands(page) if name != "make"]
    assert len(seen) > 40 and set(seen) >= {"train.py", "sae.py", "concepts.py", "sample.py",
                                            "eval.py"}

@pytest.mark.parametrize("command, problem", [
    ("train.py config/stdlib_npt.py", "no config file"), ("eval.py out/x", "eval.py"),
    ("sample.py out/stdlib/ntp --stear=3:2", "unknown key 'stear'"),
    ("train.py --concept_model=out/x", "train.py"), ("results/run.py results/none", "results/none"),
])
def test_a_wrong_command_is_noticed(command, problem):
    name, *argv = command.split()
    with pytest.raises(Exception, match=problem):
        check_command(name, argv, set(DEMO))

def test_the_five_steps_are_a_list():
    text = (ROOT / "README.md").read_text()
    assert [int(n) for n in re.findall(r"^(\d)\. \*\*", text, re.MULTILINE)] == [1, 2, 3, 4, 5]

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_list_is_wrapped_into_a_paragraph(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"[.:] (?:[2-9]\. |- )\*\*", text)
