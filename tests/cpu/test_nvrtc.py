"""The compiler and its cache: keys, damaged entries, several processes, read-only folders."""

import dataclasses
import multiprocessing
import os
import shutil
import threading

import pytest

from dak_inductor.cuda_runtime import nvrtc, nvrtc_library
from dak_inductor.cuda_runtime.nvrtc import (
    KERNELS,
    Compiler,
    assemble,
    compiler_options,
    cubin_key,
    decode,
    encode,
    instance,
)
from dak_inductor.errors import CompilationError, UnsupportedDriverError

KERNEL = """
#include "part.cuh"
namespace dak {
struct AddOneConfiguration { int amount; bool twice; };
template <AddOneConfiguration configuration>
__global__ void add_one(int* values) {
  values[threadIdx.x] += amount_of(configuration.amount) * (configuration.twice ? 2 : 1);
}
}
"""
HEADER = "#pragma once\nnamespace dak { __device__ int amount_of(int a) { return a; } }\n"
ADD_ONE = instance("add_one", amount=3, twice=True)


@pytest.fixture
def kernels(tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "add_one.cu").write_text(KERNEL)
    (folder / "part.cuh").write_text(HEADER)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cubins"


def entries(folder):
    return [path for path in folder.iterdir() if path.suffix == ".cubin"]


def test_template_arguments_are_named():
    assert ADD_ONE.expression == (
        "dak::add_one<dak::AddOneConfiguration{.amount = 3, .twice = true}>"
    )
    assert instance("round_trip").expression == "dak::round_trip"


def test_compile_then_memory_then_disk(kernels, cache):
    compiler = Compiler(cache, kernels=kernels)
    first = compiler.cubin(ADD_ONE)
    assert first.image.startswith(b"\x7fELF") and "add_one" in first.symbol
    assert compiler.cubin(ADD_ONE) is first
    assert compiler.compilations == 1
    assert [path.name.startswith("add_one-") for path in entries(cache)] == [True]
    assert os.stat(cache).st_mode & 0o777 == 0o700

    again = Compiler(cache, kernels=kernels)
    assert again.cubin(ADD_ONE) == first
    assert again.compilations == 0


def test_another_configuration_is_another_kernel(kernels, cache):
    compiler = Compiler(cache, kernels=kernels)
    other = instance("add_one", amount=4, twice=True)
    assert compiler.cubin(ADD_ONE).image != compiler.cubin(other).image
    assert compiler.compilations == 2


def test_edited_header_compiles_again(kernels, cache):
    Compiler(cache, kernels=kernels).cubin(ADD_ONE)
    (kernels / "part.cuh").write_text(HEADER.replace("return a", "return a + 1"))
    compiler = Compiler(cache, kernels=kernels)
    compiler.cubin(ADD_ONE)
    assert compiler.compilations == 1
    assert len(entries(cache)) == 2


def test_key_holds_everything_that_decides_the_binary():
    source = assemble("stream_read")
    assert {"types.cuh", "ptx/mbarrier.cuh"} <= {name for name, _ in source.headers}
    kernel = instance("stream_read", threads=128, checksum=False)
    options = compiler_options("sm_90a")
    name, text = source.headers[0]
    edited = dataclasses.replace(source, headers=((name, text + " "), *source.headers[1:]))
    moved = dataclasses.replace(source, headers=((name + "x", text), *source.headers[1:]))
    keys = [
        cubin_key(source, kernel, options, "nvrtc 13.0 1"),
        cubin_key(source, kernel, options, "nvrtc 13.1 1"),
        cubin_key(source, kernel, compiler_options("sm_100a"), "nvrtc 13.0 1"),
        cubin_key(source, kernel, (*options, "-lineinfo"), "nvrtc 13.0 1"),
        cubin_key(source, instance("stream_read", threads=64), options, "nvrtc 13.0 1"),
        cubin_key(dataclasses.replace(source, text=" "), kernel, options, "nvrtc 13.0 1"),
        cubin_key(edited, kernel, options, "nvrtc 13.0 1"),
        cubin_key(moved, kernel, options, "nvrtc 13.0 1"),
    ]
    assert len(set(keys)) == len(keys)
    assert cubin_key(source, kernel, options, "nvrtc 13.0 1") == keys[0]


