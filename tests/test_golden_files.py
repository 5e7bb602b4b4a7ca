"""``pytest -k "golden or convert or parity"`` runs every test that reads a reference vector."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_golden_file_is_read_by_a_test():
    sources = [file.read_text(encoding="utf-8") for file in TESTS.rglob("*.py")]
    read = {name for text in sources for name in re.findall(r'golden\("(\w+)"\)', text)}
    assert read == {file.stem for file in (TESTS / "golden").glob("*.safetensors")}


def test_readers_of_golden_files_are_found_by_that_word(golden, request):
    """The hook in ``conftest.py`` gives the word to whatever test has the fixture, as this one has."""
    assert callable(golden)
    assert "golden" in request.node.extra_keyword_matches
