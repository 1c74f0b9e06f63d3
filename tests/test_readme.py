"""What the README shows is what lies under results/, and what it names exists."""
import re
from pathlib import Path

import pytest

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
