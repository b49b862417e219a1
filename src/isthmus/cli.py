"""One verb per stage, in the order of the story. A stage is imported only when it runs."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from isthmus import __version__, heap
from isthmus.chips import servers
from isthmus.errors import DamagedFile, GateRefused, IsthmusError, suggestion
from isthmus.lock import writing_bundle, writing_run
from isthmus.pools import placed_pools
from isthmus.recipe.practice import rollout_formats
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import Recipe
from isthmus.run import RunFolder, meant_run

STAGES = ("qualify", "plan", "handoff", "report")
SUPERVISED = ("pretrain", "sft", "rl")
INTERRUPTED = 130

_TARGET = click.argument("target", type=click.Path(path_type=Path))
_RUN = click.option(
    "--run", "folder", type=click.Path(path_type=Path), help="Run folder; runs/<recipe name> if absent."
)
_SET = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a key of the recipe.")


class StagesAndTools(click.Group):
    """Lists the stages in the order in which a run comes to them, then the tools."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        stages, wide = ("run", *STAGES[:2], "steps", *STAGES[2:], "serve"), max(map(len, self.commands))
        tools = [name for name in self.commands if name not in stages]
        for title, names in (("Stages", stages), ("Tools", tools)):
            told = [self.commands[name].get_short_help_str(formatter.width - wide - 6) for name in names]
            with formatter.section(title):
                formatter.write_dl([(name.ljust(wide), text) for name, text in zip(names, told, strict=True)])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args[0] in ("train", "rl", "pretrain", "sft", "sample"):
            ctx.fail(f"No such command {args[0]!r}. A step is run by its name: isthmus run RUN --only NAME")
        return super().resolve_command(ctx, args)


@click.group(cls=StagesAndTools, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="isthmus")
def cli() -> None:
    """Train a reasoning model on one vendor's chips, run it on another's, and prove every crossing.

    Start with: isthmus run recipes/tiny.toml
    """


@cli.command()
@_TARGET
@_RUN
@_SET
@click.option("--only", metavar="NAME", help="This step or stage alone; what it needs has to be done.")
@click.option("--until", metavar="NAME", help="All up to this step or stage.")
@click.option("--profile", is_flag=True, help="With --only STEP: write a Chrome trace of a few updates.")
@click.option("--revert", is_flag=True, help="Let a step that asked move to the next pool of place.train.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and what would run; write nothing.")
def run(
    target: Path,
    folder: Path | None,
    overrides: tuple[str, ...],
    only: str | None,
    until: str | None,
    profile: bool,
    revert: bool,
    dry_run: bool,
) -> None:
    """Run every stage of a recipe in order: qualify, plan, each step of training, hand-off, report.

    What is done is skipped, so the same command goes on where it stopped. TARGET is a recipe or a run folder.
    """
    if dry_run:
        _dry_run(target, folder, overrides, only, until)
        return
    if profile and (only is None or only in STAGES):
        raise IsthmusError("--profile traces one step; name it with --only")

    def check(recipe: Recipe, run: RunFolder | None) -> None:
        _check_before_start(recipe, run, acts=_chosen(recipe, only, until))

    opened = _open(target, folder, overrides, before_start=check)
    acts = _chosen(opened.recipe, only, until)
    began = time.monotonic()
    with _writing(opened):
        _run_all(opened, acts, profile, revert)
    watch = _watch()
    if acts[-1] != "report":
        watch.say(f"\n[bold]{acts[-1]}[/] is done. See it:  isthmus steps {opened.path}")
        return
    watch.say(f"\n[bold]done[/] in {time.monotonic() - began:,.0f} s")
    for line in importlib.import_module("isthmus.stages.report").outcome(opened):
        watch.say(line)
    watch.say(f"  read   {opened.path / 'report.html'}")
    watch.say(f"  chat   isthmus serve {opened.path}")


@cli.command()
@_TARGET
@_RUN
@_SET
def drill(target: Path, folder: Path | None, overrides: tuple[str, ...]) -> None:
    """Rehearse a failing pool: it trains, planted faults strike, and the run moves on.

    Rehearsed pools of place.train may train, the `faults` of a pool strike there, and [drill] of the recipe says how
    often others are drawn. Nothing of a drill is handed off or sealed. Other policies that [drill] names are played
    after it, to be compared. TARGET is a recipe or the folder of a drill; the same command goes on where it stopped.
    """
    if not target.is_dir() and load_recipe(target, overrides).drill is None:
        overrides = (*overrides, "drill.seed=0")
    opened = _open(target, folder, overrides, before_start=_check_before_start)
    if opened.recipe.drill is None:
        raise IsthmusError(f"{opened.path} is a run, and no drill: give the recipe, with another folder in --run")
    *acts, last = _acts(opened.recipe)
    with _writing(opened):
        _run_all(opened, acts, profile=False, agreed=False)
        importlib.import_module("isthmus.tools.drill").replay(opened, _watch())
        _run_all(opened, [last], profile=False, agreed=False)
    _watch().say(f"\n[bold]the drill is over[/]\n  read   {opened.path / 'report.html'}")


