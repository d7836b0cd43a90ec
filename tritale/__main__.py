"""`python -m tritale`, and `torchrun -m tritale train`."""

from tritale.cli.main import main

if __name__ == "__main__":
    main()
