"""The script for fish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minidistill.completion.words import Command, Option

HEAD = """\
# Completion of minidistill for fish, made by `minidistill completion fish`.
# Put it in ~/.config/fish/completions/minidistill.fish.

function __minidistill_words
    set -l tokens (commandline -opc)
    string match -v -- '-*' $tokens[2..-1]
end

function __minidistill_none
    not count (__minidistill_words) >/dev/null
end

function __minidistill_is
    set -l words (__minidistill_words)
    test (count $words) -ge (count $argv); or return
    test "$words[1..$(count $argv)]" = "$argv"
end

function __minidistill_sets
    for command in {configurable}
        __minidistill_is (string split ' ' -- $command); and return
    end
    return 1
end

complete -c minidistill -e
complete -c minidistill -n __minidistill_none -f -l version -d 'print the version'
"""


def script(commands: Sequence[Command], settings: Sequence[Option]) -> str:
    """The text of the script."""
    configurable = [f"'{' '.join(c.path)}'" for c in commands if c.takes_settings]
    lines = [HEAD.replace("{configurable}", " ".join(configurable))]
    for command in commands:
        lines += _command(command)
    lines += [_option("__minidistill_sets", option) for option in settings]
    return "\n".join(lines) + "\n"


def _command(command: Command) -> Iterator[str]:
    *above, name = command.path
    where = f"'__minidistill_is {' '.join(above)}'" if above else "__minidistill_none"
    yield f"complete -c minidistill -n {where} -f -a {name} -d '{command.about}'"
    here = f"'__minidistill_is {' '.join(command.path)}'"
    if command.words:
        yield f"complete -c minidistill -n {here} -f -a '{' '.join(command.words)}'"
    for option in command.options:
        yield _option(here, option)


def _option(condition: str, option: Option) -> str:
    name = option.name.removeprefix("--")
    line = f"complete -c minidistill -n {condition} -l {name} -d '{option.about}'"
    if option.values:
        values = f"-a '{' '.join(option.values)}'"
        return f"{line} {'-f' if option.kind == 'flag' else '-x'} {values}"
    if option.kind == "files":
        return f"{line} -r -F"
    if option.kind == "folders":
        return f"{line} -x -a '(__fish_complete_directories)'"
    return f"{line} -x" if option.takes_value else line
