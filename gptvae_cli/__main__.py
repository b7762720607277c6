"""The command `gptvae`, and `python -m gptvae_cli` where that is not on the path."""

import signal
import sys
from contextlib import suppress
from typing import NoReturn

from gptvae_cli.errors import NOT_ON_WINDOWS, ExitCode

_SIGNALLED = (ExitCode.HUNG_UP, ExitCode.INTERRUPTED, ExitCode.TERMINATED)


def main() -> None:
    """The console script. What it runs takes a moment to import, in which somebody may have changed their mind."""
    if sys.platform == "win32":
        sys.exit(NOT_ON_WINDOWS)
    try:
        from gptvae_cli.cli.app import main as run

        run()
    except KeyboardInterrupt:
        _end_by(signal.SIGINT)
    except SystemExit as ended:
        if ended.code not in _SIGNALLED:
            raise
        _end_by(int(ended.code) - 128)


def _end_by(number: int) -> NoReturn:
    """Ends as if nobody had caught the signal, once all is tidy: or a shell would go on with its loop, and `make` keep
    what is unfinished. They call it 128 + number; so does the first process of a container, which none ends."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError, ValueError):  # closed, or gone
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