def _acts(recipe: Recipe) -> list[str]:
    """The stages and the steps of a run by name, in order. A drill hands nothing off."""
    last = [stage for stage in STAGES[2:] if recipe.drill is None or stage != "handoff"]
    return [*STAGES[:2], *(step.name for step in recipe.step), *last]


def _chosen(recipe: Recipe, only: str | None, until: str | None) -> list[str]:
    """The acts that a command asks for. Raises IsthmusError with a suggestion for a name that none has."""
    acts = _acts(recipe)
    if only is not None and until is not None:
        raise IsthmusError("--only runs one act and --until all up to one; give one of them")
    for option, name in (("--only", only), ("--until", until)):
        if name is not None and name not in acts:
            raise IsthmusError(f"{option} {name}: the run has no such step or stage{suggestion(name, acts)}")
    return [only] if only is not None else acts[: acts.index(until) + 1] if until is not None else acts


def _run_all(opened: RunFolder, acts: list[str], profile: bool, agreed: bool) -> None:
    kinds = {step.name: f" ({step.kind})" for step in opened.recipe.step}
    every = _acts(opened.recipe)
    try:
        for act in acts:
            _check_chips(opened.recipe, importlib.import_module("isthmus.tools.steps").wanted(opened, [act]))
            heading = f"{every.index(act) + 1}/{len(every)} {act}{kinds.get(act, '')}"
            if act in kinds:
                _run_step(act, opened, heading, profile, agreed)
            else:
                _run_stage(act, opened, heading)
    except DamagedFile:
        raise
    except GateRefused:
        _run_stage("report", opened, heading="report")
        raise


def _stage_command(stage: str, summary: str, repeatable: bool = False) -> None:
    def command(target: Path, folder: Path | None, overrides: tuple[str, ...], **options: bool) -> None:
        check = partial(_check_before_start, acts=[stage]) if stage != "report" else _no_check
        opened = _open(target, folder, overrides, before_start=check)
        with _writing(opened) if stage != "report" else nullcontext():
            _run_stage(stage, opened, heading=stage, **options)

    command.__doc__ = summary + "\n\nTARGET is a run folder or a recipe."
    for decorate in (_SET, _RUN, _TARGET):
        command = decorate(command)
    if repeatable:
        command = click.option("--again", is_flag=True, help="Repeat the stage even if it is done.")(command)
    cli.command(stage)(command)


@cli.command()
@_TARGET
@_RUN
@_SET
@click.option("--again", is_flag=True, help="Repeat the stage even if it is done.")
@click.option("--pool", "pools", multiple=True, metavar="NAME", help="Only this pool; can be given several times.")
@click.option("--budget", metavar="TIME", help="Time for the probes of a pool, such as 30s: those that tell most.")
@click.option("--prices", is_flag=True, help="List the probes and their prices, and run none.")
def qualify(target: Path, folder: Path | None, overrides: tuple[str, ...], again: bool, **options: Any) -> None:
    """Find out what each pool of the recipe is fit for.

    TARGET is a run folder or a recipe.
    """
    anew = again or options["budget"] or options["prices"]
    check = partial(_check_before_start, acts=() if anew else ("qualify",), pools=options["pools"] or None)
    opened = _open(target, folder, overrides, before_start=check)
    given = {name: value for name, value in options.items() if value}
    with _writing(opened):
        if given:
            _show(importlib.import_module("isthmus.stages.qualify"), opened, again=again, **given)
        else:
            _run_stage("qualify", opened, heading="qualify", again=again)


_stage_command(
    "plan", "Place the stages on pools by the verdicts, and the recipe's order or its [aim].", repeatable=True
)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN|RECIPE")
def steps(folder: Path) -> None:
    """Draw which weights and data come from where, and which steps are done, running or waiting."""
    opened = RunFolder.open(meant_run(folder)) if folder.is_dir() else None
    recipe = opened.recipe if opened else load_recipe(folder)
    _watch().console.print(importlib.import_module("isthmus.tools.steps").execute(recipe, opened))


@cli.command()
@click.argument("target", type=click.Path(path_type=Path), metavar="RUN|RECIPE")
@_SET
def cluster(target: Path, overrides: tuple[str, ...]) -> None:
    """Show what the recipe wants of the Ray cluster, and what the cluster has; exit code 1 if something is missing."""
    recipe = RunFolder.open(meant_run(target)).recipe if target.is_dir() else load_recipe(target, overrides)
    shown, missing = importlib.import_module("isthmus.nodes.cluster").execute(recipe)
    _watch().console.print(shown)
    if missing:
        raise GateRefused("\n".join(missing))


_RATE = click.FloatRange(0, 100, min_open=True)


