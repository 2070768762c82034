"""The work of the commands, with results on disk: generation, machines, networks."""
