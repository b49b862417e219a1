"""What is known about a chip, and the contract of a vendor's file.

Facts are declared, each with its source; what nobody published is None. Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from isthmus.lines import csv_rows
from isthmus.run import Figure

FIGURES: dict[str, tuple[str, str]] = {
    "bf16_tflops": ("bf16 matmul, dense peak", "TFLOPS"),
    "fp8_tflops": ("fp8 matmul, dense peak", "TFLOPS"),
    "int8_tops": ("int8 matmul, dense peak", "TOPS"),
    "fp4_tflops": ("fp4 matmul, dense peak", "TFLOPS"),
    "mem_gb": ("memory", "GB"),
    "mem_bw_gbs": ("memory bandwidth", "GB/s"),
    "scaleup_gbs_uni": ("link inside a node, one direction", "GB/s"),
    "scaleup_domain": ("chips that this link joins", "chips"),
    "nic_gbs_uni": ("network per chip, one direction", "GB/s"),
    "tdp_w": ("power limit", "W"),
    "die_mm2": ("die area", "mm2"),
    "tpp": ("total processing performance", "TPP"),
    "pd": ("performance density", "TPP/mm2"),
    "measured_bf16_tflops": ("bf16 matmul, best published measurement", "TFLOPS"),
    "measured_fp8_tflops": ("fp8 matmul, best published measurement", "TFLOPS"),
    "measured_int8_tops": ("int8 matmul, best published measurement", "TOPS"),
    "floor_bf16_tflops": ("bf16 matmul, vendor's acceptance floor", "TFLOPS"),
    "floor_fp8_tflops": ("fp8 matmul, vendor's acceptance floor", "TFLOPS"),
    "floor_int8_tops": ("int8 matmul, vendor's acceptance floor", "TOPS"),
}
_FORMATS_OF = {"fp32": ("fp32",), "bf16": ("bf16",), "int8": ("w8a8", "w8a8_static"), "fp8": ("fp8",)}
TEXTS: dict[str, str] = {
    "mem_type": "memory type",
    "scaleup_name": "link inside a node",
    "eccn_calc": "export class, by calculation",
    "h200_2026_window": "inside the January 2026 licence window",
    "export_status": "export status",
    "launch": "launched",
}


@dataclass(frozen=True)
class Capabilities:
    """What a chip is known to run; None where that is unknown.

    `dtypes` and `formats` use the names of torch dtypes in short (fp32, bf16, int8, fp8) and of `isthmus/formats`;
    `collectives` are torch.distributed backends; `engines` are serving programs. `grouped_matmul` says whether torch's
    grouped_mm has a kernel of its own in bf16 for it.
    """

    source: str
    dtypes: tuple[str, ...] | None = None
    formats: tuple[str, ...] | None = None
    collectives: tuple[str, ...] | None = None
    engines: tuple[str, ...] | None = None
    grouped_matmul: bool | None = None


@dataclass(frozen=True)
class Chip:
    """The declared facts of one kind of chip. A number is a figure with its source, or None: unknown."""

    slug: str
    name: str
    vendor: str
    capabilities: Capabilities
    generation: str | None = None
    confidence: str | None = None
    note: str = ""
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    bf16_tflops: Figure | None = None
    fp8_tflops: Figure | None = None
    int8_tops: Figure | None = None
    fp4_tflops: Figure | None = None
    mem_gb: Figure | None = None
    mem_bw_gbs: Figure | None = None
    scaleup_gbs_uni: Figure | None = None
    scaleup_domain: Figure | None = None
    nic_gbs_uni: Figure | None = None
    tdp_w: Figure | None = None
    die_mm2: Figure | None = None
    tpp: Figure | None = None
    pd: Figure | None = None
    measured_bf16_tflops: Figure | None = None
    measured_fp8_tflops: Figure | None = None
    measured_int8_tops: Figure | None = None
    floor_bf16_tflops: Figure | None = None
    floor_fp8_tflops: Figure | None = None
    floor_int8_tops: Figure | None = None

    @property
    def dtypes(self) -> tuple[str, ...] | None:
        return self.capabilities.dtypes

    @property
    def formats(self) -> tuple[str, ...] | None:
        return self.capabilities.formats

    @property
    def collectives(self) -> tuple[str, ...] | None:
        return self.capabilities.collectives

    @property
    def engines(self) -> tuple[str, ...] | None:
        return self.capabilities.engines

    def figures(self) -> dict[str, Figure | None]:
        """Every number of `FIGURES` by name, unknown ones included."""
        return {name: getattr(self, name) for name in FIGURES}


@dataclass(frozen=True)
class Found:
    """One device of this machine. `chip` is None if its name matches no chip in the tables."""

    vendor: str
    chip: str | None
    name: str
    device: str


@dataclass(frozen=True)
class Presence:
    """What was found, and why something that seems to be here cannot be used."""

    found: tuple[Found, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vendor:
    """One vendor's file. `device` is the torch device type, `rehearsal` the folder of its tables in `chips/rehearse`.

    `chips` gives the facts without loading torch; `detect` looks at this machine and may load it. `environment` are
    variables that have to be set before a process that examines or trains loads the vendor's software. `package` is the
    extension of torch without which the device type does not exist. `variables` are beginnings of the names of
    environment variables that the software reads, and `versions` reads the versions of that software, where it is.
    `ray_resource` is the name under which Ray counts the vendor's chips by itself
    (docs.ray.io, ray-core/scheduling/accelerators); None where it does not.
    `serving` has the words that an engine of `Capabilities.engines` is started with for reinforcement learning, beside
    those of its make.
    """

    name: str
    device: str
    chips: Callable[[], list[Chip]]
    detect: Callable[[], Presence]
    rehearsal: str | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    package: str | None = None
    variables: tuple[str, ...] = ()
    versions: Callable[[], dict[str, str]] = dict
    serving: dict[str, str] = dataclasses.field(default_factory=dict)
    ray_resource: str | None = None


def chips_from_table(
    vendor: str,
    *,
    source: str,
    collectives: tuple[str, ...] | None = None,
    engines: tuple[str, ...] | None = None,
    own_formats: dict[str, tuple[str, ...]] | None = None,
) -> list[Chip]:
    """The rows of chips.csv of one vendor. A chip runs a narrow dtype if some rate in that dtype was published.

    `own_formats` are the formats that the vendor's software has for a dtype beside those that all have.
    """
    own = own_formats or {}
    return [_chip(row, source, collectives, engines, own) for row in _table() if row["vendor"] == vendor]


@functools.cache
def _table() -> tuple[dict[str, str], ...]:
    text = (resources.files("isthmus.chips") / "chips.csv").read_text(encoding="utf-8")
    return tuple(csv_rows(text))


def _chip(
    row: dict[str, str],
    source: str,
    collectives: tuple[str, ...] | None,
    engines: tuple[str, ...] | None,
    own_formats: dict[str, tuple[str, ...]],
) -> Chip:
    figures = {name: figure for name in FIGURES if (figure := _figure(row, name)) is not None}
    dtypes = _dtypes_with_a_rate(figures)
    computed = [form for dtype in dtypes or () for form in (*_FORMATS_OF[dtype], *own_formats.get(dtype, ()))]
    formats = tuple(computed) if dtypes else None
    return Chip(
        slug=row["slug"],
        name=row["chip"],
        vendor=row["vendor"],
        capabilities=Capabilities(f"dtypes with a published rate; {source}", dtypes, formats, collectives, engines),
        generation=row["generation"] or None,
        confidence=row["confidence"] or None,
        note=row["note"],
        texts={column: row[column] for column in TEXTS if row[column]},
        **figures,
    )


def _dtypes_with_a_rate(figures: dict[str, Figure]) -> tuple[str, ...] | None:
    known = tuple(dtype for dtype in ("bf16", "int8", "fp8") if any(f"{dtype}_" in name for name in figures))
    return ("fp32", *known) if known else None


def _figure(row: dict[str, str], name: str) -> Figure | None:
    value, low = row[name], row.get(f"{name}_low")
    if not value and not low:
        return None
    inferred = name in row["inferred"].split("|")
    source = f"inference or general knowledge, see the note ({row['source']})" if inferred else row["source"]
    return Figure(
        value=float(value) if value else None,
        low=float(low) if low else None,
        unit=FIGURES[name][1],
        kind="declared",
        source=source,
    )
