"""`cxlmq topic create|alter|list|describe|delete`."""

from typing import Any

import click

from broker.errors import ConfigError, UnknownTopic
from client.cli import common, output
from client.cli.common import Target, print_json, say, settings, target_options

_COLUMNS = (("name", "name"), (">order", "order"), (">ack", "ack"), (">RF", "replication_factor"),
            (">first", "first_position"), (">end", "end_position"), (">batches", "committed_batches"))


class RetentionType(click.ParamType):
    """A size, 0, or "keep"."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; -1 for "keep"."""
        if value in ("keep", "-1", -1):
            return -1
        return common.SIZE.convert(value, param, ctx)


@click.group()
def topic() -> None:
    """Create, alter, list, describe and delete topics."""


def topic_options(function: Any) -> Any:
    """What a new topic promises: --order, --replication-factor, --retention (and --ack, of the command itself)."""
    function = click.option(
        "--retention", type=RetentionType(), default=0, metavar="SIZE|keep",
        help="0: keep messages while there is room; a size: drop what is older than that many bytes; keep: never "
             "drop, publishers wait instead [0].")(function)
    function = click.option(
        "--replication-factor", "--rf", type=int, default=1, show_default=True,
        help="Copies of the data: 1 is memory alone, every further one is on the disk of another broker. At most the "
             "number of brokers.")(function)
    return click.option(
        "--order", type=int, default=5, show_default=True,
        help="0: none, 1: per broker, 2: one global order, 5: global, and every publisher's own order kept "
             "(4 is an alias of 5).")(function)


def check_topic(name: str, order: int, ack: int, replication_factor: int, retention: int) -> dict[str, Any]:
    """Arguments for `Admin.create_topic`. Raises `BadTopicName` or `BadTopicOptions` before anybody is asked."""
    from broker.config import TopicConfig

    wanted = TopicConfig(name=name, order=order, ack=ack, replication_factor=replication_factor,
                         retention_bytes=retention)
    settled, notes = wanted.validate(None)
    for note in notes:
        say(f"note: {note}")
    return {"name": settled.name, "order": settled.order, "ack": settled.ack,
            "replication_factor": settled.replication_factor, "retention_bytes": settled.retention_bytes}


@topic.command()
@click.argument("name")
@topic_options
@click.option("--ack", type=int, default=1, show_default=True,
              help="When a message counts as taken. 0: at once, 1: ordered in memory, 2: on the disks of all replicas "
                   "(needs --replication-factor 2 or more).")
@click.option("--if-not-exists", is_flag=True, help="A topic that is there and promises the same is no failure.")
@target_options
def create(name: str, order: int, ack: int, replication_factor: int, retention: int, if_not_exists: bool,
           target: Target) -> None:
    """Create a topic.

    \b
    Examples:
      cxlmq topic create frames
      cxlmq topic create frames --if-not-exists
      cxlmq topic create ledger --ack 2 --replication-factor 2 --retention keep
    """
    values = check_topic(name, order, ack, replication_factor, retention)
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        made = admin.create_topic(**values, exist_ok=if_not_exists)
    common.report(made, f"topic {made['name']!r} is there: order {made['order']}, ack {made['ack']}, replication "
                        f"factor {made['replication_factor']}")


@topic.command()
@click.argument("name")
@click.option("--retention", type=RetentionType(), metavar="SIZE|keep",
              help="From now on: 0 keeps messages while there is room; a size drops what is older than that many "
                   "bytes; keep never drops.")
@click.option("--ack", type=int, help="When a message counts as taken, for publishers that are opened from now on and "
                                      "do not say themselves: 0, 1, or 2 (needs a replica).")
@target_options
def alter(name: str, retention: int | None, ack: int | None, target: Target) -> None:
    """Change what a topic promises while it is in use. Order and replication factor stay as they were created.

    \b
    Examples:
      cxlmq topic alter frames --retention 512MiB
      cxlmq topic alter ledger --retention keep --ack 2
    """
    from client.admin import Admin

    if retention is None and ack is None:
        raise click.UsageError("say --retention or --ack")
    with Admin(**target.arguments) as admin:
        made = admin.alter_topic(name, retention_bytes=retention, ack=ack)
    kept = {0: "while there is room", -1: "for ever"}.get(made["retention_bytes"],
                                                                f"{made['retention_bytes']} bytes")
    common.report(made, f"topic {made['name']!r} now has ack {made['ack']}, and keeps messages: {kept}")


@topic.command("list")
@target_options
def list_(target: Target) -> None:
    """List all topics.

    \b
    Example:
      cxlmq topic list --json | jq -r '.[].name'
    """
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        topics = sorted(admin.list_topics(), key=lambda each: str(each["name"]))
    if settings().as_json:
        print_json(topics)
    elif topics:
        common.console().print(common.make_table("", (title for title, _ in _COLUMNS), (
            [each[key] for _, key in _COLUMNS] for each in topics)))
    else:
        output.line("there are no topics: `cxlmq topic create NAME` makes one")


@topic.command()
@click.argument("name")
@target_options
def describe(name: str, target: Target) -> None:
    """Show one topic: what it promises, and which positions can be read.

    \b
    Example:
      cxlmq topic describe frames
    """
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        values = admin.describe_topic(name)
    if settings().as_json:
        print_json(values)
        return
    for key, value in values.items():
        if key == "created_unix_ns":
            key, value = "created", common.time_text(value)  # noqa: PLW2901
        elif key == "degraded":
            value = "; ".join(value) if isinstance(value, list) and value else "no"  # noqa: PLW2901
        output.line(f"{key.replace('_', ' '):<20} {value}")


@topic.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--if-exists", is_flag=True, help="A topic that is not there is no failure.")
@target_options
def delete(names: tuple[str, ...], if_exists: bool, target: Target) -> None:
    """Delete topics and everything in them, at once and without asking.

    \b
    Example:
      cxlmq topic delete frames ledger
    """
    from broker.config import check_topic_name
    from client.admin import Admin

    for name in names:
        check_topic_name(name)
    if len(set(names)) != len(names):
        raise ConfigError(setting="names", value=" ".join(names), allowed="each topic once")
    deleted = []
    with Admin(**target.arguments) as admin:
        for name in names:
            try:
                admin.delete_topic(name)
                deleted.append(name)
            except UnknownTopic:
                if not if_exists:
                    raise
    common.report({"deleted": deleted},
                  f"deleted: {', '.join(deleted)}" if deleted else "there was nothing to delete")
