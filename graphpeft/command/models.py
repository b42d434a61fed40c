"""Subcommands about a model: ``explain``, ``show``, ``trace``, ``verify`` and ``export``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from graphpeft.adapters.state import adapters_of
from graphpeft.command.completing import PLACE, methods
from graphpeft.command.printing import as_json, tell
from graphpeft.command.sources import LORA, config_from, model_from, needed_inputs
from graphpeft.exporting import CARRIERS, FORMATS, formats_of
from graphpeft.exporting import export as export_model
from graphpeft.model.adapt import explain as explain_model
from graphpeft.rules.report import Report
from graphpeft.showing import show as show_model
from graphpeft.tracing.trace import trace as trace_model
from graphpeft.wording import joined

source = click.argument("source", metavar="MODEL", type=PLACE)


def with_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a subcommand the options that describe a config."""
    options = (
        click.option("--config", metavar="FOLDER", type=PLACE, help="A folder or a file with an adapter_config.json."),
        click.option("--method", show_default=LORA, shell_complete=methods, help="The method, if there is no config."),
        click.option("--set", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method."),
    )
    return functools.reduce(lambda made, option: option(made), reversed(options), command)


@click.command()
@source
@with_config
@as_json
def explain(source: str, config: str | None, method: str | None, options: tuple[str, ...], as_json: bool) -> None:
    """Tells what a config would adapt in a MODEL, and what it can't, with the reasons.

    The exit code is 1 if there is anything that can't be adapted.

    \b
      graphpeft explain timm:resnet18 --set r=4 --set target_modules=conv1,conv2
      graphpeft explain my.models:build --config runs/checkpoint-100
    """
    given = model_from(source)
    report = explain_model(given.model, config_from(config, method, options), example_inputs=given.example_inputs)
    told = {
        "method": report.method,
        "adapted": [
            {
                "site": each.site.label,
                "op": each.site.op.__name__,
                "parameters": each.parameter_count,
                "unmergeable": each.unmergeable,
                "fixed_arguments": list(each.site.fixed),
            }
            for each in report.adapted
        ],
        "fully_trained": report.fully_trained,
        "refused": [refusal._asdict() for refusal in report.refused],
        "excluded": report.excluded,
        "nothing_matched": report.nothing_matched or None,
        "learning": _learning(report.learning),
    }
    tell(told, as_json, report)
    if _problems(report):
        raise click.exceptions.Exit(1)


def _problems(report: Report) -> list[str]:
    """Returns why a config can't be applied."""
    refused = [f"{refusal.name}: {refusal.reason}" for refusal in report.refused]
    return [report.nothing_matched] if report.nothing_matched else refused


def _learning(learning: Any) -> Any:
    """Returns what a report says of learning: None, why that can't be told, or what doesn't learn."""
    if learning is None or isinstance(learning, str):
        return learning
    return {
        "dead": [
            {"site": site.label, "tensors": list(site.tensors), "reason": site.reason, "line": site.line or None}
            for site in learning.dead
        ]
    }


@click.command()
@source
@click.argument("path", metavar="[PATH]", type=PLACE, required=False)
@with_config
@click.option(
    "--measure",
    is_flag=True,
    help="Run the example inputs of an adapted MODEL, and show what is kept for the backward, and time.",
)
@as_json
def show(
    source: str,
    path: str | None,
    config: str | None,
    method: str | None,
    options: tuple[str, ...],
    measure: bool,
    as_json: bool,
) -> None:
    """Draws a MODEL as a page of HTML, with what a config would do to it; without PATH, in the browser.

    An adapted MODEL is drawn as it is. A PATH that ends with .json is for Google's Model Explorer. If the config can't
    be applied, stderr tells why, and the exit code is 1.

    \b
      graphpeft show runs/checkpoint-100 picture.html --measure
      graphpeft show timm:resnet18 --set r=4 --set target_modules=conv1,conv2
      graphpeft show timm:resnet18 resnet18.json --set target_modules=conv1
    """
    given = model_from(source)
    shown: Any = given.model
    is_adapted, has_config = adapters_of(given.model) is not None, bool(options) or config is not None
    if is_adapted and has_config:
        click.echo(f"graphpeft show: warning: {source} is adapted, and drawn as it is, without the config", err=True)
    elif has_config:
        if measure:
            raise click.UsageError(
                "--measure runs a model, and a config alone has none adapted; name an adapted MODEL, or leave out "
                "--measure or the config"
            )
        shown = explain_model(given.model, config_from(config, method, options), example_inputs=given.example_inputs)
    picture = show_model(shown, path, example_inputs=needed_inputs(given, source) if measure else None)
    problems = _problems(shown) if isinstance(shown, Report) else []
    tell({"picture": str(picture.path), **({"problems": problems} if problems else {})}, as_json, picture)
    if problems:
        click.echo(f"graphpeft show: {joined(problems, '; ')}", err=True)
        raise click.exceptions.Exit(1)


@click.command()
@source
@as_json
def trace(source: str, as_json: bool) -> None:
    """Traces a MODEL into one graph, and tells what stays a call and which decisions each run checks.

    \b
      graphpeft trace timm:resnet18
    """
    given = model_from(source)
    report: Any = trace_model(given.model, needed_inputs(given, source)).report
    told = {
        "nodes": list(report.nodes),
        "kept": dict(report.kept),
        "decisions": [{"line": each.line, "taken": each.taken} for each in report.decisions],
    }
    tell(told, as_json, report)


@click.command()
@source
@with_config
@as_json
def verify(source: str, config: str | None, method: str | None, options: tuple[str, ...], as_json: bool) -> None:
    """Checks on a MODEL that adapting, merging, saving and loading keep their laws; exit code 1 if one fails.

    \b
      graphpeft verify my.models:build --set r=4 --set target_modules='["qkv"]'
    """
    from graphpeft.testing import verify as verify_model  # the extra "testing" has what it needs

    given = model_from(source)
    found = verify_model(
        given.model,
        config_from(config, method, options),
        needed_inputs(given, source),
        progress=not as_json,
        quiet=True,
    )
    tell({"holds": found.holds, "laws": [verdict._asdict() for verdict in found.verdicts]}, as_json, found)
    if not found.holds:
        raise click.exceptions.Exit(1)


@click.command()
@source
@click.argument("path", metavar="PATH", type=PLACE)
@click.option(
    "--format", "format_", type=click.Choice(FORMATS), help="The format; if left out, that of PATH's suffix, or pt2."
)
@click.option(
    "--adapters", default="merged", show_default=True, type=click.Choice(CARRIERS), help="How adapters are carried."
)
@click.option("--fixed", is_flag=True, help="Keep all sizes of the inputs as the example has them.")
@click.option("--unchecked", is_flag=True, help="Don't run and compare what was written.")
@as_json
def export(
    source: str, path: str, format_: str | None, adapters: str, fixed: bool, unchecked: bool, as_json: bool
) -> None:
    """Writes a MODEL, adapted or not, to the file PATH, which runs without graphpeft, and checks it.

    \b
      graphpeft export runs/checkpoint-100 model.onnx
      graphpeft export my.models:build model.pt2 --adapters inputs
    """
    given = model_from(source)
    of_suffix = formats_of(Path(path).suffix.lower())
    format_ = format_ or (of_suffix[0] if len(of_suffix) == 1 else "pt2")
    report = export_model(
        given.model, needed_inputs(given, source), path, format_, adapters, dynamic=not fixed, check=not unchecked
    )
    told = {
        "format": report.format,
        "adapters": report.adapter_mode,
        "files": {str(Path(file)): size for file, size in report.files.items()},
        "checked": not unchecked,
    }
    tell(told, as_json, report)
