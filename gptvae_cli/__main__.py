"""`python -m gptvae_cli`, the form that `torchrun -m` needs."""

from gptvae_cli.cli.app import main

if __name__ == "__main__":
    main()
