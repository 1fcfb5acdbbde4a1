"""Entry of the `cxlmq` command: the groups, loaded when they are used, and one place where errors end."""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from broker.errors import CxlmqError
from client.cli.common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    CommandExit,
    RunSettings,
    exit_code_of,
    print_error,
)

# Command -> (module, attribute, what it does). Help is made from this table without loading anything.
_COMMANDS: dict[str, tuple[str, str, str]] = {
    "cluster": ("client.cli.cluster", "cluster", "Start, look at and stop a cluster on this machine."),
    "broker": ("client.cli.broker", "broker", "Run one broker process in the foreground."),
    "topic": ("client.cli.topic", "topic", "Create, list, describe and delete topics."),
    "produce": ("client.cli.produce", "produce", "Publish messages from a file or standard input."),
    "consume": ("client.cli.consume", "consume", "Print the messages of a topic."),
    "group": ("client.cli.group", "group", "List, describe, reset and delete consumer groups."),
    "security": ("client.cli.security", "security", "Certificates, tokens and rights for clusters with security."),
    "region": ("client.cli.region", "region", "Look into shared memory, and remove what dead clusters left."),
    "profiles": ("client.cli.profiles", "profiles", "What memory costs on published devices."),
    "sim": ("sim.cluster.cli", "sim", "Run a whole cluster under a seed, with faults, in one process."),
    "chaos": ("sim.chaos.cli", "chaos", "Run a cluster under load and faults, and judge every invariant."),
    "bench": ("client.cli.bench", "bench", "Measure this machine's limits and a cluster's speed."),
}


class OutputClosed(Exception):
    """Whoever read the output has enough (`| head`)."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands whose module is there."""
        return [name for name, (module, _, _) in _COMMANDS.items() if importlib.util.find_spec(module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run; a reader that went away is told to `run`, before click makes a failure of it."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise OutputClosed from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][2]) for name in self.list_commands(ctx)])


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"cxlmq {version('cxlmq')}")
        except PackageNotFoundError:
            click.echo("cxlmq (not installed: run from its folder)")
        context.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version,
              help="Print the version.")
def cli() -> None:
    """A message broker whose brokers share CXL memory, simulated on this machine.

    \b
    A first tour:
      cxlmq cluster up --detach                 four brokers, ready in two seconds
      cxlmq topic create greetings
      echo hello | cxlmq produce greetings
      cxlmq consume greetings                   prints: hello
      cxlmq cluster down

    Every command has --help with examples, and --json for programs. Data goes to standard output, remarks and errors
    to standard error.

    \b
    Exit codes:
      0    done
      1    it failed (the error says what to do)
      2    wrong usage or configuration; nothing was started or sent
      3    there is no such cluster or topic
      130  interrupted (Ctrl-C)
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every error ends here."""
    settings = RunSettings()
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="cxlmq", standalone_mode=False,
                 obj=settings)
        sys.stdout.flush()
    except CommandExit as end:
        return end.code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return EXIT_USAGE
    except click.ClickException as error:
        return _usage_error(error, settings)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except (OutputClosed, BrokenPipeError):
        _discard_output()               # that is no error
    except CxlmqError as error:
        _show_traceback(settings)
        hint = _hint(error)
        print_error(error.code, error.message + hint, error.details, settings.as_json)
        return exit_code_of(error)
    except Exception as error:
        _show_traceback(settings)
        what = f"{type(error).__name__}: {error}"
        print_error("internal", f"{what}: this is a mistake of ours; --debug shows where", {}, settings.as_json)
        return EXIT_FAILED
    return EXIT_OK


def _usage_error(error: click.ClickException, settings: RunSettings) -> int:
    context = getattr(error, "ctx", None)
    help_command = f"{context.command_path} --help" if context is not None else "cxlmq --help"
    print_error("usage", f"{error.format_message().rstrip('.')}: see `{help_command}`", {}, settings.as_json)
    return EXIT_USAGE


def _show_traceback(settings: RunSettings) -> None:
    if settings.debug:
        traceback.print_exc()


def _hint(error: CxlmqError) -> str:
    """The clusters that do run, for a name that does not."""
    if error.code != "region-missing":
        return ""
    from broker.region import find_regions

    names = [each.name for each in find_regions() if each.live]
    return f"; these run: {', '.join(names)}" if names else ""


def _discard_output() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def main(arguments: Sequence[str] | None = None) -> Any:
    """The `cxlmq` command."""
    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