@cli.command()
@_TARGET
@_RUN
@_SET
@click.option("--again", is_flag=True, help="Repeat the stage even if it is done.")
@click.option("--format", "format_name", metavar="NAME", help="Of a checkpoint: what to store; or give --for.")
@click.option("--for", "server", type=click.Choice(servers()), help="Who is to read it; chooses or checks the format.")
@click.option("--out", type=click.Path(path_type=Path), help="Where its bundle goes; ./NAME-FORMAT if absent.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="JSONL: golden `tokens`, or `prompt`s."
)
@click.option("--task", metavar="T", help="A task, or JSONL with `prompt` and `answer`, that both models answer.")
@click.option("--problems", type=click.IntRange(1), help="Problems of --task to answer; 100 if absent.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Longest answer; 256 tokens if absent.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="Of the answers; as [serve] has it.")
@click.option("--target", "on", metavar="DEVICE|CHIP", help="Where to verify; a chip is rehearsed. cpu if absent.")
@click.option("--dtype", help="Of the activations there: fp32, bf16 or fp16; fp32 if absent.")
@click.option("--calibrate", type=click.Path(path_type=Path), metavar="FILE", help="As `isthmus convert` takes it.")
@click.option("--calibrate-tokens", type=click.IntRange(1), help="Tokens of --calibrate to use; all if absent.")
@click.option("--balance", is_flag=True, help="Move outliers of activations into the weights first.")
@click.option("--rounding", type=click.Choice(["nearest", "gptq"]), help="Of int8 weights; nearest if absent.")
@click.option("--budget", type=_RATE, metavar="NATS", help="KL per token that types of modules are chosen for.")
@click.option("--max-mean-kl", type=_RATE, help="What the format may cost, nats per token; 0.02 if absent.")
@click.option("--max-chip-kl", type=_RATE, help="What the target may add, nats per token; 0.01 if absent.")
@click.option(
    "--max-accuracy-drop", type=click.FloatRange(0, 1, min_open=True), help="Margin on --task; 0.05 if absent."
)
@click.option("--max-mb", type=click.IntRange(1), help="Size of the golden inputs; 256 if absent.")
@click.option("--sign-key", type=click.Path(path_type=Path), help="Private Ed25519 key that signs the seal.")
def handoff(target: Path, folder: Path | None, overrides: tuple[str, ...], again: bool, **options: Any) -> None:
    """Export, check parity, and seal; exit code 1 if the gate refuses.

    TARGET is a run folder or a recipe, or a checkpoint that was trained elsewhere: a folder in Hugging Face layout.
    Then --format or --for says what to make of it, and the others how to prove it; of a run the recipe says all that.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if (target / "config.json").is_file() and not (target / "recipe.json").exists():
        if folder or overrides or again:
            raise IsthmusError("--run, --set and --again go with a run; a checkpoint has --format, --out and the rest")
        _hand_off_checkpoint(target, given)
        return
    if given:
        first = next(option for option in _options("handoff") if option.name in given)
        raise IsthmusError(
            f"{first.opts[0]} is for a checkpoint, and {target} is none: [handoff] of its recipe says it"
        )
    opened = _open(target, folder, overrides, before_start=partial(_check_before_start, acts=["handoff"]))
    with _writing(opened):
        _run_stage("handoff", opened, heading="handoff", again=again)


_CONVERTED = ("format_name", "server", "budget", "calibrate", "calibrate_tokens", "balance", "rounding")


def _hand_off_checkpoint(source: Path, given: dict[str, Any]) -> None:
    """Convert a checkpoint, then examine and seal what came of it."""
    if not {"format_name", "server"} & given.keys():
        raise IsthmusError(f"{source} is a checkpoint: --format says what to make of it, such as --format w8a8")
    published = importlib.import_module("isthmus.stages.handoff.published")
    converter = importlib.import_module("isthmus.tools.convert")
    ending = given.get("format_name") or given["server"]
    out = given.pop("out", None) or Path(f"{source.resolve().name}-{ending}")
    conversion = converter.Options(**{name: given.pop(name) for name in _CONVERTED if name in given})
    asked = published.prepare(source, published.Options(**given))
    watch = _watch()
    with writing_bundle(out):
        converter.convert(source, out, conversion, watch)
        published.execute(source, out, asked, watch)


def _options(command: str) -> list[click.Option]:
    return [one for one in cli.commands[command].params if isinstance(one, click.Option)]


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "format_name", metavar="NAME", help="What to store: bf16, w8a8, ...; or give --for.")
@click.option("--for", "server", type=click.Choice(servers()), help="Who is to read it; chooses or checks the format.")
@click.option(
    "--budget", type=click.FloatRange(0, min_open=True), metavar="NATS", help="KL per token that types are chosen for."
)
@click.option("--calibrate", type=click.Path(path_type=Path), metavar="FILE", help="JSONL of tokens, or of prompts.")
@click.option("--calibrate-tokens", type=click.IntRange(1), help="Tokens of --calibrate to use; all if absent.")
@click.option("--balance", is_flag=True, help="Move outliers of activations into the weights first.")
@click.option("--rounding", type=click.Choice(["nearest", "gptq"]), default="nearest", help="Of int8 weights.")
@click.option("--requantise", is_flag=True, help="Round fp8 weights a second time, where mxfp8 cannot hold them.")
@click.option("--shard-gb", type=click.FloatRange(0, min_open=True), default=5.0, help="Largest file, in 10^9 bytes.")
@click.option("--threads", type=click.IntRange(1), help="Tensors at once; as many as cores, at most 4, if absent.")
def convert(source: Path, out: Path, **options: Any) -> None:
    """Convert a published checkpoint into an unsealed bundle.

    SOURCE is a folder in Hugging Face layout, with float weights or DeepSeek's fp8. Memory holds a few tensors at a
    time, unless the model has to be calibrated. FILE has a line {"tokens": [...]} or {"prompt": ..., "completion": ...}
    per sequence, best of the model's own.
    """
    _ask_for_large_pages()
    stage = importlib.import_module("isthmus.tools.convert")
    with writing_bundle(out):
        stage.execute(source, out, stage.Options(**options), _watch())


def _ask_for_large_pages() -> None:
    """Torch gets memory in pages of 2 MB where the system lends them, and gives it back at once. Weights come and go
    here, and to clear small pages for them takes longer than to convert them. To be said before torch is loaded."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # glibc keeps freed blocks of up to 32 MB for itself otherwise.
    heap.set_option("mmap threshold", 1 << 20)


_BUNDLE = click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="BUNDLE")


