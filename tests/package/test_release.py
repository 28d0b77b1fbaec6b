"""A release: its version, the symbols of a library, links, and the files of an sdist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from release import address, symbols, versions

ROOT = Path(__file__).resolve().parents[2]
DAY = "2026-12-31"


def change(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), flags=re.M)
    assert count, f"{path.name} has no {pattern}"
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Return a copy of the files with a version, ready for the tag v1.2.3."""
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "release", tmp_path / "release")
    change(tmp_path / "pyproject.toml", r'^version = ".*"$', 'version = "1.2.3"')
    heading = f"## [1.2.3] - {DAY}\n\n### Fixed\n\n- All.\n\n## [1.2.2] - 2026-12-01"
    change(tmp_path / "CHANGELOG.md", rf"\A(?:.*\n)*?## \[{versions.declared()}\] - \S+$", heading)
    change(tmp_path / "CITATION.cff", "^version: .*$", f"version: 1.2.3\ndate-released: {DAY}")
    return tmp_path


def tagged(root: Path, tag: str) -> subprocess.CompletedProcess:
    """Run what the workflow runs on a tag."""
    command = [sys.executable, "-m", "release.versions", tag]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_all_files_have_one_version():
    assert versions.faults() == []


def test_a_tag_of_the_version_prints_the_changes(released: Path):
    done = tagged(released, "v1.2.3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "### Fixed\n\n- All.\n"


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "fault"),
    [
        ("pyproject.toml", '"1.2.3"', '"1.2.4"', "tag: expected v1.2.4, .* got v1.2.3"),
        ("CHANGELOG.md", "1.2.3", "1.2.4", "CHANGELOG.md: expected 1.2.3 .* got 1.2.4"),
        ("CHANGELOG.md", DAY, "unreleased", "CHANGELOG.md: expected the day .* got unreleased"),
        ("CHANGELOG.md", DAY, "2026-12-30", "date-released 2026-12-30, got 2026-12-31"),
        ("CITATION.cff", "1.2.3", "1.2.4", "CITATION.cff: expected version 1.2.3, got 1.2.4"),
        ("CITATION.cff", "^date-.*\n", "", f"expected date-released {DAY}, got unreleased"),
    ],
)
def test_a_tag_is_refused_where_a_file_disagrees(
    released: Path, file: str, pattern: str, replacement: str, fault: str
):
    change(released / file, pattern, replacement)
    done = tagged(released, "v1.2.3")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.search(fault, done.stderr)


def test_libraries_are_compiled_with_the_oldest_pytorch(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    from native_build.tools import OLDEST_TORCH

    oldest = ".".join(map(str, OLDEST_TORCH))
    workflow = (ROOT / ".github" / "workflows" / "dist.yml").read_text(encoding="utf-8")
    assert re.findall(r"DIST_TORCH: torch==(.*)\.0$", workflow, re.M) == [oldest]
    assert f'"torch>={oldest}",' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="reads a library of ELF")
def test_a_library_that_needs_more_than_the_stable_abi_is_found():
    if shutil.which("nm") is None:
        pytest.skip("needs nm, of binutils")
    package = Path(torch.__file__).parent
    abi = symbols.stable_abi(package / "include")
    assert {"aoti_torch_get_dim", "torch_parallel_for"} <= abi
    foreign = symbols.foreign(package / "lib" / "libtorch_python.so", package / "include")
    assert "PyTuple_New" in foreign, "Python's"
    assert [name for name in foreign if name.startswith("_ZN2at")], "of PyTorch's C++ classes"
    assert not [name for name in foreign if name.startswith("malloc") or name in abi]


def test_links_of_the_readme_lead_to_the_repository(tmp_path: Path):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    text = "[a](docs/how.md#x) ![b](docs/images/flow.svg) [c](examples) [d](https://e.org) [e](#f)"
    code = "`f[a](x)`\n\n```python\ny = g[b](x)\n```\n"
    assert address.absolute(code, "") == code
    made = address.absolute(text, "https://g.org/r/{}/v1")
    assert made == (
        "[a](https://g.org/r/blob/v1/docs/how.md#x) ![b](https://g.org/r/raw/v1/docs/images/flow.svg)"
        " [c](https://g.org/r/tree/v1/examples) [d](https://e.org) [e](#f)"
    )
    with pytest.raises(FileNotFoundError, match="link to docs/nothing.md"):
        address.absolute("[a](docs/nothing.md)", "https://g.org/r/{}/v1")
    for path in ROOT.iterdir():
        if not (tmp_path / path.name).exists():
            (tmp_path / path.name).symlink_to(path)
    address.main("https://g.org/r", "v1", tmp_path)
    links = re.findall(r"\]\(([^)]*)\)", (tmp_path / "README.md").read_text(encoding="utf-8"))
    others = [link for link in links if not link.startswith("https://")]
    assert len(links) > 10 and others == ["heads[t](z"], "the program stays as it is"
    metadata = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.urls]\nRepository = "https://g.org/r"\nPaper = ' in metadata


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_sdist_has_every_tracked_file(tmp_path: Path):
    pytest.importorskip("setuptools", minversion="77", reason="reads PEP 639 metadata")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist"], cwd=tmp_path, check=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as members:
        packed = {Path(*Path(name).parts[1:]).as_posix() for name in members.getnames()}
    assert len(tracked) > 100 and not {*tracked} - packed
