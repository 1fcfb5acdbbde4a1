"""`cxlmq group list|describe|reset|delete`: consumer groups of a topic."""

import datetime
from typing import Any

import click

from client.cli import common
from client.cli.common import Target, print_json, settings, target_options
from client.start import Start, parse_start

_COLUMNS = (("topic", "topic"), ("group", "group"), (">position", "position"), (">lag", "lag"), (">lost", "lost"),
            ("keeps data", "protected"), ("read by", "holder"))


class StartType(click.ParamType):
    """beginning, end, a position, or a time."""

    name = "start"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Start:
        """A start as the library takes it."""
        from broker.errors import ConfigError

        try:
            return parse_start(value) if isinstance(value, str) else value
        except ConfigError as error:
            self.fail(f"{value!r} is no place in a topic: allowed are {error.details.get('allowed')}", param, ctx)


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
        click.echo("there are no groups: `cxlmq consume TOPIC --group NAME` makes one")


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
        _show(admin.describe_group(topic, name))


def _show(values: dict[str, Any]) -> None:
    if settings().as_json:
        print_json(values)
        return
    for key, value in values.items():
        if key == "committed_unix_ns":
            moment = datetime.datetime.fromtimestamp(int(value) / 1e9, datetime.UTC)
            key, value = "committed", moment.isoformat(timespec="milliseconds")  # noqa: PLW2901
        click.echo(f"{key.replace('_', ' '):<20} {value}")


@group.command()
@click.argument("topic")
@click.argument("name")
@click.option("--to", "start", type=StartType(), metavar="beginning|end|POSITION|TIME", help="Where it goes.")
@click.option("--protect/--no-protect", "protect", default=None,
              help="Keep what the group has not committed, also while nobody reads; or do not any more.")
@target_options
def reset(topic: str, name: str, start: Start | None, protect: bool | None, target: Target) -> None:
    """Put a group somewhere else; the one way back. Refused while somebody reads for it.

    \b
    Examples:
      cxlmq group reset frames recorder --to 2026-11-21T10:00:00Z
      cxlmq group reset frames recorder --to @1795255200
      cxlmq group reset frames recorder --no-protect
    """
    from client.admin import Admin

    if start is None and protect is None:
        raise click.UsageError("say --to, --protect or --no-protect")
    with Admin(**target.arguments) as admin:
        _show(admin.reset_group(topic, name, start, protect))


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
    if settings().as_json:
        print_json({"deleted": name})
    else:
        click.echo(f"deleted: {name}")