@cli.command()
@_BUNDLE
@click.option("--source", type=click.Path(path_type=Path), required=True, help="The trained weights: a checkpoint.")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), help="JSONL: `tokens`, or `prompt` texts.")
@click.option("--synthetic", is_flag=True, help="Random tokens instead of prompts.")
@click.option(
    "--max-mb",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Size of what is kept; never above 64 MB and 5 % of the weights.",
)
def capture(folder: Path, **options: Any) -> None:
    """Put golden inputs and outputs into a bundle, where its trained weights are."""
    _ask_for_large_pages()
    with writing_bundle(folder):
        importlib.import_module("isthmus.tools.capture").execute(folder, watch=_watch(), **options)


@cli.command("slice")
@_BUNDLE
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", metavar="A:B", help="Layers A to B - 1, or layer A alone.")
@click.option("--each", is_flag=True, help="A slice of every layer, in folders of OUT.")
@click.option("--bare", is_flag=True, help="Keep the embedding; else it holds the golden inputs of the first layer.")
@click.option("--tokens", type=click.IntRange(2), default=512, show_default=True, help="Golden places, at most.")
def slice_bundle(folder: Path, out: Path, **options: Any) -> None:
    """Write a few layers of a captured bundle as a bundle, for `isthmus verify --slices`."""
    with writing_bundle(out):
        importlib.import_module("isthmus.tools.slice").execute(folder, out, _watch(), **options)


@cli.command()
@_BUNDLE
@click.option("--device", help="A torch device; the accelerator that is here if absent, else the CPU.")
@click.option("--dtype", help="Of the activations: fp32, bf16 or fp16; fp32 here, config.json's behind a URL.")
@click.option("--rehearse", metavar="CHIP", help="Enforce the rules of a chip that is not here, on the CPU.")
@click.option("--url", help="Verify an engine that serves this bundle there: tokens and log-probabilities alone.")
@click.option("--api-key", envvar="ISTHMUS_API_KEY", help="Of the engine at --url; or $ISTHMUS_API_KEY.")
@click.option("--serve-command", metavar="CMD", help="Start the engine with this: {bundle} and {port} are filled in.")
@click.option("--slices", type=click.Path(path_type=Path, exists=True), help="Drive it through these slices, too.")
@click.option(
    "--float-bundle", type=click.Path(path_type=Path, exists=True), help="And through the same weights in float."
)
@click.option(
    "--max-chip-kl",
    type=click.FloatRange(0, 100, min_open=True),
    default=0.01,
    show_default=True,
    help="What the target may add, nats per token.",
)
@click.option(
    "--max-mean-kl",
    type=click.FloatRange(0, 100, min_open=True),
    default=0.02,
    show_default=True,
    help="What the format may cost, nats per token.",
)
@click.option("--sign-key", type=click.Path(path_type=Path), help="Private Ed25519 key that signs the seal.")
def verify(folder: Path, **options: Any) -> None:
    """Verify a captured bundle on this machine, and seal it; exit code 1 if the gate refuses.

    Nothing but the folder is needed. A refusal names the module and the operator.
    """
    _ask_for_large_pages()
    with writing_bundle(folder):
        importlib.import_module("isthmus.tools.verify").execute(folder, _watch(), **options)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--host", help="Address to listen on; the recipe's if absent.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; the recipe's if absent.")
