"""`cxlmq profiles`."""

import click

from client.cli import common, output
from client.cli.common import common_options, print_json, settings


@click.command()
@click.argument("profile", required=False)
@common_options
def profiles(profile: str | None) -> None:
    """Show what memory costs on published devices; what no source states is marked '*': assumed.

    A profile is a device, a path of parts joined by '+' (latencies add, the smallest bandwidth wins), and parameters
    of your own behind commas.

    \b
    Examples:
      cxlmq profiles
      cxlmq profiles cxl-direct+link-x8+switch
      cxlmq profiles cxl-switch-xconn,fence_ns=400 --json
    """
    from client.coherence import profile_report, profile_text
    from sim.cxl.profiles import PARAMETERS, ProfileError, load_profile, profile_names

    try:
        found = [load_profile(name) for name in ([profile] if profile else profile_names())]
    except ProfileError as error:
        raise click.UsageError(str(error)) from error
    if settings().as_json:
        print_json([each.as_dict() for each in found])
        return
    rows = [[each.name, *(f"{getattr(each, name):g}{'*' if name in each.assumed else ''}" for name in PARAMETERS)]
            for each in found]
    common.console().print(common.make_table("", ("profile", *(">" + name for name in PARAMETERS)), rows))
    if profile:
        for source in found[0].sources:
            output.line(f"source: {source}")
        output.line(profile_text(profile_report(profile)) or "")
