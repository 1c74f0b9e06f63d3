"""The code that README.md and docs/ quote is verbatim. A quote looks like this:

    <!-- from FILE: NAME -->
    ```python
    consecutive lines of the function or class NAME, with their common indentation removed
    ```
    <!-- end -->
"""
import ast
import re
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHOD = ("model.py", "sae.py", "concepts.py", "train.py")

def quotes(page):
    """[(file, name, code)] of a page."""
    return re.findall(r"<!-- from (\S+): (\S+) -->\n```python\n(.*?)\n```\n<!-- end -->",
                      page.read_text(), re.S)

def definition(file, name):
    """The source lines of a function or class, such as GPT.forward."""
    text = (ROOT / file).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        assert found, f"{file} has no {name}"
        node = found[0]
    return text.splitlines()[node.lineno - 1:node.end_lineno]

def excerpts(lines, n):
    return {dedent("\n".join(lines[i:i + n])) for i in range(len(lines) - n + 1)}

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_code_is_verbatim(page):
    text = page.read_text()
    assert len(quotes(page)) == len(re.findall(r"<!-- from \S+: ", text)), "a malformed quote"
    for file, name, code in quotes(page):
        assert code in excerpts(definition(file, name), len(code.splitlines())), (
            f"{page.name} quotes {file}: {name}, which now reads differently")

def test_the_walk_through_quotes_every_method_file():
    quoted = quotes(ROOT / "docs" / "method.md")
    assert {file for file, _, _ in quoted} >= set(METHOD)
    assert all(len(code.splitlines()) <= 25 for _, _, code in quoted)