@click.option("--served-model-name", multiple=True, metavar="NAME", help="Name of the model in the API; may repeat.")
@click.option("--allow-origin", "allow_origins", multiple=True, metavar="URL", help="Pages of it may ask; may repeat.")
@click.option("--key-file", type=click.Path(path_type=Path), help="API keys, one `name key` per line; mode 600.")
@click.option("--access-log", metavar="FILE", help="A file, stdout, stderr or none; RUN/serve/access.jsonl if absent.")
@click.option("--log-prompts", is_flag=True, default=None, help="Write prompts and answers into the access log.")
@click.option("--on-drift", type=click.Choice(["alarm", "rollback"]), help="What a canary that drifts leads to.")
@click.option("--drain-seconds", type=float, help="What running requests get after SIGTERM or Ctrl-C.")
@click.option("--allow-open", is_flag=True, default=None, help="Listen beyond this machine without API keys.")
@click.option("--allow-unsealed", is_flag=True, default=None, help="Serve what no seal vouches for, loudly.")
@click.option("--thinking", type=click.Choice(["auto", "always", "never"]), help="Auto: as the chat template has it.")
@click.option("--trust", "trusted_keys", type=click.Path(path_type=Path), help="Public keys that may sign the seal.")
@click.option("--set", "overrides", multiple=True, metavar="serve.B=C", help="Override a key of the recipe's [serve].")
def serve(folder: Path, overrides: tuple[str, ...], **changes: Any) -> None:
    """Serve the sealed bundle of RUN: an API and a chat page.

    The API is OpenAI-compatible. A bundle that is not sealed, was touched, or failed its gate is refused; with --trust
    so is one that no key of that file has signed. RUN is a run folder, or the folder of a sealed bundle. Keys may also
    stand in $ISTHMUS_API_KEYS and $ISTHMUS_ADMIN_KEY.
    """
    stage = importlib.import_module("isthmus.stages.serve")
    folder = meant_run(folder)
    if (folder / "config.json").is_file() and not (folder / "recipe.json").exists():
        stage.execute_bundle(folder, _watch(), overrides, **changes)
    else:
        stage.execute(RunFolder.open(folder), _watch(), overrides, **changes)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--engine", required=True, metavar="URL", help="The engine that gets the weights.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Its admin key.")
@click.option("--bundle", type=click.Path(path_type=Path), help="What the engine serves, if it is not Isthmus'.")
@click.option("--exchange", type=click.Path(path_type=Path), help="A folder that it reads, if it is not Isthmus'.")
@click.option("--once", is_flag=True, help="End when the engine has what is there now.")
def follow(folder: Path, **options: Any) -> None:
    """Bring the weights that `publish = FOLDER` of a step writes to an engine, version by version."""
    importlib.import_module("isthmus.tools.follow").execute(folder, _watch(), **options)


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER...")
@_RUN
def collect(folders: tuple[Path, ...], folder: Path | None) -> None:
    """Bring back what stages left in copies of a run folder, on other machines.

    Records, cases, checkpoints and bundles come with their events. Every FOLDER is checked first: the same recipe, a
    whole chain of events, every file by its hash. What the run has already is never replaced by something else.
    """
    tool = importlib.import_module("isthmus.tools.collect")
    opened = RunFolder.open(folder or tool.meant_for(folders[0]))
    with _writing(opened):
        tool.execute(folders, opened, _watch())


@cli.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUNDLE|RUN")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--diff", type=click.Path(path_type=Path), metavar="OTHER", help="List the tensors that differ.")
@click.option("--trust", type=click.Path(path_type=Path), help="Public keys, one of which must have signed the seal.")
def inspect_bundle(folder: Path, as_json: bool, diff: Path | None, trust: Path | None) -> None:
    """Show what a bundle is, what its gate found, and who vouches for it. Of a run it is the bundle that it sealed.

    All files of a run are checked first; a drill has no bundle, and that is all. Exit code 1 if something is tampered,
    untrusted, or was refused by its gate.
    """
    found = importlib.import_module("isthmus.tools.inspect").execute(
        folder, _watch(), as_json=as_json, diff=diff, trust=trust
    )
    if getattr(found, "state", "sealed") not in ("sealed", "unsealed"):
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("failure", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write; reproduce-* in that of the failure else.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    metavar="S",
    default=120,
    show_default=True,
    help="What running and shrinking it here may take.",
)
@click.option("--no-shrink", is_flag=True, help="Pack it as it was found.")
@click.option(
    "--ranks", type=click.IntRange(1), metavar="N", help="Ranks to start from; as many as found it if absent."
)
def case(failure: Path, **options: Any) -> None:
    """Pack a failing probe as a small script for the chip's vendor.

    FAILURE is a folder that `isthmus qualify` kept (RUN/qualify/POOL/failures/...), or the run folder if it holds one
    failure alone. The script needs only torch and the chip's extension of it; it is shrunk first while it still fails.
    A folder is written, and the same as .tar.gz.
    """
    importlib.import_module("isthmus.tools.case").execute(failure, _watch(), **options)


@cli.group()
def key() -> None:
    """Keys that sign seals."""


@key.command("new")
@click.argument("file", type=click.Path(path_type=Path))
def new_key(file: Path) -> None:
    """Write a new private key to FILE, for its owner alone, and print the public key."""
    click.echo(importlib.import_module("isthmus.parity.signing").new_key(file))


