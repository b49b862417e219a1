"""Reading a vendor's wheel: a small one that is built here, broken ones, and the real one where it can be found."""

from __future__ import annotations

import csv
import itertools
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from isthmus.chips import wheel
from isthmus.chips.rehearse import profile_of
from isthmus.chips.wheel import archive, registrations, versions
from isthmus.chips.wheel.archive import Wheel, check_loadable
from isthmus.chips.wheel.elf import read_elf
from isthmus.chips.wheel.symbols import needs, provides
from isthmus.errors import IsthmusError
from tests.support.vendor_wheel import (
    FALLBACK,
    KERNELS,
    PYTHON,
    SYSTEM,
    TORCH,
    compile_library,
    vendor_library,
    write_wheel,
)

REAL = "ISTHMUS_TORCH_NPU_WHEEL"
TABLE = Path(str(resources.files("isthmus.chips.rehearse") / "ascend" / "operators.csv"))
MACHINE = platform.machine()

needs_cc = pytest.mark.skipif(
    not shutil.which("cc") or not sys.platform.startswith("linux"),
    reason="a vendor's library is compiled, on Linux, by cc",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return vendor_library(tmp_path_factory.mktemp("vendor"), KERNELS + FALLBACK)


@pytest.fixture(scope="module")
def small(library: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheel(tmp_path_factory.mktemp("small") / "torch_npu-small.whl", library)


@pytest.fixture(scope="module")
def read(small: Path) -> wheel.Registrations:
    return wheel.read_wheel(small)


@needs_cc
@pytest.mark.parametrize(
    ("operator", "status", "via"),
    [
        ("aten::mm", "native", None),
        ("aten::copysign.Tensor", "native", "aten::copysign.out"),
        ("aten::copysign_.Tensor", "native", "aten::copysign.out"),
        ("aten::native_dropout.out", "native", None),
        ("aten::sin", "fallback", "aten::sin.out"),
        ("aten::sin.out", "fallback", None),
        ("aten::flatten.using_ints", "decomposes", None),
        ("aten::narrow_copy", "generic", None),
        ("aten::split_with_sizes_copy", "generic", None),
        ("aten::_flash_attention_forward", "none", None),
        ("npu::npu_twice", "native", None),
        ("npu::npu_alone", "none", None),
    ],
)
def test_an_operator_is_classified_by_what_the_dispatcher_would_run(
    read: wheel.Registrations, operator: str, status: str, via: str | None
):
    assert (read.operators[operator].status, read.operators[operator].via) == (status, via)


@needs_cc
def test_what_else_a_wheel_tells(read: wheel.Registrations):
    assert (read.version, read.torch.partition("+")[0]) == (f"{TORCH}.post1", TORCH)
    assert read.kernels == {"aten::mm", "aten::copysign.out", "aten::add.Tensor", "npu::npu_twice"}
    assert (read.autograd, read.autocast) == ({"aten::native_dropout.out"}, {"aten::mm"})
    assert set(read.custom) == {"npu::npu_twice", "npu::npu_alone"}
    assert read.custom["npu::npu_twice"].schema == "npu::npu_twice(Tensor x, float scale=2.) -> Tensor"
    assert read.looked_up == {"aclnnAdd", "aclnnMul"}
    assert read.stubbed == {"aclInit", "HcclOpen"}
    assert sum(read.counts().values()) == len(read.operators) - 2


@needs_cc
def test_without_a_fallback_for_all_operators_nothing_falls_back(tmp_path: Path):
    path = write_wheel(tmp_path / "bare.whl", vendor_library(tmp_path, KERNELS), torch=None)
    bare = wheel.read_wheel(path)
    assert bare.operators["aten::sin"].status == "none"
    assert bare.operators["aten::mm"].status == "native"
    assert "fallback" not in bare.counts()


@needs_cc
def test_a_table_that_is_written_is_read_back_and_keeps_what_is_documented(read: wheel.Registrations, tmp_path: Path):
    path = tmp_path / "operators.csv"
    wheel.write_table(read, path, documented=TABLE)
    assert wheel.read_table(path) == read.statuses()
    rows = {row["operator"]: row for row in csv.DictReader(path.read_text().splitlines())}
    older = {row["operator"]: row for row in csv.DictReader(TABLE.read_text().splitlines())}
    assert list(rows["aten::mm"]) == list(older["aten::mm"])
    assert rows["aten::mm"]["documented_dtypes"] == older["aten::mm"]["documented_dtypes"] != ""
    assert rows["aten::mm"]["source"] == "wheel; documentation"
    assert rows["npu::npu_twice"]["source"] == "wheel"
    assert rows["aten::mm"]["version"] == f"torch_npu {TORCH}.post1"
    sources = {row["key"]: row for row in csv.DictReader((tmp_path / "sources.csv").read_text().splitlines())}
    assert set(sources) == {"wheel", "documentation"}
    assert "torch_npu-small.whl" in sources["wheel"]["source"]


@needs_cc
def test_a_wheel_gives_the_rows_of_a_rehearsals_table(read: wheel.Registrations):
    documented = profile_of("ascend-910b-313t").operators
    rows = read.as_table(documented)
    assert rows["aten::mm"].documented_dtypes == documented["aten::mm"].documented_dtypes
    assert (rows["aten::sin"].status, rows["aten::sin"].version) == ("fallback", f"torch_npu {TORCH}.post1")
    assert read.as_table()["aten::mm"].documented_dtypes == ()


def test_two_tables_are_compared_by_name():
    old = {"a": "native", "b": "native", "c": "fallback", "d": "none"}
    new = {"b": "fallback", "c": "fallback", "d": "native", "e": "native"}
    found = wheel.compare(old, new)  # pyright: ignore[reportArgumentType]
    assert found == wheel.Difference(
        {"e": "native"}, {"a": "native"}, {"b": ("native", "fallback"), "d": ("none", "native")}
    )
    assert found.describe() == [
        "1 came, native",
        "1 went, native before",
        "1 changed from native to fallback",
        "1 changed from none to native",
    ]
    assert wheel.compare(old, old).describe() == []  # pyright: ignore[reportArgumentType]


def test_a_table_of_another_format_is_refused(tmp_path: Path):
    path = tmp_path / "operators.csv"
    path.write_text("op,status\naten::mm,native\n")
    with pytest.raises(IsthmusError, match="its columns must be operator, status"):
        wheel.read_table(path)
    path.write_text(TABLE.read_text().replace("decomposes", "melts", 1))
    with pytest.raises(IsthmusError, match="'melts'"):
        wheel.read_table(path)


# Wheels that cannot be read.


@needs_cc
@pytest.mark.parametrize(
    ("code", "why"), [("crash", "SIGABRT"), ("spin", "SIGXCPU|SIGKILL"), ("import nothing_here", "No module named")]
)
def test_a_library_that_does_not_start_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
):
    monkeypatch.setattr(registrations, "SECONDS", 5)
    monkeypatch.setattr(registrations, "WALL_SECONDS", 120)
    path = write_wheel(tmp_path / "ill.whl", vendor_library(tmp_path, code))
    with pytest.raises(IsthmusError, match=f"cannot be loaded beside torch {TORCH}.*({why})"):
        wheel.read_wheel(path)


@needs_cc
def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registrations, "MEMORY_BYTES", 2**30)
    path = write_wheel(tmp_path / "large.whl", vendor_library(tmp_path, "bytearray(2**31)"))
    with pytest.raises(IsthmusError, match=r"cannot be loaded beside torch .*: MemoryError"):
        wheel.read_wheel(path)


