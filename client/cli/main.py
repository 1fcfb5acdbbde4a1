"""Entry of the `cxlmq` command: the groups, loaded when they are used, and one place where errors end."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from broker.errors import CxlmqError
from client.cli import output
from client.cli.common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    CommandExit,
    RunSettings,
    exit_code_of,
    print_error,
    say,
)
from client.cli.ending import Stopped, interrupting

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
        """Run; what ended it is told to `run`, before click makes a failure of it, or a line of its own."""
        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            raise CommandExit(stopped.exit_code) from None
        except KeyboardInterrupt:
            raise CommandExit(EXIT_INTERRUPTED) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][2]) for name in self.list_commands(ctx)])


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version

        try:
            output.line(f"cxlmq {version('cxlmq')}")
        except PackageNotFoundError:
            output.line("cxlmq (not installed: run from its folder)")
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
      0    done; of produce: every message is acknowledged
      1    it failed (the error says what to do); of produce: some messages are not acknowledged, and it says how many;
           of cluster status, region verify, chaos and sim: something is wrong
      2    wrong usage or configuration; nothing was started or sent
      3    there is no such cluster or topic
      130  interrupted by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP; of produce: what was read until then is acknowledged

    A command that has changed something and cannot print that it has ends with 0, and a remark. A reader that goes away
    (`| head`) is no failure; an output that cannot be written is one, of every command that is there to print.
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every error ends here."""
    settings = RunSettings()
    with output.guarded():
        try:
            with interrupting():
                return _run(arguments, settings)
        except Stopped as stopped:          # while an error was told
            return stopped.exit_code


def _run(arguments: Sequence[str] | None, settings: RunSettings) -> int:
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="cxlmq", standalone_mode=False,
                 obj=settings)
        sys.stdout.flush()
    except CommandExit as end:
        return _ended(end.code)
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        return EXIT_USAGE
    except click.ClickException as error:
        return _usage_error(error, settings)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except output.OutputClosed:
        return EXIT_OK
    except CxlmqError as error:
        _show_traceback(settings)
        hint = _hint(error)
        print_error(error.code, error.message + hint, error.details, settings.as_json)
        return exit_code_of(error)
    except OSError as error:                # a file, a disk, a limit of this machine
        _show_traceback(settings)
        where = f"{error.filename}: " if error.filename else ""
        print_error("system", f"{where}{error.strerror or error}: see to it, and try again; --debug shows where",
                    {"errno": error.errno, "file": error.filename}, settings.as_json)
        return EXIT_FAILED
    except Exception as error:
        _show_traceback(settings)
        what = f"{type(error).__name__}: {error}"
        print_error("internal", f"{what}: this is a mistake of ours; --debug shows where", {}, settings.as_json)
        return EXIT_FAILED
    return EXIT_OK


def _ended(code: int) -> int:
    """The exit code of a command that has said what there is to say, if it could be written."""
    try:
        sys.stdout.flush()
    except output.OutputClosed:
        pass
    except output.OutputFailed as error:
        say(f"error: {error.message} ({error.code})")
        return code or EXIT_FAILED
    return code


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


def main(arguments: Sequence[str] | None = None) -> Any:
    """The `cxlmq` command."""
    output.open_standard_streams()
    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
