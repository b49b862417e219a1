"""The numbers by which export rules classify a chip, each step written out.

Total processing performance (TPP) is 2 x MacTOPS x bit length of the operation, the largest over bit lengths, dense,
over all dies of a package: dense TOPS x bit length. Performance density (PD) is TPP over the die area in mm2, of dies
made on a non-planar process, as all of these are. Both: ECCN 3A090, technical notes (88 FR 73458).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.chips import Chip
from isthmus.records import RuleStep

BITS = {"bf16": 16, "fp8": 8, "int8": 8, "fp4": 4}
_RATES = {"bf16": "bf16_tflops", "fp8": "fp8_tflops", "int8": "int8_tops", "fp4": "fp4_tflops"}
UNITS = {"tpp": "TPP", "pd": "TPP/mm2", "io_gbs": "GB/s", "mem_bw_gbs": "GB/s", "mbd": "GB/s/mm2"}


@dataclass(frozen=True)
class Amount:
    """A number that may be known from below alone: `value`, or None with a floor `low`, or nothing."""

    value: float | None = None
    low: float | None = None

    def compare(self, sign: str, limit: float) -> bool | None:
        """Whether it stands to `limit` as `sign` says (<, <=, >=, >); None where what is known does not tell."""
        if self.value is not None:
            return _holds(self.value, sign, limit)
        if self.low is None:
            return None
        if sign in (">=", ">"):
            return True if _holds(self.low, sign, limit) else None
        return None if _holds(self.low, sign, limit) else False


@dataclass(frozen=True)
class Numbers:
    """What is known of a chip by the names of `UNITS`, and how it was computed."""

    amounts: Mapping[str, Amount]
    steps: tuple[RuleStep, ...]


def numbers_of(chip: Chip) -> Numbers:
    """TPP, PD, link and memory bandwidth, and memory bandwidth density, each from the chip's declared facts."""
    steps = [_tpp(chip)]
    steps += [_pd(chip, steps[0]), _io(chip), _memory(chip), _memory_density(chip)]
    names = dict(zip(("tpp", "pd", "io_gbs", "mem_bw_gbs", "mbd"), steps, strict=True))
    return Numbers({name: Amount(step.value, step.low) for name, step in names.items()}, tuple(steps))


def memory_bandwidth_density(gb_per_s: float, mm2: float) -> float:
    """GB/s per mm2 of a stack of memory: 3A090.c begins above 2 (Federal Register 2024-28270)."""
    return gb_per_s / mm2


def _tpp(chip: Chip) -> RuleStep:
    peaks = {dtype: getattr(chip, column) for dtype, column in _RATES.items()}
    known = {dtype: figure for dtype, figure in peaks.items() if figure is not None and figure.value is not None}
    if known:
        products = {dtype: figure.value * BITS[dtype] for dtype, figure in known.items()}
        largest = max(products, key=lambda dtype: products[dtype])
        terms = ", ".join(f"{known[d].value:g} x {BITS[d]} ({d}) = {product:,.10g}" for d, product in products.items())
        return _step("tpp", f"largest of {terms}", products[largest], None, known[largest].source)
    floors = {dtype: getattr(chip, f"floor_{column}") for dtype, column in _RATES.items() if dtype != "fp4"}
    tested = {dtype: figure for dtype, figure in floors.items() if figure is not None and figure.value is not None}
    if not tested:
        return _step("tpp", "no peak was published", None, None, chip.capabilities.source)
    products = {dtype: figure.value * BITS[dtype] for dtype, figure in tested.items()}
    largest = max(products, key=lambda dtype: products[dtype])
    terms = ", ".join(f"{tested[d].value:g} x {BITS[d]} ({d}) = {product:,.10g}" for d, product in products.items())
    formula = f"no peak was published; at least the largest of the acceptance floors {terms}"
    return _step("tpp", formula, None, products[largest], tested[largest].source)


def _pd(chip: Chip, tpp: RuleStep) -> RuleStep:
    area = chip.die_mm2
    if area is None or area.value is None:
        return _step("pd", "TPP / die area; the die area is unknown", None, None, chip.capabilities.source)
    over = f"/ {area.value:,.10g} mm2"
    if tpp.value is not None:
        value = tpp.value / area.value
        return _step("pd", f"{tpp.value:,.10g} {over} = {value:.4g}", value, None, area.source)
    low = None if tpp.low is None else tpp.low / area.value
    formula = "TPP is unknown" if low is None else f"TPP is unknown; at least {tpp.low:,.10g} {over} = {low:.4g}"
    return _step("pd", formula, None, low, area.source)


def _io(chip: Chip) -> RuleStep:
    link = chip.scaleup_gbs_uni
    if link is None or link.value is None:
        return _step("io_gbs", "no link bandwidth was published", None, None, chip.capabilities.source)
    value = 2 * link.value
    return _step("io_gbs", f"{link.value:,.10g} GB/s in each of 2 directions = {value:,.10g}", value, None, link.source)


def _memory(chip: Chip) -> RuleStep:
    figure = chip.mem_bw_gbs
    if figure is None or figure.value is None:
        return _step("mem_bw_gbs", "no memory bandwidth was published", None, None, chip.capabilities.source)
    return _step("mem_bw_gbs", "total DRAM bandwidth, as declared", figure.value, None, figure.source)


def _memory_density(chip: Chip) -> RuleStep:
    kind = chip.texts.get("mem_type", "memory")
    formula = f"memory bandwidth / area of the {kind}; that area is unknown. It counts for memory that is bought alone"
    return _step("mbd", formula, None, None, "Federal Register 2024-28270")


def _step(name: str, formula: str, value: float | None, low: float | None, source: str) -> RuleStep:
    return RuleStep(name=name, formula=formula, value=value, low=low, unit=UNITS[name], source=source)


def _holds(value: float, sign: str, limit: float) -> bool:
    return {"<": value < limit, "<=": value <= limit, ">=": value >= limit, ">": value > limit}[sign]
