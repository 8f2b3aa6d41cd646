"""The `ddil-ray` command. Each subcommand is a module here; what it needs is imported when it runs.

To add a command: a module with a function, and a row in `_COMMANDS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import typer

from ddil_ray.cli.ablate import ablate
from ddil_ray.cli.chain import chain
from ddil_ray.cli.compare import compare
from ddil_ray.cli.demo import demo
from ddil_ray.cli.demo_t2i import demo_t2i
from ddil_ray.cli.distill import distill
from ddil_ray.cli.evaluate import evaluate
from ddil_ray.cli.export import export
from ddil_ray.cli.plan import plan
from ddil_ray.cli.prepare import prepare
from ddil_ray.cli.register import register
from ddil_ray.cli.sample import sample
from ddil_ray.cli.scale import scale
from ddil_ray.cli.serve import serve
from ddil_ray.cli.train_teacher import train_teacher
from ddil_ray.errors import DdilError, RunStoppedError, first_line
from ddil_ray.runtime.signals import ended_by_signals

__all__ = ["app", "main"]

_COMMANDS: dict[str, Callable[..., None]] = {
    "distill": distill,
    "plan": plan,
    "scale": scale,
    "train-teacher": train_teacher,
    "prepare": prepare,
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
    "serve": serve,
    "register": register,
    "compare": compare,
    "chain": chain,
    "ablate": ablate,
    "demo": demo,
    "demo-t2i": demo_t2i,
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Distil diffusion models into few-step students on Ray, with DDIL's mixture of states.",
)
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input, 1 failed, 130 or 143 stopped by a signal."""
    # Read when torch is loaded. Threads of torch that spin while they wait make a busy machine tens of times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        with ended_by_signals():
            app(args=arguments, prog_name="ddil-ray")
    except DdilError as error:
        prefix = "" if isinstance(error, RunStoppedError) else "Error: "
        print(f"{prefix}{error}", file=sys.stderr)  # noqa: T201 - the command's own output
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from ddil_ray.storage import no_room

        if not no_room(error):
            raise
        message = f"No room is left to write to: {first_line(error)}. Make some, and give the command again."
        print(f"Error: {message}", file=sys.stderr)  # noqa: T201 - the command's own output
        sys.exit(1)
