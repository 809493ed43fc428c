"""Device headers compiled for this machine, where they hold nothing but arithmetic."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

from dak_inductor.cuda_runtime.nvrtc import KERNELS

PRELUDE = """
#include <algorithm>
#include <cmath>
#include <vector>
#define __device__
#define __forceinline__ inline
#define __fdividef(a, b) ((a) / (b))
#define __cvta_generic_to_shared(pointer) 0
#define __clz(word) __builtin_clz(word)
using std::max;
using std::min;
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> void __stcg(T* address, T value) { *address = value; }
static void __threadfence() {}
static float rsqrtf(float number) { return 1 / std::sqrt(number); }
static unsigned atomicInc(unsigned* word, unsigned last) {
  const unsigned before = *word;
  *word = before >= last ? 0 : before + 1;
  return before;
}
"""
"""What device code asks of its compiler, for one thread: headers follow."""


def compile_for_host(source: str, folder: Path, *options: str) -> ctypes.CDLL:
    """A library of `source`, which may include headers of `cuda_runtime/kernels`."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "the extension needs a C++ compiler, and so does this test"
    written, library = folder / "source.cpp", folder / "library.so"
    written.write_text(source)
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{KERNELS}", *options]
    subprocess.run([*command, str(written), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
