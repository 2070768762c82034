"""`python -m scoremachine` is the command line."""

from scoremachine.cli import main

main()
