"""The Python blocks of the pages that show how to use the package run as they stand, from top to bottom."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def blocks(page):
    """(number of its first line, source) of each block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in BLOCK.finditer(text)]


def run(page, wanted=lambda source: True):
    names = {"__name__": page}
    for line, source in blocks(page):
        if wanted(source):
            # So many empty lines in front that a traceback shows the page's own line numbers.
            exec(compile("\n" * (line - 1) + source, str(ROOT / page), "exec"), names)


def test_every_block_of_the_serving_page():
    pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    assert len(blocks("docs/serving.md")) > 10
    run("docs/serving.md")


def test_the_blocks_of_the_readme():
    """All but the one that loads a model by a name of the reader's."""
    run("README.md", lambda source: "from_pretrained(name" not in source)


def test_lines_are_not_too_long():
    for line, source in blocks("docs/serving.md"):
        assert max(map(len, source.splitlines())) <= 120, line
