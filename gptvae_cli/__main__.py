"""The command `gptvae`, and `python -m gptvae_cli` where that is not on the path."""

import sys

from gptvae_cli.errors import ExitCode


def main() -> None:
    """The console script. What it runs takes a moment to import, in which somebody may have changed their mind."""
    if sys.platform == "win32":
        sys.exit("gptvae runs on Linux and macOS; on Windows use it in WSL")
    try:
        from gptvae_cli.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    main()
