"""`cxlmq broker`: one broker process in the foreground."""

from typing import Any

import click

from client.cli.common import CommandExit, common_options, config_options, settings


@click.command()
@click.option("--id", "number", type=click.IntRange(0), required=True, metavar="K",
              help="Number of this broker. 0 is the head: it creates the region, the others wait for it.")
@config_options
@common_options
def broker(number: int, overrides: dict[str, Any]) -> None:
    """Run one broker process in the foreground.

    `cxlmq cluster up` does this for a whole cluster. By hand, start every broker with the same settings, within 20
    seconds; the last one to stop removes the region.

    \b
    Examples (two terminals):
      cxlmq broker --id 0 --brokers 2 --name byhand
      cxlmq broker --id 1 --brokers 2 --name byhand
    """
    from broker.config import load_config
    from broker.errors import ConfigError

    config = load_config(**overrides)
    if number >= config.brokers:
        raise ConfigError(setting="id", value=number,
                          allowed=f"0 to {config.brokers - 1}, with {config.brokers} brokers")
    from broker.node import main

    arguments = ["--id", str(number), *(["--json-errors"] if settings().as_json else [])]
    raise CommandExit(main(arguments, config.to_json))
