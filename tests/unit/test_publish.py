"""What is published: the contents of the archive, the pictures, and the files that a code host reads."""

import zipfile
from pathlib import Path

import pytest
from archive import ROOT, archive_files, listed, write_archive
from PIL import Image

LIMIT = 14_000_000  # bytes; 12 of them are the bundled models


def test_archive_is_small(tmp_path: Path) -> None:
    assert write_archive(tmp_path / "node.zip").stat().st_size < LIMIT


def test_archive_has_no_file_for_developers() -> None:
    tops = {name.split("/")[0] for name in archive_files()}
    assert tops == {"CHANGELOG.md", "LICENSE", "NOTICE", "README.md", "SECURITY.md", "__init__.py", "allegro_model", "docs",
                    "locales", "nodes", "pyproject.toml", "web", "workflows"}
    assert [name for name in archive_files() if name.startswith("docs/")] == ["docs/scripts.md"]


@pytest.mark.parametrize("folder", ["allegro_model", "locales", "nodes", "web", "workflows"])
def test_archive_has_every_file_of(folder: str) -> None:
    assert {n for n in archive_files() if n.startswith(folder + "/")} == set(listed(folder))


def test_archive_holds_what_is_on_disk(tmp_path: Path) -> None:
    with zipfile.ZipFile(write_archive(tmp_path / "node.zip")) as archive:
        assert archive.namelist() == archive_files()
        assert archive.read("nodes/schema.py") == (ROOT / "nodes" / "schema.py").read_bytes()


def test_pictures_have_the_shapes_that_the_registry_asks_for() -> None:
    with Image.open(ROOT / "docs" / "icon.png") as icon:
        assert icon.width == icon.height <= 400
    with Image.open(ROOT / "docs" / "banner.png") as banner:
        assert banner.width * 9 == banner.height * 21
    assert (ROOT / "docs" / "banner.png").stat().st_size < 300_000
