"""The archive that ComfyUI's registry distributes: what is under version control, less what .comfyignore names."""

import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def listed(*options: str) -> set[str]:
    """Files that `git ls-files` names; the test is skipped where this folder is no checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the archive is not known")
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name}


def archive_files() -> list[str]:
    """Their names. git reads the file of patterns itself, whose rules are those of .gitignore."""
    kept_out = listed("--cached", "--ignored", "--exclude-from=.comfyignore")
    return sorted(name for name in listed() - kept_out if (ROOT / name).is_file())


def write_archive(path: Path) -> Path:
    """Packs them as `comfy node pack` does; the path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in archive_files():
            archive.write(ROOT / name, name)
    return path
