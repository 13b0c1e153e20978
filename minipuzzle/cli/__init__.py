"""The command line: one module per command, each imported when it is needed."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

import click

from minipuzzle.errors import UserError

COMMANDS = (
    "plan",
    "run",
    "demo",
    "score",
    "search",
    "prune",
    "repair",
    "distill",
    "eval",
    "export",
    "report",
)
USER_ERROR = 2
INTERRUPTED = 130
# Mistakes of the environment, not ours: full or read-only disks, missing rights, no such place.
_ENVIRONMENT = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.EIO,
)


class LazyGroup(click.Group):
    """A group whose commands are the `command` of the modules in this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of a first visit."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, its module imported now."""
        if cmd_name not in COMMANDS:
            return None
        found = importlib.import_module(f"minipuzzle.cli.{cmd_name}").command
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click, but an unknown command names the nearest one."""
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and not args[0].startswith("-") and near:
            ctx.fail(f"There is no command {args[0]!r}; did you mean {near[0]}?")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="minipuzzle", message="%(prog)s %(version)s")
def cli() -> None:
    """Make hybrid language models (Mamba-2, attention, FFN) smaller without making them worse.

    \b
    minipuzzle demo                     the whole job on the bundled model
    minipuzzle plan MODEL               what a deployment needs in memory
    minipuzzle run RECIPE               all stages, each of which is also a command
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    2 and one line on standard error for what the user can put right, 130 for Ctrl-C; anything
    else that goes wrong is our mistake and keeps its traceback.
    """
    _calm_libraries()
    try:
        result = cli.main(arguments, prog_name="minipuzzle", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UserError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("Stopped; run the same command again to go on.", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # `minipuzzle plan ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror}")


def _fail(message: str) -> int:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    return USER_ERROR


def _calm_libraries() -> None:
    """Settings that libraries read when they are imported, unless the user chose others."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
