"""What the README shows is what lies under results/, and what it names exists."""
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import bench
import concepts
import config
import eval as evaluation
import sae
import sample
import train
from data import hub
from test_data import script

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks():
    """[(file, what the README shows of it)]: a comment `<!-- from FILE -->`, then the text up to `<!-- end -->`."""
    return re.findall(r"<!-- from (\S+) -->\n(.*?)\n<!-- end -->", README, re.S)


def test_every_block_from_results_equals_its_file():
    assert len(blocks()) >= 2
    for name, shown in blocks():
        shown = re.sub(r"^```\w*\n|\n```$", "", shown)
        assert shown.strip() == (ROOT / name).read_text().strip(), name


def test_files_and_links_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^(?:python|make) .*", README, re.M))))
def test_commands_name_files_that_exist(command):
    words = command.split("#")[0].split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    for word in words[1:]:
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), word


def commands():
    """The arguments of every python command in the README's blocks, as bash makes them of loops, globs and braces."""
    stubs = "python() { (IFS=$'\\x1f'; echo \"$*\"); }; make() { :; }; torchrun() { while [[ $1 == --* ]]; do shift; done; python \"$@\"; }; PATH=\n"
    blocks = [block for block in re.findall(r"^```(?:bash)?\n(.*?)^```", README, re.S | re.M) if re.match(r"(python|torchrun|make|for|#) ", block)]
    out = subprocess.run(["bash", "-ec", stubs + "\n".join(blocks)], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [line.split("\x1f") for line in out.splitlines()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_every_command_is_one_that_its_script_takes():
    configs = {"train.py": train.Config, "sae.py": sae.Config, "concepts.py": concepts.Config, "sample.py": sample.Config, "eval.py": evaluation.Config, "bench.py": bench.Config,
               "data/openwebtext/prepare.py": hub.Config, "data/openwebmath/prepare.py": hub.Config, "data/text/prepare.py": script("text").Config}
    seen = commands()
    assert len(seen) > 40 and {name for name, *_ in seen} <= set(configs)
    made = {"out/stdlib/ntp", "out/stdlib/cocomix", "out/stdlib/gpt", "out/stdlib/sae"}  # by make demo
    for name, *argv in seen:
        cfg, rest = config.parse(configs[name], argv, files="shared" if name == "concepts.py" else name in ("train.py", "sae.py", "bench.py"))
        needed = {*rest, *(getattr(cfg, key) for key in ("concept_model", "sae") if str(getattr(cfg, key, "")).startswith("out/"))}
        assert needed <= made, (name, argv)  # what a command reads, one before it has made
        if name in ("train.py", "sae.py"):
            made.add(cfg.out_dir)
