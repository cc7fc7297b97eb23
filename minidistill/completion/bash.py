"""The script for bash."""

from __future__ import annotations

from collections.abc import Sequence

from minidistill.completion.words import Command, Option, cases

HEAD = """\
# Completion of minidistill for bash, made by `minidistill completion bash`.
# Put it in ~/.local/share/bash-completion/completions/minidistill, or source it.

_minidistill_words() {
    COMPREPLY=($(compgen -W "$1" -- "$cur"))
}

_minidistill_paths() {
    compopt -o filenames 2>/dev/null
    # not through an array's words: a file's name may be a pattern
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}

_minidistill() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    # bash makes three words of --key=value
    if [[ $cur == "=" ]]; then
        cur=""
    elif [[ $prev == "=" && COMP_CWORD -gt 2 ]]; then
        prev=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    COMPREPLY=()
    local command="" below="" word
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ $word == -* ]]; then
            continue
        elif [[ -z $command ]]; then
            command=$word
        elif [[ -z $below ]]; then
            below=$word
        fi
    done
"""

TAIL = """\
}

complete -F _minidistill minidistill
"""


BODY = """\
    if [[ -z $command ]]; then
        _minidistill_words "{first}"
        return
    fi
    case "$command $below" in
        {nested}) command="$command $below" ;;
    esac
    local options="" settings="" arguments=""
    case "$command" in
{commands}
        *) return ;;
    esac
    # names are in snake or in kebab case
    case "$command ${{prev//-/_}}" in
{values}
    esac
    if [[ -n $settings ]]; then
        case "${{prev//-/_}}" in
{setting_values}
        esac
        settings="{settings}"
    fi
    if [[ $cur == -* ]]; then
        _minidistill_words "$options $settings"
        if [[ ${{#COMPREPLY[@]}} == 0 ]]; then
            word=${{cur#--}}
            cur=--${{word//-/_}}
            _minidistill_words "$settings"
        fi
    elif [[ -n $arguments ]]; then
        _minidistill_words "$arguments"
    else
        _minidistill_paths -f
    fi
"""


def script(commands: Sequence[Command], settings: Sequence[Option]) -> str:
    """The text of the script."""
    nested = [" ".join(command.path) for command in commands if len(command.path) > 1]
    body = BODY.format(
        first=" ".join([*(c.path[0] for c in commands if len(c.path) == 1), "--version"]),
        nested="|".join(f'"{path}"' for path in nested),
        commands="\n".join(map(_arguments, commands)),
        values="\n".join(line for c in commands for line in cases(c.options, _action, c.path)),
        setting_values="\n".join(cases(settings, _action)),
        settings=" ".join(option.name for option in settings),
    )
    return HEAD + body + TAIL


def _arguments(command: Command) -> str:
    """What a command takes."""
    sets = "settings=1 " if command.takes_settings else ""
    options = " ".join(option.name for option in command.options)
    arguments = " ".join(command.words)
    path = " ".join(command.path)
    return f'        "{path}") {sets}options="{options}" arguments="{arguments}" ;;'


def _action(option: Option) -> str:
    """What completes the word after an option."""
    if option.values:
        # a path beside the words, where any text may follow
        unless = "[[ ${#COMPREPLY[@]} -gt 0 ]] && " if option.kind == "flag" else ""
        return f'_minidistill_words "{" ".join(option.values)}"; {unless}return'
    if option.kind in ("files", "folders"):
        return f"_minidistill_paths {'-f' if option.kind == 'files' else '-d'}; return"
    return "return" if option.takes_value else ""
