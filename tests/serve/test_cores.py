"""Sharing out CPU cores."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from serve.cores import has_accelerator, split_cores


@given(cores=st.lists(st.integers(0, 500), unique=True, max_size=64), num_groups=st.integers(1, 80))
def test_shares_are_equal_and_apart(cores: list[int], num_groups: int) -> None:
    shares = split_cores(cores, num_groups)
    if num_groups > len(cores):
        assert shares is None
        return
    assert shares is not None
    assert len(shares) == num_groups
    assert {len(share) for share in shares} == {len(cores) // num_groups}
    flat = [core for share in shares for core in share]
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(cores)


def test_an_accelerator_is_seen_by_its_device_file(tmp_path: Path) -> None:
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # the driver's own file, there without any device
    (tmp_path / "nvidiactl").touch()
    assert not has_accelerator(tmp_path)
    (tmp_path / "vfio" / "3").touch()
    assert has_accelerator(tmp_path)
