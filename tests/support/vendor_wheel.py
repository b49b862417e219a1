"""A tiny wheel of torch_npu, and the system software that it needs: plain C, compiled in a moment.

Its library registers kernels from its start-up code through torch's Python interface, so that no C++ is compiled.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

TORCH = metadata.version("torch").partition("+")[0]
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"

KERNELS = """
import sys, torch
run = lambda *inputs, **options: None
aten = torch.library.Library('aten', 'IMPL')
for name in ('mm', 'copysign.out', 'add.Tensor'):
    aten.impl(name, run, 'PrivateUse1')
aten.impl('native_dropout.out', run, 'AutogradPrivateUse1')
aten.impl('mm', run, 'AutocastPrivateUse1')
own = torch.library.Library('npu', 'DEF')
own.define('npu_twice(Tensor x, float scale=2.0) -> Tensor')
own.impl('npu_twice', run, 'PrivateUse1')
own.define('npu_alone(Tensor x) -> Tensor')
sys.kept = [aten, own]
"""
FALLBACK = """
rest = torch.library.Library('_', 'IMPL', 'PrivateUse1')
rest.fallback(run)
sys.kept.append(rest)
"""

SYSTEM = """
long aclInit(void) { return 7; }
long HcclOpen(void) { return 7; }
long aclnnAdd(void) { return 7; }
long aclnnAddGetWorkspaceSize(void) { return 7; }
"""
VENDOR = """
#include <stdlib.h>
#include <string.h>
extern int PyGILState_Ensure(void);
extern void PyGILState_Release(int);
extern int PyRun_SimpleString(const char *);
extern long aclInit(void), HcclOpen(void);
extern long aclMayBeAbsent(void) __attribute__((weak));
long (*optional)(void) = aclMayBeAbsent;
const char *looked_up[] = {
    "aclnnAdd", "aclnnAddGetWorkspaceSize", "aclnnMul", "aclnnMulGetWorkspaceSize", "aclnnNotFound",
};
static const char code[] = CODE;
__attribute__((constructor)) static void start(void) {
    if (aclInit() != 0 || HcclOpen() != 0) exit(3);
    if (strcmp(code, "crash") == 0) abort();
    for (volatile long spin = 0; strcmp(code, "spin") == 0; spin++) {}
    int state = PyGILState_Ensure();
    if (PyRun_SimpleString(code) != 0) exit(4);
    PyGILState_Release(state);
}
"""


def compile_library(source: str, target: Path, *options: str) -> Path:
    """A shared library from C source."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_suffix(".c")
    file.write_text(source)
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-w",
        "-fno-builtin",
        f"-Wl,-soname,{target.name}",
        "-o",
        str(target),
        str(file),
    ]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return target


def vendor_library(folder: Path, code: str) -> bytes:
    """The main library: linked against system software that need not be there when it is loaded."""
    system = compile_library(SYSTEM, folder / "system" / "libascendcl.so")
    quoted = '"' + code.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    built = compile_library(VENDOR.replace("CODE", quoted), folder / "libtorch_npu.so", str(system))
    return built.read_bytes()


def write_wheel(
    path: Path,
    library: bytes,
    *,
    name: str = "torch_npu",
    version: str = f"{TORCH}.post1",
    torch: str | None = TORCH,
    tag: str | None = None,
    extra: dict[str, bytes] | None = None,
    damaged: tuple[str, ...] = (),
) -> Path:
    """A wheel around a main library. The hashes of `damaged` files are wrong in its RECORD."""
    info = f"torch_npu-{version}.dist-info"
    wants = f"Requires-Dist: torch=={torch}.*\n" if torch else ""
    tag = tag or f"{PYTHON}-{PYTHON}-manylinux_2_28_{platform.machine()}"
    files = {
        "torch_npu/__init__.py": b"",
        "torch_npu/lib/libtorch_npu.so": library,
        f"{info}/METADATA": f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{wants}".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n".encode(),
        **(extra or {}),
    }
    record = "".join(f"{file},sha256={hashed(b'x' if file in damaged else files[file])},\n" for file in files)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{info}/RECORD", record)
    return path


def hashed(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
