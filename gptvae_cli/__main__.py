"""`python -m gptvae_cli`, where the command is not on the path."""

from gptvae_cli.cli.app import main

if __name__ == "__main__":
    main()