@needs_cc
def test_without_a_compiler_the_error_says_what_to_install(small: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(
        IsthmusError, match=r"needs a C compiler.*no-such-compiler is not here.*environment variable CC"
    ):
        wheel.read_wheel(small)


@pytest.mark.parametrize("kept", [0, 10, 200, -30])
def test_a_truncated_wheel_is_refused(tmp_path: Path, kept: int):
    path = write_wheel(tmp_path / "whole.whl", b"content" * 100)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(IsthmusError, match=r"not a whole wheel.*download it again"):
        wheel.read_wheel(path)


def test_a_flipped_byte_is_found(tmp_path: Path):
    content = os.urandom(5000)
    path = write_wheel(tmp_path / "flipped.whl", content)
    with zipfile.ZipFile(path) as whole:
        place = whole.getinfo("torch_npu/lib/libtorch_npu.so").header_offset + 1000
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(IsthmusError, match=r"libtorch_npu.so.*download"):
        wheel.read_wheel(path)


def test_a_file_that_the_record_does_not_list_so_is_refused(tmp_path: Path):
    path = write_wheel(tmp_path / "other.whl", b"x" * 10, damaged=("torch_npu/lib/libtorch_npu.so",))
    with pytest.raises(IsthmusError, match="is not what the wheel's RECORD lists"):
        wheel.read_wheel(path)


@pytest.mark.parametrize(
    "name", ["../outside.so", "/etc/outside.so", "torch_npu/../../outside.so", "a\\..\\outside.so"]
)
def test_a_wheel_that_would_write_outside_its_folder_is_refused(tmp_path: Path, name: str):
    path = write_wheel(tmp_path / "evil.whl", b"", extra={name: b"evil"})
    with pytest.raises(IsthmusError, match="would write outside its folder"):
        wheel.read_wheel(path)
    assert not list(tmp_path.parent.rglob("outside.so"))


def test_a_wheel_with_a_link_is_refused(tmp_path: Path):
    path = write_wheel(tmp_path / "link.whl", b"")
    with zipfile.ZipFile(path, "a") as open_one:
        entry = zipfile.ZipInfo("torch_npu/lib/libc10.so")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        open_one.writestr(entry, "/etc/passwd")
    with pytest.raises(IsthmusError, match="contains a link"):
        wheel.read_wheel(path)


def test_a_wheel_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "LARGEST_BYTES", 10_000)
    with pytest.raises(IsthmusError, match="unpacks to"):
        wheel.read_wheel(write_wheel(tmp_path / "bomb.whl", b"0" * 20_000))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tag": f"cp27-cp27mu-manylinux_2_28_{MACHINE}"}, f"built for cp27 and this is {PYTHON}"),
        (
            {"tag": f"{PYTHON}-{PYTHON}-manylinux_2_28_{'x86_64' if MACHINE == 'aarch64' else 'aarch64'}"},
            "this machine is",
        ),
        ({"torch": "1.2.3", "version": "1.2.3"}, "wants torch 1.2.3.*pip install torch==1.2.3"),
        ({"torch": None, "version": "1.2.3.post4"}, "wants torch 1.2.3"),
        ({"name": "torch_other"}, "a wheel of torch_other"),
    ],
)
def test_a_wheel_for_something_else_is_refused_with_what_to_take(tmp_path: Path, changes: dict[str, str], why: str):
    with pytest.raises(IsthmusError, match=why):
        wheel.read_wheel(write_wheel(tmp_path / "else.whl", b"", **changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("missing", ["METADATA", "WHEEL", "RECORD", "libtorch_npu.so"])
def test_an_archive_without_the_parts_of_a_wheel_is_refused(tmp_path: Path, missing: str):
    whole, path = write_wheel(tmp_path / "whole.whl", b""), tmp_path / "less.whl"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as less:
        for name in source.namelist():
            if not name.endswith(missing):
                less.writestr(name, source.read(name))
    with pytest.raises(IsthmusError, match=missing):
        wheel.read_wheel(path)


def test_no_wheel_and_no_archive(tmp_path: Path):
    with pytest.raises(IsthmusError, match="there is no wheel"):
        wheel.read_wheel(tmp_path / "nothing.whl")
    with pytest.raises(IsthmusError, match="not a whole wheel"):
        wheel.read_wheel(TABLE)
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with pytest.raises(IsthmusError, match="0 folders of metadata"):
        wheel.read_wheel(tmp_path / "empty.whl")


# Symbols, without loading anything.


@needs_cc
@pytest.mark.skipif(not shutil.which("nm"), reason="compares with nm of binutils")
def test_symbols_are_those_that_nm_finds(tmp_path: Path):
    source = (
        "extern long outside(void); extern long maybe(void) __attribute__((weak)); extern void *malloc(unsigned long);"
    )
    source += "static long hidden(void) { return 1; } long given = 3;"
    source += "long mine(void) { return outside() + hidden() + (maybe ? maybe() : 0) + (long)malloc(3); }"
    file = compile_library(source, tmp_path / "libone.so")
    found = read_elf(file.read_bytes(), file.name)
    listed = subprocess.run(["nm", "-D", str(file)], capture_output=True, text=True, check=True).stdout.splitlines()
    columns = [line.split() for line in listed]
    assert found.defined == {row[2] for row in columns if len(row) == 3} == {"given", "mine"}
    assert found.undefined == {row[1] for row in columns if len(row) == 2 and row[0] == "U" and "@" not in row[1]}
    assert found.undefined == {"outside"}
    assert (found.soname, found.machine) == ("libone.so", MACHINE)
    assert found.needed == ("libc.so.6",)
    assert found.versioned == {"libc.so.6"}


@needs_cc
def test_a_damaged_library_is_an_error_and_never_a_crash(tmp_path: Path):
    whole = compile_library(SYSTEM, tmp_path / "libwhole.so").read_bytes()
    for length in range(0, len(whole) - 64, 509):
        with pytest.raises(IsthmusError, match=r"part\.so"):
            read_elf(whole[:length], "part.so")
    with pytest.raises(IsthmusError, match="64-bit little-endian"):
        read_elf(whole[:4] + b"\x01" + whole[5:], "narrow.so")


NULL, STRINGS, DYNAMIC, DYNSYM, VERNEED, VERSYM = 0, 3, 6, 11, 0x6FFFFFFE, 0x6FFFFFFF
TYPE, OFFSET, SIZE, LINK, COUNT = (4, "<I"), (24, "<Q"), (32, "<Q"), (40, "<I"), (44, "<I")  # of a section's header
TABLE_AT, ENTRY_SIZE, ENTRIES, NAMES = (40, "<Q"), (58, "<H"), (60, "<H"), (62, "<H")  # of the file's


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library with every table that is read: it is bound to versions of the C library."""
    source = "extern long outside(void); extern void *malloc(unsigned long);"
    source += "long mine(void) { return outside() + (long)malloc(3); }"
    return compile_library(source, tmp_path_factory.mktemp("bound") / "libbound.so").read_bytes()


def section_headers(whole: bytes) -> dict[int, tuple[int, int]]:
    """Index and place in the file of the first section header of each type."""
    (table,), (step, count) = struct.unpack_from("<Q", whole, 40), struct.unpack_from("<HH", whole, 58)
    places = [(index, table + index * step) for index in reversed(range(count))]
    return {struct.unpack_from("<I", whole, place + 4)[0]: (index, place) for index, place in places}


def with_field(whole: bytes, place: int, field: tuple[int, str], value: int) -> bytes:
    changed = bytearray(whole)
    struct.pack_into(field[1], changed, place + field[0], value)
    return bytes(changed)


@needs_cc
@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (DYNSYM, SIZE, 24 * 2**40),
        (DYNSYM, SIZE, 2**64 - 1),
        (DYNSYM, OFFSET, 2**64 - 1),
        (DYNSYM, LINK, 2**32 - 1),
        (DYNSYM, LINK, "itself"),
        (DYNSYM, TYPE, STRINGS),
        (DYNAMIC, OFFSET, 2**40),
        (DYNAMIC, LINK, NULL),
        (DYNAMIC, LINK, "itself"),
        (VERNEED, OFFSET, 2**63),
        (VERNEED, LINK, "itself"),
        (VERSYM, SIZE, 2),
        (VERSYM, LINK, "itself"),
        (None, TABLE_AT, 2**64 - 1),
        (None, TABLE_AT, 0),
        (None, ENTRY_SIZE, 0),
        (None, ENTRIES, 0xFFFE),
        (None, NAMES, 0xFFF0),
    ],
)
def test_a_library_with_a_hostile_header_is_an_error(
    bound: bytes, kind: int | None, field: tuple[int, str], value: int | str
):
    assert read_elf(bound, "whole.so").versioned == {"libc.so.6"}
    index, place = (0, 0) if kind is None else section_headers(bound)[kind]
    hostile = with_field(bound, place, field, index if isinstance(value, str) else value)
    with pytest.raises(IsthmusError, match=r"hostile\.so"):
        read_elf(hostile, "hostile.so")


@needs_cc
def test_counts_that_no_file_holds_do_not_keep_a_reader_busy(bound: bytes):
    headers = section_headers(bound)
    endless = with_field(bound, headers[VERNEED][1], COUNT, 2**32 - 1)
    (entry,) = struct.unpack_from("<Q", bound, headers[VERNEED][1] + 24)
    assert read_elf(with_field(endless, entry, (12, "<I"), 0), "circle.so") == read_elf(bound, "whole.so")
    many = with_field(with_field(bound, 0, ENTRIES, 0), headers[NULL][1], SIZE, 2**64 - 1)
    with pytest.raises(IsthmusError, match=r"many\.so is damaged"):
        read_elf(many, "many.so")


@needs_cc
@pytest.mark.parametrize(("kind", "first_name"), [(DYNSYM, (24, "<I")), (DYNAMIC, (8, "<Q")), (VERNEED, (4, "<I"))])
def test_a_name_outside_the_file_is_an_error(bound: bytes, kind: int, first_name: tuple[int, str]):
    (table,) = struct.unpack_from("<Q", bound, section_headers(bound)[kind][1] + 24)
    with pytest.raises(IsthmusError, match=r"nameless\.so is damaged"):
        read_elf(with_field(bound, table, first_name, 2**31), "nameless.so")


@needs_cc
def test_without_pyelftools_the_error_says_how_to_install_it(small: Path):
    command = ["isthmus", "coverage", "r-nano", "--chip", "ascend-910b-313t", "--wheel", str(small)]
    program = "import sys; sys.modules['elftools'] = None; from isthmus.cli import main; "
    program += f"sys.argv = {command}; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "pip install 'isthmus[vendor-wheels]'" in done.stderr
    assert "Traceback" not in done.stderr


@needs_cc
def test_what_a_package_needs_is_the_same_from_its_wheel_and_installed(small: Path, tmp_path: Path):
    with zipfile.ZipFile(small) as packed:
        packed.extractall(tmp_path)
    needed = wheel.needed_symbols(small)
    assert needed == {"aclInit", "HcclOpen", "aclnnAdd", "aclnnMul"}
    assert wheel.needed_symbols(tmp_path / "torch_npu") == needed
    assert needs(small).libraries == {"libascendcl.so"}
    with pytest.raises(IsthmusError, match="is not torch_npu"):
        wheel.needed_symbols(tmp_path)


@needs_cc
def test_symbols_that_an_installation_lacks_are_told_by_what_happens_without_them(small: Path, tmp_path: Path):
    full = compile_library(SYSTEM + "long aclnnMul(void) { return 0; }", tmp_path / "new" / "lib64" / "libascendcl.so")
    assert wheel.missing_symbols(small, tmp_path / "new").describe() == []
    compile_library(SYSTEM.replace("HcclOpen", "HcclBegin"), tmp_path / "old" / "lib64" / "libascendcl.so")
    old = wheel.missing_symbols(small, tmp_path / "old")
    assert (old.importable, old.libraries, old.linked, old.looked_up) == (False, (), ("HcclOpen",), ("aclnnMul",))
    assert [line.partition(":")[0] for line in old.describe()] == [
        "the import fails",
        "1 of 4 needed symbols are looked up when their operator is called, and are not there",
    ]
    (tmp_path / "none").mkdir()
    shutil.copy(compile_library("long other(void) { return 0; }", tmp_path / "o" / "libother.so"), tmp_path / "none")
    assert wheel.missing_symbols(small, tmp_path / "none").libraries == ("libascendcl.so",)
    assert full.is_file()


@needs_cc
def test_an_installation_is_read_through_links_and_for_one_machine(tmp_path: Path):
    file = compile_library(SYSTEM, tmp_path / "real" / "libascendcl.so")
    cann = tmp_path / "latest"
    cann.mkdir()
    (cann / "lib64").symlink_to(file.parent)
    (file.parent / "again").symlink_to(cann)
    (cann / "libscript.so").write_text("INPUT(libascendcl.so)")
    (cann / "libempty.so").write_bytes(b"")
    foreign = bytearray(compile_library("long core(void) { return 0; }", tmp_path / "f" / "libcore.so").read_bytes())
    foreign[18:20] = (999).to_bytes(2, "little")
    (cann / "libcore.so").write_bytes(foreign)
    found = provides(cann, MACHINE)
    assert found.libraries == {"libascendcl.so"}
    assert found.symbols == {"aclInit", "HcclOpen", "aclnnAdd", "aclnnAddGetWorkspaceSize"}
    assert wheel.provided_symbols(cann, "machine 999") == {"core"}
    with pytest.raises(IsthmusError, match="no shared libraries for sparc"):
        wheel.provided_symbols(cann, "sparc")
    with pytest.raises(IsthmusError, match="there is no folder"):
        wheel.provided_symbols(tmp_path / "absent", MACHINE)


# Versions.


def test_every_combination_of_the_table_is_accepted_and_no_other():
    rows = list(csv.DictReader((resources.files("isthmus.chips.wheel") / "versions.csv").read_text().splitlines()))
    assert len(rows) == len(wheel.builds()) == 62
    for row in rows:
        package = row["torch_npu_package"].split(" ")[0]
        assert wheel.check_versions(row["torch_version"], package, row["cann_version"]) == []
        assert wheel.check_versions(row["torch_version"] + "+cpu", package, None) == []
        assert len(wheel.check_versions("0.4.0", package, row["cann_version"])) == 1
        assert len(wheel.check_versions(row["torch_version"], package, "1.0")) == 1
    odd = [row for row in rows if not row["torch_npu_package"].startswith(row["torch_version"])]
    assert [row["torch_npu_package"] for row in odd] == ["1.5.0.post3"]


def test_a_wrong_combination_is_answered_with_a_right_one():
    (cann,) = wheel.check_versions("2.7.1", "2.7.1", "9.0.0")
    assert "belongs to CANN 8.3.RC1" in cann and "or torch_npu 2.7.1.post4 for CANN 9.0.0" in cann
    (torch,) = wheel.check_versions("2.9.0+cpu", "2.8.0", "8.3.RC1")
    assert "is built for torch 2.8.0" in torch and "install torch_npu 2.9.0.post6 with CANN 9.1.0" in torch
    (newer,) = wheel.check_versions("2.13.0", "2.13.0", "9.1.0")
    assert "newer than the vendor's table, which ends at 2.12.0" in newer
    newer, mixed = wheel.check_versions("2.12.0", "2.13.0", None)
    assert "is by its name for torch 2.13.0" in mixed and "install torch_npu 2.12.0" in mixed
    (unlisted,) = wheel.check_versions("2.9.0", "2.9.0.post9", None)
    assert "2.9.0.post2 with CANN 9.0.0" in unlisted
    assert all("COMPATIBILITY.en.md" in one for one in (cann, newer, unlisted))


def test_versions_are_ordered_as_they_are_released():
    ordered = ["2.1.0.rc1", "2.1.0", "2.1.0.post4", "2.1.0.post10", "2.9.0", "2.10.0", "2.10.0.post4", "2.12.0"]
    keys = [versions.version_key(one) for one in ordered]
    assert all(before < after for before, after in itertools.pairwise(keys))


def test_what_changed_between_lines_of_the_plugin():
    (one,) = wheel.changed_between("7.1.0", "7.2.0")
    assert one.startswith("7.2.0 (from 2025-09-23): operators of torch +7 -82, the vendor's own +38 -6")
    assert len(wheel.changed_between("6.0.0", "master")) == len(wheel.churn()) - 1
    assert wheel.changed_between("7.1.0", "7.1.0") == []
    with pytest.raises(IsthmusError, match=r"no line '9.9.9'.*26.1.0"):
        wheel.changed_between("9.9.9", "26.1.0")
    with pytest.raises(IsthmusError, match="name the older line first"):
        wheel.changed_between("26.0.0", "7.2.0")


def test_the_version_of_an_installation_is_read_from_its_own_file(tmp_path: Path):
    assert wheel.installed_cann(tmp_path) is None
    folder = tmp_path / "aarch64-linux"
    folder.mkdir()
    (folder / "ascend_toolkit_install.info").write_text(
        "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\narch=aarch64\n"
    )
    assert wheel.installed_cann(tmp_path) == "8.3.RC1"
    with pytest.raises(IsthmusError, match="there is no folder"):
        wheel.installed_cann(tmp_path / "absent")


# The real wheel.


@pytest.fixture(scope="module")
def real() -> Path:
    named = os.environ.get(REAL)
    if not named:
        pytest.skip(f"{REAL} names no wheel of torch_npu")
    with Wheel(Path(named)) as opened:
        try:
            check_loadable(opened.facts)
        except IsthmusError as error:
            pytest.skip(str(error))
        if opened.facts.version != "2.13.0":
            pytest.skip(f"the package's table is of torch_npu 2.13.0, and this is {opened.facts.version}")
    return Path(named)


@needs_cc
def test_the_real_wheel_gives_the_table_of_the_package(real: Path):
    found = wheel.read_wheel(real)
    table = wheel.read_table(TABLE)
    assert wheel.compare(table, found.statuses()) == wheel.Difference({}, {}, {})
    assert (len(found.kernels), len(found.autograd), len(found.autocast)) == (1916, 131, 104)
    assert found.counts() == {"native": 1104, "generic": 836, "decomposes": 697, "fallback": 309, "none": 164}
    assert Counter(name.partition("::")[0] for name in found.custom) == {"npu": 419, "npu_custom_dist": 4}
    assert (len(found.looked_up), len(found.stubbed)) == (904, 84)
    assert needs(real).symbols == found.looked_up | found.stubbed
    assert needs(real).libraries >= {"libhccl.so", "libascendcl.so"}
