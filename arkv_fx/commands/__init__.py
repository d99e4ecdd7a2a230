"""The subcommands of ``arkv``: one file each."""
