"""`python -m scoremachine` is the command line."""

from scoremachine.app.cli import main

main()
