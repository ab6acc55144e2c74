"""How many threads are of use: affinity, cores, and the quotas of control groups, read from made-up systems too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moeshard
from moeshard import MoeshardError, _core

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="control groups and affinity are Linux's")


def system(root: Path, cgroup: str, mountinfo: str, files: dict[str, str], siblings: int = 1) -> str:
    """Make a folder that looks like /proc and /sys; `siblings` processors share each core."""
    files = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **files}
    for processor in os.sched_getaffinity(0):
        first = processor // siblings * siblings
        files[f"sys/devices/system/cpu/cpu{processor}/topology/core_cpus_list"] = f"{first}-{first + siblings - 1}"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return str(root)


V2 = "25 30 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw"
V1 = (
    "25 30 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "26 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
)


@LINUX
def test_quotas_of_control_groups(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))

    def threads(name: str, *system_of: object, **options: int) -> int:
        return _core.default_threads(system(tmp_path / name, *system_of, **options))  # type: ignore[arg-type]

    assert threads("none", "0::/", V2, {}) == cores
    own = "sys/fs/cgroup/a/b/cpu.max"
    above = "sys/fs/cgroup/a/cpu.max"
    assert threads("half", "0::/a/b", V2, {own: "50000 100000"}) == 1
    assert threads("max", "0::/a/b", V2, {own: "max 100000"}) == cores
    assert threads("plenty", "0::/a/b", V2, {own: "6400000 100000"}) == cores
    assert threads("above", "0::/a/b", V2, {own: "max 100000", above: "100000 100000"}) == 1
    # One and a half is one: the second thread would be stopped half of the time while the first waits for it.
    assert threads("and a half", "0::/a/b", V2, {own: "150000 100000"}) == 1
    v1 = {
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "50000",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
    }
    assert threads("v1", "4:memory:/\n3:cpu,cpuacct:/a/b", V1, v1) == 1
    v1 = {name: value.replace("50000", "-1") for name, value in v1.items()}
    assert threads("v1 without", "3:cpu,cpuacct:/a/b", V1, v1) == cores
    # In a container the mount shows a part of the hierarchy.
    part = V2.replace(" / /sys", " /docker/x /sys")
    assert threads("container", "0::/docker/x", part, {"sys/fs/cgroup/cpu.max": "50000 100000"}) == 1


@LINUX
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_processors_of_one_core_count_once(tmp_path: Path) -> None:
    both = sorted(os.sched_getaffinity(0))
    pairs = len({processor // 2 for processor in both})
    assert _core.default_threads(system(tmp_path, "0::/", V2, {}, siblings=2)) == pairs


@LINUX
def test_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from moeshard import _core; print(_core.default_threads())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize("n_threads", [-1, 513, 100_000])
def test_numbers_that_make_no_sense(tinymoe: Path, n_threads: int, tmp_path: Path) -> None:
    model = moeshard.Model(tinymoe, n_threads=n_threads)
    with pytest.raises(MoeshardError, match="n_threads must be from 1 to 512"):
        model.logits([1])
    with pytest.raises(MoeshardError, match="jobs must be from 1 to 512"):
        moeshard.split(tinymoe, ["0-63"], tmp_path / "shards", jobs=n_threads)


@LINUX
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may become somebody else")
def test_threads_that_cannot_be_started(tinymoe: Path, tmp_path: Path) -> None:
    """With a limit on processes fewer threads do it, for computing and for copying."""
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        if folder != Path("/tmp") and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    code = """
import os, resource, sys
import numpy as np
import moeshard
from moeshard import _core
model = moeshard.Model(sys.argv[1], n_threads=8)
wanted = moeshard.Model(sys.argv[1], n_threads=1).logits([1, 2, 3])
resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
os.setuid(54321)
found = model.logits([1, 2, 3])
assert np.array_equal(found, wanted)
files = _core.shard_segments(moeshard.GGUFMap(sys.argv[1]), model.keep("0-63"))
_core.write_segments(files, [sys.argv[2]], jobs=8)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tinymoe), str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    if "Permission denied" in done.stderr:
        pytest.skip("another user cannot read this checkout")
    assert done.returncode == 0, done.stderr


def test_more_threads_compute_the_same(tinymoe: Path) -> None:
    one, two = (moeshard.Model(tinymoe, n_threads=n).logits([1, 2, 3]) for n in (1, 2))
    np.testing.assert_array_equal(one, two)
