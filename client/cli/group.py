"""`cxlmq group list|describe|reset|delete`: consumer groups of a topic."""

from typing import Any

import click

from client.cli import common, output
from client.cli.common import Target, print_json, settings, target_options
from client.cli.places import HELP, METAVAR, Last, PlaceType, settled
from client.start import Start

_COLUMNS = (("topic", "topic"), ("group", "group"), (">position", "position"), (">lag", "lag"), (">lost", "lost"),
            ("keeps data", "protected"), ("read by", "holder"))


@click.group()
def group() -> None:
    """Consumer groups: named places in a topic, which members move by committing."""


@group.command("list")
@click.argument("topic", required=False, default="")
@target_options
def list_(topic: str, target: Target) -> None:
    """List the groups of a topic, or of all, with what they have not read yet (lag) and cannot read any more (lost).

    \b
    Example:
      cxlmq group list frames --json | jq '.[] | select(.lag > 1000)'
    """
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        groups = sorted(admin.list_groups(topic), key=lambda each: (each["topic"], each["group"]))
    if settings().as_json:
        print_json(groups)
    elif groups:
        common.console().print(common.make_table("", (title for title, _ in _COLUMNS), (
            [{True: "yes", False: "no"}.get(each[key], each[key]) if isinstance(each[key], bool) else each[key]
             for _, key in _COLUMNS] for each in groups)))
    else:
        output.line("there are no groups: `cxlmq consume TOPIC --group NAME` makes one")


@group.command()
@click.argument("topic")
@click.argument("name")
@target_options
def describe(topic: str, name: str, target: Target) -> None:
    """Show one group: where it is, and who reads.

    \b
    Example:
      cxlmq group describe frames recorder
    """
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        values = admin.describe_group(topic, name)
    if settings().as_json:
        print_json(values)
    else:
        output.line(_text(values))


def _text(values: dict[str, Any]) -> str:
    lines = []
    for key, value in values.items():
        if key == "committed_unix_ns":
            key, value = "committed", common.time_text(value)  # noqa: PLW2901
        lines.append(f"{key.replace('_', ' '):<20} {value}")
    return "\n".join(lines)


@group.command()
@click.argument("topic")
@click.argument("name")
@click.option("--to", "start", type=PlaceType(), metavar=METAVAR, help=f"Where it goes; {HELP}")
@click.option("--protect/--no-protect", "protect", default=None,
              help="Keep what the group has not committed, also while nobody reads; or do not any more.")
@target_options
def reset(topic: str, name: str, start: Start | Last | None, protect: bool | None, target: Target) -> None:
    """Put a group somewhere else; the one way back. Refused while somebody reads for it.

    \b
    Examples:
      cxlmq group reset frames recorder --to 2026-11-21T10:00:00Z
      cxlmq group reset frames recorder --to @1795255200
      cxlmq group reset frames recorder --to -100
      cxlmq group reset frames recorder --no-protect
    """
    from client.admin import Admin

    if start is None and protect is None:
        raise click.UsageError("say --to, --protect or --no-protect")
    with Admin(**target.arguments) as admin:
        values = admin.reset_group(topic, name, None if start is None else settled(start, topic, target), protect)
    common.report(values, _text(values))


@group.command()
@click.argument("topic")
@click.argument("name")
@target_options
def delete(topic: str, name: str, target: Target) -> None:
    """Forget a group and its place, and keep nothing for it. Refused while somebody reads for it.

    \b
    Example:
      cxlmq group delete frames recorder
    """
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        admin.delete_group(topic, name)
    common.report({"deleted": name}, f"deleted: {name}")
