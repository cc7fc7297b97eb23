"""The script for zsh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minidistill.completion.words import Command, Option, cases

HEAD = """\
#compdef minidistill
# Completion of minidistill for zsh, made by `minidistill completion zsh`.
# Put it in a folder of fpath as _minidistill, before compinit is called.

_minidistill() {
    local command="" below="" word key
    for word in "${(@)words[2,CURRENT-1]}"; do
        if [[ $word == -* ]]; then
            continue
        elif [[ -z $command ]]; then
            command=$word
        elif [[ -z $below ]]; then
            below=$word
        fi
    done
    # --key=value, and names in snake or in kebab case
    if [[ $PREFIX == --*=* ]]; then
        key=${${PREFIX%%=*}//-/_}
        compset -P '*='
    else
        key=${words[CURRENT-1]//-/_}
    fi
    local -a names flags settings arguments
"""

BODY = """\
    if [[ -z $command ]]; then
        names=(
{first}
        )
        _describe 'command' names
        return
    fi
    case "$command $below" in
        {nested}) command="$command $below" ;;
    esac
    case "$command" in
{commands}
        *) return 1 ;;
    esac
    case "$command $key" in
{values}
    esac
    if (( ${{#settings}} )); then
        case "$key" in
{setting_values}
        esac
        settings=(
{settings}
        )
    fi
    if [[ $PREFIX == -* ]]; then
        _describe -o 'option' flags -- settings
    elif (( ${{#arguments}} )); then
        compadd -a arguments
    else
        _files
    fi
}}

if [[ $funcstack[1] == _minidistill ]]; then
    _minidistill "$@"  # loaded from fpath
else
    compdef _minidistill minidistill  # sourced
fi
"""


def script(commands: Sequence[Command], settings: Sequence[Option]) -> str:
    """The text of the script."""
    nested = [" ".join(command.path) for command in commands if len(command.path) > 1]
    first = [(c.path[0], c.about) for c in commands if len(c.path) == 1]
    return HEAD + BODY.format(
        first=_described(first),
        nested="|".join(f'"{path}"' for path in nested),
        commands="\n".join(map(_arguments, commands)),
        values="\n".join(line for c in commands for line in cases(c.options, _action, c.path)),
        setting_values="\n".join(cases(settings, _action)),
        settings=_described((option.name, option.about) for option in settings),
    )


def _described(words: Iterable[tuple[str, str]]) -> str:
    """Words with their descriptions, as `_describe` takes them."""
    return "\n".join(f"            '{word}:{about}'" for word, about in words)


def _arguments(command: Command) -> str:
    """What a command takes."""
    options = _described((option.name, option.about) for option in command.options)
    sets = "settings=(--) " if command.takes_settings else ""
    arguments = " ".join(command.words)
    path = " ".join(command.path)
    return f'        "{path}") {sets}arguments=({arguments}) flags=(\n{options}\n        ) ;;'


def _action(option: Option) -> str:
    """What completes the word after an option."""
    if option.values:
        # a flag's value may be left out
        end = " && return" if option.kind == "flag" else "; return"
        return f"compadd -- {' '.join(option.values)}{end}"
    if option.kind in ("files", "folders"):
        return f"_files{' -/' if option.kind == 'folders' else ''}; return"
    return "return 1" if option.takes_value else ""
