"""The command line, figures, tables and runs on disk."""
