"""The commands of the command line, a file for each; they need typer."""
