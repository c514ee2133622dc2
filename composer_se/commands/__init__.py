"""The subcommands of `composer-se`: one module each, with `add_arguments(parser)` and `run(args) -> int`."""
