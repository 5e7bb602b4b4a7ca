"""Python blocks of README and documentation run, shell blocks name real commands, local links resolve."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if not {"research-log", "results"} & set(p.parts)),
]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)


def blocks(page: Path, *languages: str) -> list[str]:
    found = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, *marks = block["info"].split() or [""]
        if language in languages and "notest" not in marks:
            found.append(re.sub(rf"^{block['indent']}", "", block["code"], flags=re.M))
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """The blocks of a page run one after another in one namespace, in an empty directory."""
    (tmp_path / "page.py").write_text("\n\n".join(blocks(page, "python")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh", "bash", "console")], ids=name)
def test_commands_exist(page: Path) -> None:
    from wmpo_gym.cli.main import find_command

    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for block in blocks(page, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] == "wmpo":
                find_command(words[1:])
            elif words and words[0] == "make":
                assert all(w in targets for w in words[1:] if "=" not in w), line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_local_links_resolve(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)} links to {target}"
