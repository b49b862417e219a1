"""Conversion of a published checkpoint into a bundle of another format, tensor by tensor.

Memory holds a few tensors, whatever the model's size; where a calibration is needed, a layer of the float model, and
with balancing all weights in fp32. The bundle says in conversion.json where each tensor of the source went that it does
not carry under its own name. It is not sealed: no gate has compared it with its source.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from isthmus.chips import read_by, servers
from isthmus.data.prompts import FORM, PromptFile
from isthmus.data.tokenizer import read_ends
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import Format, check_format_name, fp8, get_format, mxfp8
from isthmus.formats.calibration.balance import ALPHA, find_balance
from isthmus.formats.calibration.calibrate import calibrate
from isthmus.formats.files.basis import Conversion
from isthmus.formats.files.beside import Beside, beside_weights
from isthmus.formats.files.bundle import CHECKSUMS, CONVERSION, verify_files, write_bundle
from isthmus.formats.files.published import CONFIG, Checkpoint, StoredTensors
from isthmus.formats.mixing.mixture import Mixture, choose_mixture
from isthmus.formats.modelslim import DYNAMIC, FLOAT, WEIGHTS_ONLY, ModelSlim
from isthmus.formats.parts.float8 import E4M3
from isthmus.formats.parts.names import SCALE
from isthmus.formats.parts.pieces import streamed
from isthmus.formats.parts.ranges import Calibration
from isthmus.lines import read_json_object
from isthmus.progress import Watch
from isthmus.recipe.architecture import ModelSection, architecture_from_config, parse_architecture, text_config
from isthmus.recipe.section import RecipeError
from isthmus.run import write_atomic

GENERATION = "generation_config.json"
MOST_THREADS, MOST_SHOWN = 4, 24
MIXTURES = {"modelslim_dynamic": (DYNAMIC, FLOAT), "modelslim_mixed": (DYNAMIC, WEIGHTS_ONLY, FLOAT)}
"""The formats in which modules may have different types, and which."""


@dataclass(frozen=True)
class Options:
    """What `isthmus convert` can be told. Without a `format_name` it is the best that `server` reads."""

    format_name: str | None = None
    server: str | None = None
    budget: float | None = None
    calibrate: Path | None = None
    calibrate_tokens: int | None = None
    balance: bool = False
    rounding: str = "nearest"
    requantise: bool = False
    shard_gb: float = 5.0
    threads: int | None = None

    @property
    def name(self) -> str:
        """The format, which was chosen."""
        assert self.format_name is not None, "the format is chosen before anything is done with it"
        return self.format_name


@dataclass(frozen=True)
class SourceFiles:
    """What the source has beside its weights, file by file, and what became of its tensors."""

    folder: Path
    beside: Beside
    conversion: dict[str, Any]

    @property
    def bos_id(self) -> int | None:
        return self._ids.get("bos_token_id")

    @property
    def ends(self) -> tuple[int, ...]:
        found = read_ends(self.folder)
        if not found:
            raise IsthmusError(
                f"neither {CONFIG} nor {GENERATION} of {self.folder} has an eos_token_id; write it there"
            )
        return found

    @cached_property
    def _ids(self) -> dict[str, Any]:
        config = _read_json(self.folder / CONFIG)
        return {**text_config(config), **config, **_read_json(self.folder / GENERATION, optional=True)}

    def save(self, folder: Path) -> None:
        self.beside.copy(self.folder, folder)
        write_atomic(folder / CONVERSION, json.dumps(self.conversion, indent=2, sort_keys=True).encode() + b"\n")


def execute(source: Path, out: Path, options: Options, watch: Watch) -> None:
    """Write the bundle `out`, and say what comes next. Raises IsthmusError as `convert` does."""
    convert(source, out, options, watch)
    watch.say("  It is [bold]not sealed[/]: nothing has compared it yet.")
    watch.say(f"  next: isthmus capture {escape(str(out))} --source {escape(str(source))} --prompts FILE.jsonl")
    watch.say(f"  then, on the machine that is to serve it: isthmus verify {escape(str(out))}")


def convert(source: Path, out: Path, options: Options, watch: Watch) -> None:
    """Write the bundle `out`. Raises IsthmusError, saying what to write instead, where an option does not fit."""
    _check_folders(source, out)
    architecture = _architecture(source)
    options = replace(options, format_name=_format_name(options, architecture, source))
    chosen = get_format(options.name)
    _check_options(options, chosen, architecture)
    _check_scale_rule(source, chosen)
    if (source / CHECKSUMS).is_file():
        verify_files(source)
    with StoredTensors(source) as stored:
        checkpoint = Checkpoint(stored, architecture)
        _check_blocks(checkpoint, options)
        for line in checkpoint.left_out:
            watch.say(f"  not carried: {escape(line)}")
        conversion: dict[str, Any] = {
            "source": source.resolve().name,
            "format": chosen.name,
            "dropped": checkpoint.dropped,
            "merged": _merged(checkpoint),
            "rounding": options.rounding,
            "requantised": options.requantise,
            "balance_alpha": ALPHA if options.balance else None,
            "budget": options.budget,
            "calibration_tokens": None,
            "calibration_unseen": [],
        }
        beside = beside_weights(source)
        conversion |= {"carried_files": beside.carried, "files_left_out": beside.left_out}
        prepared = _prepare(checkpoint, options, conversion, watch)
        if options.budget is not None:
            chosen = _mix(chosen, prepared, options, architecture, conversion, watch)
        _write(out, chosen, options, checkpoint, prepared, SourceFiles(source, beside, conversion), watch)
    if beside.carried:
        watch.say(f"  carried beside the weights: {escape(', '.join(beside.carried))}")
    watch.say(f"  wrote {escape(str(out))} in {chosen.name}")


def _format_name(options: Options, architecture: ModelSection, source: Path) -> str:
    """The format that was asked for, or the best that the server reads. fp8 stays fp8 where it is read."""
    if options.server is None:
        if options.format_name is None:
            raise IsthmusError("say what to store, --format NAME, or who is to read it, --for SERVER")
        check_format_name(options.format_name)
        return options.format_name
    models = "moe" if any(".experts." in name for name in get_format("fp32").layout(architecture)) else "dense"
    readable = [reading.format for reading in read_by(options.server, models)]
    if not readable:
        raise IsthmusError(f"{options.server} is not known; known: {', '.join(servers())}")
    if options.format_name is not None:
        check_format_name(options.format_name)
        if options.format_name not in readable:
            raise IsthmusError(
                f"{options.server} does not read {options.format_name} of a {architecture.model_type} model; it reads "
                f"{', '.join(readable)}. Leave --format out for the first of these"
            )
        return options.format_name
    if options.budget is not None:
        mixable = [name for name in readable if name in MIXTURES]
        if not mixable:
            raise IsthmusError(f"--budget makes {' or '.join(MIXTURES)}, which {options.server} does not read")
        return max(mixable, key=lambda name: len(MIXTURES[name]))
    in_fp8 = (_read_json(source / CONFIG).get("quantization_config") or {}).get("quant_method") == "fp8"
    return "fp8" if in_fp8 and "fp8" in readable else readable[0]


def _check_scale_rule(source: Path, chosen: Format) -> None:
    """fp8 that stays fp8 keeps its weights; a checkpoint may ask for another rule of the scales of activations."""
    quantisation = _read_json(source / CONFIG).get("quantization_config") or {}
    if chosen.name == "fp8" and quantisation.get("scale_fmt") is not None:
        raise IsthmusError(
            f"{source / CONFIG} has scale_fmt = {quantisation['scale_fmt']!r}: activations get scales by a rule that "
            "the format fp8 does not have here. Serve it as it is, or convert it to another format"
        )


def _check_folders(source: Path, out: Path) -> None:
    if (source / "recipe.json").is_file():
        raise IsthmusError(f"{source} is a run folder: `isthmus handoff {source}` writes and seals its bundles")
    if not source.is_dir():
        raise IsthmusError(f"there is no checkpoint folder at {source}")
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise IsthmusError(f"{out} and {source} lie in each other; name another folder for the bundle")
    if out.exists() and not (out / CHECKSUMS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise IsthmusError(f"{out} exists and is no bundle; it is not overwritten. Name another folder")


def _architecture(source: Path) -> ModelSection:
    try:
        return parse_architecture(architecture_from_config(_read_json(source / CONFIG)))
    except RecipeError as error:
        raise IsthmusError(f"{source / CONFIG}: {error}") from None


def _check_options(options: Options, chosen: Format, architecture: ModelSection) -> None:
    types = {dtype for dtype, _ in chosen.layout(architecture).values()}
    if options.balance and all(dtype in (torch.float32, torch.bfloat16) for dtype in types):
        raise IsthmusError(f"--balance is for quantised formats; {chosen.name} stores floats and gains nothing")
    if options.budget is not None and chosen.name not in MIXTURES:
        raise IsthmusError(f"--budget makes mixtures, which {chosen.name} is none of: use {' or '.join(MIXTURES)}")
    if options.rounding == "gptq" and torch.int8 not in types:
        raise IsthmusError(f"--rounding gptq is for int8 weights, which {chosen.name} does not store")
    needed = _calibrated(options, chosen)
    if needed and options.calibrate is None:
        raise IsthmusError(
            f"{needed} needs to see what the model computes: give --calibrate FILE.jsonl, with a line for each "
            f"sequence, best of the model's own: {FORM}"
        )
    if options.calibrate is not None and not needed:
        raise IsthmusError(f"{chosen.name} with rounding to the nearest uses no calibration; leave --calibrate out")
    if options.calibrate_tokens is not None and options.calibrate is None:
        raise IsthmusError("--calibrate-tokens says how much of --calibrate to use; give that as well")


def _calibrated(options: Options, chosen: Format) -> str:
    """What needs the calibration; empty if nothing does."""
    if chosen.needs_calibration:
        return f"the format {chosen.name}"
    if options.balance or options.rounding == "gptq":
        return "--balance" if options.balance else "--rounding gptq"
    return "--budget" if options.budget is not None else ""


def _check_blocks(checkpoint: Checkpoint, options: Options) -> None:
    """Refuse what would round fp8 weights a second time into MXFP8 without having been asked to."""
    wanted = options.name == "mxfp8" and checkpoint.block is not None
    if options.requantise and not wanted:
        raise IsthmusError("--requantise is for fp8 checkpoints that become mxfp8; leave it out")
    if not wanted or options.requantise:
        return
    if options.balance:
        raise IsthmusError("--balance changes the weights, which fp8 has rounded already: give --requantise as well")
    if checkpoint.block != (fp8.BLOCK, fp8.BLOCK):
        raise IsthmusError(f"blocks of {checkpoint.block} are not those of MXFP8's exact path: give --requantise")
    for name, scale in checkpoint.scales():
        mxfp8.check_lossless(name, scale)


def _carry_blocks(stored: dict[str, Tensor], checkpoint: Checkpoint, options: Options) -> None:
    """Give what is stored of an fp8 weight the numbers of the source, where the format has them, unrounded."""
    for name, tensor in list(stored.items()):
        blocks = checkpoint.blocks(name) if tensor.dtype == E4M3 else None
        if blocks is None:
            continue
        if options.name == "mxfp8":
            stored[name], stored[f"{name}_scale"] = mxfp8.from_fp8_blocks(name, *blocks, requantise=options.requantise)
        elif options.name == "fp8":
            stored[name], stored[f"{name}{SCALE}"] = blocks[0], blocks[1].float()


def _merged(checkpoint: Checkpoint) -> dict[str, str]:
    """The stored names that are carried by another: copies, and the scales of fp8 weights."""
    names = checkpoint.stored.names
    scales = {name: name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
    return {name: into for name, into in {**scales, **checkpoint.copies()}.items() if name not in checkpoint.dropped}


@dataclass(frozen=True)
class Prepared:
    """The state to export, balanced if that is wanted, what was seen of its inputs, and what is made of it."""

    state: Mapping[str, Tensor]
    calibration: Calibration | None = None
    made: Conversion = field(default_factory=Conversion)
    rows: list[list[int]] = field(default_factory=list)

    def refine(self, stored: dict[str, Tensor]) -> None:
        """Round what is stored of a weight anew, if there are the moments for it."""
        if self.calibration is not None and self.calibration.gram:
            self.made.round(stored, self.state, self.calibration)


def _prepare(checkpoint: Checkpoint, options: Options, conversion: dict[str, Any], watch: Watch) -> Prepared:
    state = checkpoint.state()
    if options.calibrate is None:
        return Prepared(state)
    architecture = checkpoint.architecture
    prompts = PromptFile(options.calibrate, checkpoint.stored.folder, architecture.vocab_size)
    sequences = prompts.sequences(options.calibrate_tokens)
    rows = [sequence[: architecture.max_position_embeddings] for sequence in sequences]
    if _calibrated(options, get_format(options.name)) == "--budget":
        conversion["calibration_tokens"] = sum(map(len, rows))
        return Prepared(state, rows=rows)
    calibration = _calibrate(state, checkpoint, rows, options, watch)
    conversion["calibration_tokens"] = calibration.tokens
    conversion["calibration_unseen"] = list(calibration.unseen)
    if calibration.unseen:
        watch.say(
            f"  {len(calibration.unseen)} modules of experts saw no token: their ranges are those of all experts of "
            "their layer. More calibration text would reach them"
        )
    if not options.balance:
        return Prepared(state, calibration, rows=rows)
    balance = find_balance(state, architecture, calibration)
    return Prepared(balance.state(state), balance.calibration(calibration), Conversion(balance), rows)


def _mix(
    chosen: Format,
    prepared: Prepared,
    options: Options,
    architecture: ModelSection,
    conversion: dict[str, Any],
    watch: Watch,
) -> Format:
    """The format with the types that keep to the budget; says what each module costs."""
    assert isinstance(chosen, ModelSlim) and options.budget is not None, "other formats are refused before"
    kinds = MIXTURES[chosen.name]
    with watch.count("measuring", 1) as counter:
        found = choose_mixture(
            prepared.state, architecture, chosen, kinds, prepared.rows, options.budget, prepared.refine, counter.tell
        )
    watch.console.print(_price_table(found))
    share = found.work / found.work_of_float
    watch.say(
        f"  KL {found.kl:.4g} nats/token to the trained model on {found.tokens:,} tokens that calibrated it, of "
        f"{options.budget:g}; {share:.0%} of the work of bf16, in bits of weights and inputs"
    )
    conversion["mixture"] = {
        "kl": found.kl,
        "tokens": found.tokens,
        "work_of_bf16": share,
        "modules": [
            {"module": one.unit.path, "type": kind, "kl_alone": one.kl, "weights": one.unit.size}
            for one, kind in zip(found.priced, found.kinds, strict=True)
        ],
    }
    mixed = get_format("modelslim_mixed" if WEIGHTS_ONLY in found.kinds else "modelslim_dynamic")
    assert isinstance(mixed, ModelSlim)
    conversion["format"] = mixed.name
    return mixed.with_types(found.types)


def _price_table(found: Mixture) -> Table:
    """What each module costs alone, the most costly first."""
    measured = [kind for kind in dict.fromkeys(k for one in found.priced for k in one.unit.kinds) if kind != FLOAT]
    table = Table(title="what modules cost alone, nats per token", title_justify="left")
    for column in ("module", *measured, "stored as"):
        table.add_column(column, justify="left" if column in ("module", "stored as") else "right")
    pairs = sorted(zip(found.priced, found.kinds, strict=True), key=lambda pair: -pair[0].kl[measured[0]])
    for one, kind in pairs[:MOST_SHOWN]:
        costs = [f"{one.kl[k]:.2g}" if k in one.kl else "" for k in measured]
        table.add_row(one.unit.path, *costs, "bf16" if kind == FLOAT else kind)
    if len(pairs) > MOST_SHOWN:
        table.caption = f"and {len(pairs) - MOST_SHOWN} more, in {CONVERSION}"
    return table


def _calibrate(
    state: Mapping[str, Tensor], checkpoint: Checkpoint, rows: list[list[int]], options: Options, watch: Watch
) -> Calibration:
    watch.say(f"  {sum(map(len, rows)):,} tokens calibrate the float model")
    model = streamed(checkpoint.architecture, state, get_format("fp32").build)
    return calibrate(model, rows, gram=options.rounding == "gptq")


def _write(
    out: Path,
    chosen: Format,
    options: Options,
    checkpoint: Checkpoint,
    prepared: Prepared,
    files: SourceFiles,
    watch: Watch,
) -> None:
    began = time.monotonic()
    state, calibration = prepared.state, prepared.calibration
    finished = _running_sizes(checkpoint.stored, state)
    with watch.count("converting", len(state)) as counter, _one_thread_each():

        def advance(done: int) -> None:
            rate = finished[done - 1] / max(time.monotonic() - began, 1e-9)
            counter.advance_to(done, f"{rate / 1e6:,.0f} MB/s")

        def refine(stored: dict[str, Tensor]) -> None:
            prepared.refine(stored)
            if checkpoint.block == (fp8.BLOCK, fp8.BLOCK) and not options.balance:
                _carry_blocks(stored, checkpoint, options)

        write_bundle(
            out,
            chosen,
            state,
            checkpoint.architecture,
            files,
            max(1, int(options.shard_gb * 1e9)),
            calibration,
            refine,
            options.threads or min(MOST_THREADS, os.cpu_count() or 1),
            advance,
            prepared.made.files,
        )
    seconds = time.monotonic() - began
    size = finished[-1] if finished else 0
    watch.say(f"  {size / 1e9:,.2f} GB in {seconds:,.1f} s: {size / 1e6 / seconds:,.0f} MB/s of the source")


def _running_sizes(stored: StoredTensors, state: Mapping[str, Tensor]) -> list[int]:
    """Bytes of the source up to and with each tensor."""
    sizes, total = [], 0
    for name in state:
        total += stored.size(name)
        sizes.append(total)
    return sizes


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tensors are converted side by side; each needs no threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    try:
        return read_json_object(path, DamagedFile)
    except FileNotFoundError:
        if optional:
            return {}
        raise IsthmusError(f"{path.parent} is no checkpoint: it has no {path.name}") from None