_stage_command("report", "Write the dossier: one HTML file from what the run folder holds.")


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("--chip", required=True, metavar="CHIP", help="The chip to rehearse; `isthmus chips` lists them.")
@click.option(
    "--ranks",
    type=click.IntRange(1),
    metavar="N",
    help="Start so many processes, with the variables that torchrun sets.",
)
@click.option("--strict", is_flag=True, help="Refuse what the chip would run on the host's CPU.")
@click.option("--noise", is_flag=True, help="Let results vary as the chip's do unless it is told to be deterministic.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise.")
@click.option(
    "--fault", "faults", multiple=True, metavar="SPEC", help="Plant a fault, such as crash@rank=1,step=5; repeatable."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the report there.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- python train.py ...")
def rehearse(command: tuple[str, ...], **options: Any) -> None:
    """Run a training script under the rules of a chip that is not here, on the CPU.

    The script needs no change. Afterwards a report says which operators the chip's software has, runs on the host, or
    lacks. Exit code 1 if something was refused, else the script's own.

    Tried with torch 2.13: plain loops, DDP, FSDP and fully_shard, mixed precision, transformers' Trainer. Known to
    break on some chip: fully_shard from the meta device, tensor parallelism, Lightning, torchtitan.
    docs/qualification.md has the list.
    """
    report = importlib.import_module("isthmus.tools.rehearse").execute(list(command), _watch(), **options)
    if report.exit_code:
        raise click.exceptions.Exit(report.exit_code)


@cli.group()
def twin() -> None:
    """Record any training script of torch, and hold two records of the same training against each other."""


@twin.command("record", context_settings={"ignore_unknown_options": True})
@click.option(
    "--out", type=click.Path(path_type=Path), default="twin", show_default=True, metavar="FOLDER", help="The record."
)
@click.option(
    "--state-every",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="K",
    help="Record norms of parameters and optimiser state every K steps; 0: before the first one alone.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- python train.py ...")
def twin_record(command: tuple[str, ...], **options: Any) -> None:
    """Run a training script and write digests of each of its steps.

    The script needs no change. Of every optimiser step: digest of the batch, loss, gradient norm by module, the
    optimiser's options, random streams, precision. Each rank writes a file. The exit code is the script's own.
    """
    code = importlib.import_module("isthmus.tools.twin").record(list(command), _watch(), **options)
    if code:
        raise click.exceptions.Exit(code)


@twin.command("compare")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--band", default="standard", show_default=True, help="same, strict, standard or relaxed.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def twin_compare(first: Path, second: Path, band: str, as_json: bool) -> None:
    """Tell within which band two records agree, or the first step and module that part, and how.

    Exit code 1 if they part. The kinds: weights, optimiser state, data, data order, position in the data, learning
    rate, optimiser, precision, random state, one module, numerics.
    """
    tool = importlib.import_module("isthmus.tools.twin")
    verdict = tool.judge(first, second, band)
    if as_json:
        click.echo(verdict.model_dump_json(indent=2))
    else:
        tool.show(verdict, _watch())
    if not verdict.agree:
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("target")
@click.option(
    "--chip", required=True, metavar="CHIP", help="Whose software is asked about; `isthmus chips` lists them."
)
@click.option(
    "--ranks",
    type=click.IntRange(1),
    metavar="N",
    help="Training processes; those of the recipe's pool of CHIP if absent.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@_SET
@click.option("--wheel", type=click.Path(path_type=Path), help="A wheel of the vendor's, in place of the table.")
@click.option("--write-table", type=click.Path(path_type=Path), help="Write the wheel's operators as operators.csv.")
@click.option("--cann", type=click.Path(path_type=Path), help="An installation, whose symbols the package needs.")
def coverage(target: str, **options: Any) -> None:
    """Tell what a chip's software makes of a model's operators; no chip is needed.

    TARGET is a recipe, a run folder, a folder with a config.json, or the name of a preset such as deepseek-v3. Shares
    are of a lower bound of the time. Exit code 1 if it cannot be trained there: an operator is missing, or a dtype or a
    collective is refused. Reading a wheel runs its start-up code in a process of its own.
    """
    if not importlib.import_module("isthmus.tools.coverage").execute(target, _watch(), **options).trains:
        raise click.exceptions.Exit(1)


class ForecastGroup(click.Group):
    """Takes a recipe where a command of its own is not named: `isthmus forecast RECIPE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else "--help"
        return super().parse_args(ctx, args if first in (*self.commands, "-h", "--help") else ["recipe", *args])


@cli.group(cls=ForecastGroup)
def forecast() -> None:
    """Tell which step runs where, when it ends, what it costs, and what would change that.

    `isthmus forecast RECIPE` forecasts a recipe, or a run folder with what its qualification measured; its options are
    those of `isthmus forecast recipe --help`. The other commands make it better, or tell how good it is.
    """


@forecast.command("recipe")
@_TARGET
@_SET
@click.option(
    "--what-if", multiple=True, metavar="A.B=C", help="The same with a key of the recipe changed; repeatable."
)
@click.option("--price", "prices", multiple=True, metavar="POOL=N", help="Price of a chip-hour; repeatable.")
@click.option("--spares", multiple=True, metavar="POOL=N", help="Chips that stand by for failed ones; repeatable.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE", help="What `calibrate` wrote.")
@click.option("--start", type=click.DateTime(), help="When it begins; now if absent.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), metavar="FILE", help="Write each option as a line.")
def forecast_recipe(target: Path, **options: Any) -> None:
    """Forecast a recipe, or a run folder with what its pools were found to do.

    TARGET is a recipe or a run folder. Everything in the answer is a forecast: P10, P50 and P90, never a measurement.
    """
    importlib.import_module("isthmus.tools.forecast").execute(target, _watch(), **options)


@forecast.command("calibrate")
@_TARGET
@click.option("--pool", required=True, metavar="NAME", help="The pool on which the points were measured.")
@click.option(
    "--point", "points", required=True, multiple=True, metavar="ROWSxLENGTH=S", help="One update took S seconds; twice."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("calibration.json"),
    show_default=True,
    help="File to add to.",
)
def forecast_calibrate(target: Path, **options: Any) -> None:
    """Sharpen forecasts of a pool with measured updates, two of different sizes at best.

    TARGET is the recipe whose model was trained.
    """
    importlib.import_module("isthmus.tools.forecast").run_calibrate(target, _watch(), **options)


@forecast.command("validate")
@click.option("--rows", type=click.Path(path_type=Path), metavar="FILE", help="Published results to predict, as CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def forecast_validate(**options: Any) -> None:
    """Predict published results with whole groups left out, and print how wrong that is beside naive medians."""
    importlib.import_module("isthmus.tools.validate_forecast").execute(_watch(), **options)


@forecast.command("check")
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def forecast_check(folder: Path, **options: Any) -> None:
    """Score a finished run's own forecast, part by part."""
    importlib.import_module("isthmus.tools.forecast").run_check(folder, _watch(), **options)


@cli.command("recipe")
@click.argument("place", required=False, metavar="[SECTION[.KEY]]")
@click.option("--markdown", is_flag=True, help="Print all of it as docs/recipe.md has it.")
def explain_recipe(place: str | None, markdown: bool) -> None:
    """Show what may stand in a recipe: sections, or the keys of one with type, unit, default and meaning."""
    click.echo(importlib.import_module("isthmus.tools.recipe").execute(place, markdown))


@cli.command()
@click.argument("name", required=False)
def chips(name: str | None) -> None:
    """List the known chips, or show one with the source of each fact."""
    facts = importlib.import_module("isthmus.chips")
    _watch().console.print(facts.describe(name) if name else facts.describe_all())


_DAY = click.DateTime(["%Y-%m-%d"])


@cli.command()
@click.argument("chip", required=False)
@click.option("--as-of", type=_DAY, required=True, metavar="YYYY-MM-DD", help="Day of the records that count.")
@click.option("--buyer-parent", metavar="CC", help="Country of the buyer's ultimate parent, such as CN.")
@click.option("--site", metavar="CC", help="Country in which the chips stand.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Chips that are bought; held against caps.")
@click.option("--state-funded/--not-state-funded", default=None, help="Whether the data centre has state money.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def rules(chip: str | None, as_of: datetime, **options: Any) -> None:
    """Tell what dated export rules of both sides say of a chip, a buyer and a place.

    Without CHIP the class of every known chip. It is as of a day, never current, and no legal advice. Exit code 1 if a
    rule forbids it.
    """
    tool = importlib.import_module("isthmus.tools.rules")
    found = tool.execute(chip, as_of.date(), _watch(), **options)
    if found is not None and found.answer == "refused":
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--lang", type=click.Choice(["en", "zh"]), help="One language alone; both if absent.")
@click.option("--authority", metavar="CC", help="Country whose chips are domestic; that of [rules] if absent.")
def justify(folder: Path, lang: str | None, authority: str | None) -> None:
    """Write the paper that says why steps of RUN need foreign chips, for an authority or a board.

    One or two printed pages, in English and in Chinese, from one record, RUN/justify.json.
    """
    opened = RunFolder.open(meant_run(folder))
    tool = importlib.import_module("isthmus.tools.justify")
    with _writing(opened):
        tool.execute(opened, _watch(), **({"languages": [lang]} if lang else {}), authority=authority)


def main() -> None:
    """Entry point: turns errors into a message and an exit code (0 done, 1 a gate refused, 2 wrong usage)."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(cli(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except IsthmusError as error:
        click.echo(_wrapped(f"isthmus: {error}"), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo(
            f"\nisthmus: stopped. Nothing is lost; to go on, run the same command again:\n  {_command_line()}", err=True
        )
        sys.exit(INTERRUPTED)


def _wrapped(text: str) -> str:
    """Lines no wider than the terminal, broken between words alone; elsewhere the text as it is."""
    if not sys.stderr.isatty():
        return text
    wrapper = textwrap.TextWrapper(shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    lines = []
    for line in text.splitlines():
        wrapper.subsequent_indent = line[: len(line) - len(line.lstrip())] + "  "
        lines.append(wrapper.fill(line))
    return "\n".join(lines)


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _command_line() -> str:
    return " ".join(["isthmus", *sys.argv[1:]])


def _watch() -> Any:
    """Of several ranks the first one speaks."""
    return importlib.import_module("isthmus.progress").Watch(quiet=os.environ.get("RANK", "0") != "0")


def _open(
    target: Path,
    folder: Path | None,
    overrides: tuple[str, ...],
    before_start: Callable[[Recipe, RunFolder | None], None],
) -> RunFolder:
    """The run folder of TARGET, a run folder or a recipe. A recipe is checked before anything is made, with the run
    folder if that is there already."""
    if target.is_dir():
        if overrides or folder:
            raise IsthmusError("--set and --run go with a recipe; a run folder keeps the recipe it was made from")
        opened = RunFolder.open(target)
        before_start(opened.recipe, opened)
        return opened
    recipe = load_recipe(target, overrides)
    path = folder or Path("runs") / recipe.name
    before_start(recipe, RunFolder.create(path, recipe) if (path / "recipe.json").exists() else None)
    return RunFolder.create(path, recipe)


@contextmanager
def _writing(opened: RunFolder) -> Iterator[None]:
    """Hold the lock of a run folder whose files are as they were left; of several ranks the first one does."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with writing_run(opened.path):
        opened.go_on()
        yield


def _no_check(_recipe: Recipe, _run: RunFolder | None) -> None:
    """A dossier can be read where the chips are not."""


def _check_before_start(
    recipe: Recipe,
    run: RunFolder | None = None,
    *,
    acts: Collection[str] = (),
    pools: Collection[str] | None = None,
) -> None:
    """What can be known to fail before the first second is spent.

    The chips of the named `pools` have to be here; else those that `acts` of a run still need, or, where nothing tells
    which these are, all that the recipe places.
    """
    steps = importlib.import_module("isthmus.tools.steps")
    steps.check(recipe)
    steps.check_files(recipe, run, acts)
    formats = importlib.import_module("isthmus.formats")
    for name in (*rollout_formats(recipe), recipe.handoff.format):
        formats.check_format_name(name)
    importlib.import_module("isthmus.rules").rule_pools(recipe)
    _check_chips(recipe, steps.wanted(run, acts) if pools is None and run is not None and acts else pools)


def _check_chips(recipe: Recipe, pools: Collection[str] | None) -> None:
    """A process that torchrun started among others sees the chips of its own machine, and so asks for none."""
    chips = importlib.import_module("isthmus.chips")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        chips.check_names(recipe)
    else:
        chips.check_available(recipe, pools)
        if recipe.cluster is not None:
            importlib.import_module("isthmus.nodes.cluster").check_cluster(recipe, pools)


def _dry_run(
    target: Path, folder: Path | None, overrides: tuple[str, ...], only: str | None, until: str | None
) -> None:
    recipe = load_recipe(target, overrides)
    _check_before_start(recipe, acts=_chosen(recipe, only, until))
    click.echo(recipe.canonical())
    click.echo(f"recipe sha256 {recipe.digest()}")
    click.echo(f"would run {', '.join(_chosen(recipe, only, until))} in {folder or Path('runs') / recipe.name}")


def _run_step(name: str, opened: RunFolder, heading: str, profile: bool, agreed: bool) -> None:
    watch = _watch()
    if importlib.import_module("isthmus.records").step_is_done(opened, name):
        watch.say(f"[dim]{heading}: done before, skipped[/]")
        return
    watch.say(f"[bold]{heading}[/]")
    if opened.recipe.named(name).kind in SUPERVISED and "LOCAL_RANK" not in os.environ:
        supervisor = importlib.import_module("isthmus.supervise.supervisor")
        supervisor.supervise(opened, name, watch, profile=profile, agreed=agreed)
    else:
        importlib.import_module("isthmus.stages.steps").execute(opened, watch, name=name, profile=profile)


def _run_stage(stage: str, opened: RunFolder, heading: str, again: bool = False) -> None:
    watch = _watch()
    if not again and _is_done(stage, opened):
        watch.say(f"[dim]{heading}: done before, skipped[/]")
        return
    watch.say(f"[bold]{heading}[/]")
    options = {"again": True} if again and stage == "qualify" else {}
    _show(importlib.import_module(f"isthmus.stages.{stage}"), opened, **options)


def _show(module: Any, opened: RunFolder, **options: Any) -> None:
    """Execute a stage and print what it found, record by record, then all of them side by side."""
    watch = _watch()
    result = module.execute(opened, watch, **options)
    records = result if isinstance(result, list) else [result]
    render: Callable[[Any], Any] | None = getattr(module, "render", None)
    for record in records:
        if render is not None:
            watch.console.print(render(record))
    together = getattr(module, "render_together", lambda _records: None)(records)
    if together is not None:
        watch.console.print(together)


def _is_done(stage: str, opened: RunFolder) -> bool:
    """Whether the stage's record is there. The report is always written anew; a refused hand-off is not done."""
    records = importlib.import_module("isthmus.records")
    if stage == "report":
        return False
    if stage == "qualify":
        pools = placed_pools(opened.recipe)
        found = [opened.read_record(f"qualify/{pool.name}", records.QualifyRecord) for pool in pools]
        return all(record is not None and not record.disturbed for record in found)
    if stage == "handoff":
        record = opened.read_record("parity", records.HandoffRecord)
        return record is not None and record.verdict == "pass"
    return opened.read_record(stage, records.PlanRecord) is not None


if __name__ == "__main__":
    main()
