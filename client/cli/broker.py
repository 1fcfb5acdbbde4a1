"""`cxlmq broker`: one broker process in the foreground."""

from typing import Any

import click

from client.cli.common import CommandExit, common_options, config_options, say, settings


@click.command()
@click.option("--id", "number", type=click.IntRange(0), required=True, metavar="K",
              help="Number of this broker. 0 is the head: it creates the region, the others wait for it.")
@click.option("--recover", type=click.Path(file_okay=False), metavar="DIR",
              help="Rebuild topics and positions from the replicas in this data directory; the same for every broker.")
@click.option("--fresh", is_flag=True,
              help="With --id 0: set aside what an earlier cluster left in the data directory.")
@config_options
@common_options
def broker(number: int, recover: str | None, fresh: bool, overrides: dict[str, Any]) -> None:
    """Run one broker process in the foreground.

    `cxlmq cluster up` does this for a whole cluster. By hand, start every broker with the same settings, within 20
    seconds; the last one to stop removes the region.

    \b
    Examples (two terminals):
      cxlmq broker --id 0 --brokers 2 --name byhand
      cxlmq broker --id 1 --brokers 2 --name byhand
    """
    from broker.config import load_config, resolved
    from broker.data_directory import before_start
    from broker.errors import ConfigError

    if recover is not None:
        overrides["data_directory"] = resolved(recover, "recover")
    config = load_config(**overrides)
    if number >= config.brokers:
        raise ConfigError(setting="id", value=number,
                          allowed=f"0 to {config.brokers - 1}, with {config.brokers} brokers")
    if number == 0:
        before_start(config, recover is not None, fresh, lambda note: say(f"note: {note}"))
    from broker.node import main

    arguments = ["--id", str(number), *(["--recover"] if recover else []),
                 *(["--json-errors"] if settings().as_json else [])]
    raise CommandExit(main(arguments, config.to_json))
