"""The commands of `kart`, one file each; a new one is a file and a line of `COMMANDS`.

A command is a `Command`: its name, what `--help` says of it, its flags, and the function that runs
it. A room that needs an optional package is imported when the command runs, for `kart --help`.
"""

from kart.commands import analyse, bench, data, eval, export, info, predict, study, test, train
from kart.commands.command import Command

COMMANDS: tuple[Command, ...] = (
    data.COMMAND,
    train.COMMAND,
    eval.COMMAND,
    analyse.COMMAND,
    predict.COMMAND,
    export.COMMAND,
    study.COMMAND,
    test.COMMAND,
    bench.COMMAND,
    info.COMMAND,
)
