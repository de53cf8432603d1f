"""How benchmarks read their command lines: one look for every ``--help``."""

import argparse


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they were written, and defaults beside the options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_one = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_one else action.help


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m module``, which that module's docstring describes."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=_Help
    )
