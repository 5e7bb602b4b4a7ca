"""What gets installed, what an import costs, and that the README's commands exist."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE_FOLDERS = ("wmpo_gym", "algorithms", "envs")
SOURCES = sorted(f for d in (*PACKAGE_FOLDERS, "tests", "examples") for f in (ROOT / d).rglob("*.py"))


def run_python(code: str, **kwargs) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def source_files(root: Path) -> dict[str, Path]:
    """Every file of the package as the wheel should name it, in a copy of the tree or the tree itself."""
    files = {}
    for folder in PACKAGE_FOLDERS:
        name = folder if folder == "wmpo_gym" else f"wmpo_gym/{folder}"
        for file in (root / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
                files[f"{name}/{file.relative_to(root / folder).as_posix()}"] = file
    return files


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, list[str], zipfile.ZipFile, zipfile.ZipFile]:
    """A copy of the tree, the names in its sdist, its wheel, and the wheel made from the sdist."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in PACKAGE_FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"

    def make(kind: str, where: Path) -> Path:
        command = [sys.executable, "-W", "ignore", "-c", build, kind, str(out / where.name)]
        (out / where.name).mkdir(exist_ok=True)
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return out / where.name / done.stdout.split()[-1]

    sdist = make("build_sdist", tree)
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        # The filter came with Python 3.10.12 and 3.11.4; distributions still ship older ones.
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(out / "unpacked", **safely)
    unpacked = next((out / "unpacked").iterdir())
    wheels = [zipfile.ZipFile(make("build_wheel", where)) for where in (tree, unpacked)]
    return tree, names, *wheels


def test_wheel_holds_the_whole_package_and_nothing_else(distributions):
    tree, _, *wheels = distributions
    for archive in wheels:
        names = archive.namelist()
        assert {n.split("/")[0] for n in names} == {"wmpo_gym", "wmpo_gym-0.1.0.dist-info"}
        packaged = {n for n in names if n.startswith("wmpo_gym/")}
        assert packaged == set(source_files(tree))
        assert "wmpo_gym/py.typed" in packaged
        assert {n.split("/")[1] for n in packaged if n.count("/") > 1} >= {
            "algorithms",
            "envs",
            "data",
            "cli",
        }
        assert any(n.startswith("wmpo_gym/envs/simulated/assets/") for n in packaged)
        assert (
            "wmpo = wmpo_gym.cli.main:main"
            in archive.read("wmpo_gym-0.1.0.dist-info/entry_points.txt").decode()
        )
        assert any(n.endswith("licenses/LICENSE") for n in names)


def test_bundled_weights_are_packaged_and_small():
    weights = [f for f in source_files(ROOT).values() if "pretrained" in f.parts]
    assert weights, "wmpo_gym/pretrained holds the bundled world and policy"
    assert sum(f.stat().st_size for f in weights) <= 15 * 2**20
    assert {f.suffix for f in weights} <= {".safetensors", ".json", ".md"}


def test_sdist_holds_real_files(distributions):
    tree, names, *_ = distributions
    root = names[0].split("/")[0]
    assert {f"{root}/{n}" for n in source_files(tree)} <= set(names)


def test_root_folders_are_linked_into_the_package():
    for name in ("algorithms", "envs"):
        link = ROOT / "wmpo_gym" / name
        assert link.is_symlink() and not link.readlink().is_absolute()
        assert link.resolve() == (ROOT / name).resolve() and not (ROOT / name).is_symlink()


def test_no_import_bypasses_the_package():
    assert SOURCES
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno} imports relatively; write wmpo_gym.…"
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("algorithms", "envs"), (
                    f"{file}:{node.lineno} imports {name}"
                )


def test_every_folder_of_modules_is_a_package():
    for file in SOURCES:
        if file.relative_to(ROOT).parts[0] in PACKAGE_FOLDERS:
            assert (file.parent / "__init__.py").exists(), f"{file} would be left out of the wheel"


def test_test_files_have_names_of_their_own():
    names = [f.name for f in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest imports test files by base name"


def test_import_is_light(tmp_path):
    code = (
        "import sys, wmpo_gym; "
        "heavy = {'torch', 'mujoco', 'transformers', 'diffusers', 'stable_baselines3', 'av'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    run_python(code, cwd=tmp_path)


def test_versions_agree():
    import wmpo_gym

    assert f'version = "{wmpo_gym.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_pinned_versions_fit_the_ranges():
    tomllib = pytest.importorskip("tomllib", reason="in the standard library since Python 3.11")
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins.setdefault(requirement.name, []).append(str(requirement.specifier).removeprefix("=="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for e in project["optional-dependencies"].values() for r in e)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "wmpo-gym":
            assert requirement.name in pins, f"constraints.txt does not pin {requirement.name}"
            assert all(requirement.specifier.contains(v) for v in pins[requirement.name]), requirement
    assert pins["torch"] == ["2.13.0"] and "torch==2.13.0" in (ROOT / "Makefile").read_text()


def test_ci_runs_the_readme_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and (ROOT / ".ci" / "run").stat().st_mode & 0o100


def readme_commands() -> list[str]:
    blocks = re.findall(
        r"^```(?:sh|bash|console|shell)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.strip().removeprefix("$ ")
        for line in lines
        if line.strip() and not line.lstrip().startswith("#")
    ]


@pytest.mark.parametrize("line", readme_commands())
def test_readme_command_exists(line):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(w in targets for w in words[1:] if "=" not in w)
    elif Path(words[0]).name == "wmpo":
        from wmpo_gym.cli.main import find_command

        find_command(words[1:])
    elif Path(words[0]).name in ("python", "python3"):
        assert words[1] in ("-m", "-c") or (ROOT / words[1]).exists()
    else:
        assert words[0] in ("pip", "git", "cd", "tensorboard"), f"no such command: {line}"