def cut(content):
    return content[: len(content) // 2]


def flip_last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def flip_symbol(content):
    return content.replace(b"add_one", b"sub_one", 1)


def empty(content):
    return b""


@pytest.mark.parametrize("damage", [cut, flip_last_byte, flip_symbol, empty])
def test_damaged_entry_is_a_miss_and_is_replaced(kernels, cache, damage):
    first = Compiler(cache, kernels=kernels).cubin(ADD_ONE)
    (path,) = entries(cache)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    compiler = Compiler(cache, kernels=kernels)
    assert compiler.cubin(ADD_ONE).image == first.image
    assert compiler.compilations == 1
    assert path.read_bytes() == good


def test_entry_of_another_key_is_a_miss():
    cubin = nvrtc.Cubin("add_one", "k" * 64, "symbol", "log", b"\x7fELF")
    assert decode(encode(cubin), "add_one", "k" * 64) == cubin
    assert decode(encode(cubin), "add_one", "j" * 64) is None
    assert decode(encode(cubin), "sub_one", "k" * 64) is None


def test_folder_of_others_is_neither_read_nor_written(kernels, cache):
    Compiler(cache, kernels=kernels).cubin(ADD_ONE)
    (path,) = entries(cache)
    path.unlink()
    os.chmod(cache, 0o777)
    compiler = Compiler(cache, kernels=kernels)
    compiler.cubin(ADD_ONE)
    assert compiler.compilations == 1
    assert entries(cache) == []


def test_folder_of_another_user_is_neither_read_nor_written(kernels, cache, monkeypatch):
    Compiler(cache, kernels=kernels).cubin(ADD_ONE)
    (path,) = entries(cache)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    compiler = Compiler(cache, kernels=kernels)
    compiler.cubin(ADD_ONE)
    assert compiler.compilations == 1, "what another user put there is not loaded"
    path.unlink()
    Compiler(cache, kernels=kernels).cubin(ADD_ONE)
    assert entries(cache) == []


def test_symlink_is_not_a_private_folder(kernels, cache, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    Compiler(cache, kernels=kernels).cubin(ADD_ONE)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_folder_that_cannot_be_made_leaves_memory(kernels, tmp_path):
    (tmp_path / "file").write_text("")
    compiler = Compiler(tmp_path / "file" / "cubins", kernels=kernels)
    first = compiler.cubin(ADD_ONE)
    assert compiler.cubin(ADD_ONE) is first
    assert compiler.compilations == 1


def test_read_only_folder_leaves_memory(kernels, cache, monkeypatch):
    cache.mkdir(mode=0o700)

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    # the tests may run as root, whom file modes do not stop
    monkeypatch.setattr("dak_inductor.private_files.tempfile.mkstemp", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("dak_inductor.cuda_runtime.nvrtc.assemble", lambda *_: source)
    source = nvrtc.KernelSource("add_one", KERNEL, (("part.cuh", HEADER),))
    compiler = Compiler(cache, kernels=kernels)
    assert compiler.cubin(ADD_ONE) is compiler.cubin(ADD_ONE)
    assert compiler.compilations == 1
    assert list(cache.iterdir()) == []


def test_threads_compile_once(kernels, cache):
    compiler = Compiler(cache, kernels=kernels)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(compiler.cubin(ADD_ONE))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({id(cubin) for cubin in found}) == 1
    assert compiler.compilations == 1


def compile_in_process(kernels, cache, barrier, results):
    compiler = Compiler(cache, kernels=kernels)
    barrier.wait()
    cubin = compiler.cubin(ADD_ONE)
    results.put((compiler.compilations, cubin.key))


def test_processes_compile_once(kernels, cache):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (kernels, cache, barrier, results)
    processes = [context.Process(target=compile_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sum(compilations for compilations, _ in found) == 1
    assert len({key for _, key in found}) == 1
    assert len(entries(cache)) == 1


def test_compile_error_carries_the_log(kernels, cache):
    (kernels / "add_one.cu").write_text(KERNEL.replace("threadIdx.x", "thread_index"))
    with pytest.raises(CompilationError, match=r"(?s)add_one<.*thread_index.*undefined"):
        Compiler(cache, kernels=kernels).cubin(ADD_ONE)
    assert not cache.exists() or entries(cache) == []


def test_unknown_template_argument_is_an_error(kernels):
    with pytest.raises(CompilationError, match="colour"):
        Compiler(None, kernels=kernels).cubin(instance("add_one", colour=3))


def test_missing_kernel_and_header_are_named(kernels):
    with pytest.raises(CompilationError, match=r"'sub_one\.cu'"):
        Compiler(None, kernels=kernels).cubin(instance("sub_one"))
    (kernels / "part.cuh").unlink()
    with pytest.raises(CompilationError, match=r"add_one\.cu needs 'part\.cuh'"):
        Compiler(None, kernels=kernels).cubin(ADD_ONE)


def test_headers_outside_the_folder_are_refused(kernels, tmp_path):
    (tmp_path / "secret.cuh").write_text(HEADER)
    (kernels / "part.cuh").write_text('#include "../secret.cuh"\n')
    with pytest.raises(CompilationError, match=r"secret\.cuh"):
        assemble("add_one", kernels)


def test_headers_that_include_each_other(kernels):
    (kernels / "part.cuh").write_text('#pragma once\n#include "types.cuh"\n' + HEADER)
    shutil.copy(KERNELS / "types.cuh", kernels / "types.cuh")
    with open(kernels / "types.cuh", "a") as file:
        file.write('#include "part.cuh"\n')
    assert [name for name, _ in assemble("add_one", kernels).headers] == ["part.cuh", "types.cuh"]
    assert Compiler(None, kernels=kernels).cubin(ADD_ONE).image


def test_library_is_found_and_versioned():
    library, builtins = nvrtc_library.find_nvrtc()
    assert "libnvrtc" in library and ".alt." not in library
    version = nvrtc.extension().Nvrtc(library, builtins=builtins).version
    assert version >= (12, 0)


def test_wrong_library_is_named(tmp_path):
    with pytest.raises(CompilationError, match=r"none\.so is no file"):
        Compiler(None, library=tmp_path / "none.so").cubin(instance("round_trip"))
    junk = tmp_path / "libnvrtc.so.13"
    junk.write_text("junk")
    with pytest.raises(CompilationError, match=r"cannot open .*libnvrtc\.so\.13"):
        Compiler(None, library=junk).cubin(instance("round_trip"))


def test_no_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc_library, "_folders", lambda: iter(()))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(CompilationError, match="nvidia-cuda-nvrtc"):
        nvrtc_library.find_nvrtc()


def test_missing_extension_says_how_to_build(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("dak_inductor.cuda_runtime.nvrtc.importlib.import_module", missing)
    nvrtc.extension.cache_clear()
    with pytest.raises(UnsupportedDriverError, match=r"pip install \."):
        nvrtc.extension()


def test_launching_without_a_driver_is_a_named_error(kernels):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    cubin = Compiler(None, kernels=kernels).cubin(ADD_ONE)
    with pytest.raises(UnsupportedDriverError):
        nvrtc.extension().Kernel(image=cubin.image, symbol=cubin.symbol, device=0)
