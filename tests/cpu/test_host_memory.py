"""Available host memory from MemAvailable and control groups of both versions."""

from pathlib import Path

import pytest

from dak_inductor.cuda_runtime.host_memory import available_host_memory, check_host_memory
from dak_inductor.errors import HostMemoryError

GB = 10**9


def machine(root: Path, available_kib: int, group: str, files: dict[str, str]) -> Path:
    for name, text in {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:  {available_kib} kB\n",
        "proc/self/cgroup": group,
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_groups_it_is_mem_available(tmp_path):
    root = machine(tmp_path, 5_000, "0::/\n", {})
    assert available_host_memory(root) == 5_000 * 1024


def test_version_two_counts_reclaimable_file_cache_as_free(tmp_path):
    root = machine(
        tmp_path,
        10**9,
        "0::/app\n",
        {
            "sys/fs/cgroup/app/memory.max": "1000000\n",
            "sys/fs/cgroup/app/memory.current": "700000\n",
            "sys/fs/cgroup/app/memory.stat": "anon 5\ninactive_file 150000\nactive_file 50000\n",
        },
    )
    assert available_host_memory(root) == 1_000_000 - (700_000 - 200_000)


def test_version_two_takes_the_tightest_group_on_the_way_up(tmp_path):
    folder = "sys/fs/cgroup/"
    root = machine(
        tmp_path,
        10**9,
        "0::/outer/inner\n",
        {
            folder + "outer/inner/memory.max": "max\n",
            folder + "outer/inner/memory.current": "10\n",
            folder + "outer/memory.max": "500\n",
            folder + "outer/memory.current": "100\n",
        },
    )
    assert available_host_memory(root) == 400


def test_version_one(tmp_path):
    folder = "sys/fs/cgroup/memory/"
    files = {
        folder + "memory.limit_in_bytes": "2000\n",
        folder + "memory.usage_in_bytes": "1500\n",
        folder + "memory.stat": "total_inactive_file 300\ntotal_active_file 200\ninactive_file 9\n",
    }
    root = machine(tmp_path, 10**9, "7:cpu:/\n5:memory:/a/b\n", files)
    assert available_host_memory(root) == 1_000
    (root / folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert available_host_memory(root) == 10**9 * 1024


def test_this_machine_has_some():
    assert available_host_memory() > 0


def test_the_refusal_has_the_arithmetic():
    with pytest.raises(HostMemoryError) as caught:
        check_host_memory(7 * GB, 5 * GB, "offloading Llama")
    message = str(caught.value)
    assert "offloading Llama needs 7.00 GB" in message
    assert "5.00 GB are given as host_memory=5000000000" in message
    assert "2.00 GB are missing" in message and "Nothing was allocated" in message
    with pytest.raises(HostMemoryError, match="left of host_memory"):
        check_host_memory(2 * GB, 5 * GB, "more", taken=4 * GB)
    with pytest.raises(HostMemoryError, match="MemAvailable"):
        check_host_memory(1 << 60, None, "too much")
    check_host_memory(5 * GB, 5 * GB, "enough")
