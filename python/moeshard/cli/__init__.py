"""The command line: ``moeshard inspect``, ``generate``, ``plan`` and others; ``moeshard --help`` lists them."""

from __future__ import annotations

from moeshard.cli.process import orderly_exit, warnings_told


def main() -> None:
    """Run the command line of this process and exit.

    Exit codes: 0 done, 1 an error (also: stdout cannot be written), 2 wrong usage, 3 (``place``) no node is good
    enough, 130 interrupted, 129 hung up, 143 terminated, 141 the reader of stdout has left.
    """
    try:
        with orderly_exit(), warnings_told():
            from moeshard.cli.app import app

            app(prog_name="moeshard")
    except KeyboardInterrupt:  # before or after what the application itself guards
        raise SystemExit(130) from None
