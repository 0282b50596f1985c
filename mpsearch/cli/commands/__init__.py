"""The commands of `mpsearch`, a file each."""

from mpsearch.cli.command import Command
from mpsearch.cli.commands import (
    compare,
    completion,
    demo,
    evaluate,
    export,
    import_,
    pareto,
    profile,
    report,
    search,
    show,
    solve,
)

#: In the order of work, as `mpsearch --help` lists them.
COMMANDS: dict[str, tuple[Command, ...]] = {
    "a first look": (demo.COMMAND, show.COMMAND),
    "all in one": (search.COMMAND, report.COMMAND),
    "step by step": (profile.COMMAND, compare.COMMAND, solve.COMMAND, pareto.COMMAND, evaluate.COMMAND),
    "to and from other tools": (export.COMMAND, import_.COMMAND),
    "the shell": (completion.COMMAND,),
}
