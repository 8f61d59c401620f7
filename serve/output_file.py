"""Files that commands leave behind: whether one can be written is known before the work, and it is written whole."""

from __future__ import annotations

import os
from pathlib import Path

from preble_jax.errors import ConfigError


def require_writable(flag: str, path: Path | None) -> None:
    """Before anything is measured or simulated, lest it is lost. Raises ConfigError."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{flag}: expected a file in a folder that exists, got {path}; make the folder first")
    if path.is_dir():
        raise ConfigError(f"{flag}: expected a file, got the folder {path}; name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{flag}: expected a file that may be written, got {path}; name another one")


def write_file(flag: str, path: Path, text: str) -> None:
    """Raises ConfigError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{flag}: expected to write {len(text)} characters to {path}, got {error.strerror or error}; what is there"
            " is not whole: make room, or name another file, and run it again"
        ) from error
