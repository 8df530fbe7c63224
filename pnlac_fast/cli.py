"""The command line: its group of commands, and what a command ends with."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from pnlac_fast import __version__
from pnlac_fast.commands import answers, machine, neurons, results, stores, tuning
from pnlac_fast.options import config

HELP = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "PNLAC", "max_content_width": 110}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of use."""
        return list(self.commands)


@click.group(cls=_Group, context_settings=HELP)
@click.version_option(__version__, prog_name="pnlac-fast")
@click.option(
    "--config",
    type=click.Path(),
    callback=config,
    is_eager=True,
    expose_value=False,
    help="TOML file with a table per command.",
)
def commands() -> None:
    """Find the neurons by which a fine-tune on one topic moves the others; test them; keep them out of the fine-tune.

    Start with: pnlac-fast demo

    Each option is also read from the environment, as PNLAC_<COMMAND>_<OPTION>, and from the file of --config.
    """


for _command in (
    stores.cache,
    stores.recount,
    stores.merge,
    stores.info,
    neurons.locate,
    neurons.patch,
    tuning.finetune,
    tuning.sweep,
    answers.generate,
    answers.score,
    answers.utility,
    results.report,
    results.publish,
    results.study,
    results.demo,
    machine.env,
    machine.bench,
):
    commands.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 usage, 3 the user can mend it, 4 stopped but resumable."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        commands.main(args=arguments, prog_name="pnlac-fast", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("Stopped: run the same command again.", err=True)
        return 4
    except Exception as error:
        code = getattr(error, "exit_code", 3 if isinstance(error, OSError) else None)
        if code is None:  # errors of this package carry one, those of files and disks say enough; this is a defect
            raise
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.strerror}: '{error.filename}': check the path and its permissions."
        click.echo(f"Error: {said}", err=True)
        return int(code)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
