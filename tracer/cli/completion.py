# SPDX-License-Identifier: GPL-2.0-or-later
"""Completion for bash, zsh and fish: click's, with scripts of our own.

click's scripts complete every file where a report is wanted, split `--format=te` and `web:1` in bash, replace all of
`--format=te` in zsh, complete only every other time there where they are files in fpath, and differ between versions of
click. Beside its types `plain`, `file` and `dir`, these know `json` (files of that suffix, and directories) and
`command`.
"""

from __future__ import annotations

import os

from click.shell_completion import (  # type: ignore[attr-defined,unused-ignore] # split_arg_string, before click 8.2
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

#: Stands for it at the end of a line; no word has it.
_CURSOR = "\1"
_LICENCE = "# SPDX-License-Identifier: GPL-2.0-or-later\n"


def _summary(item: CompletionItem) -> str:
    """The first sentence of what is said of a value, on one line."""
    return " ".join((item.help or "").split()).partition(". ")[0].rstrip(".")


class _Bash(BashComplete):
    # The line up to the cursor is what the user typed. COMP_WORDS is also split at = and :, and readline replaces only
    # what follows these. With sudo, bash-completion has both without sudo.
    source_template = (
        _LICENCE
        + """\
%(complete_func)s() {
    local IFS=$'\\n' kind value filenames=
    local cur=${COMP_WORDS[COMP_CWORD]}
    local -a plain=()
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            plain) plain+=("$value") ;;
            json)
                compopt -o filenames  # readline quotes
                filenames=1
                if declare -F _filedir >/dev/null; then
                    _filedir json
                else
                    COMPREPLY+=($(compgen -f -X '!*.json' -- "$cur") $(compgen -d -- "$cur"))
                fi
                ;;
            command) COMPREPLY+=($(compgen -c -- "$cur")) ;;
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
        esac
    done < <(env %(complete_var)s=bash_complete COMP_WORDS="${COMP_LINE:0:COMP_POINT}" \\
        "${1/#\\~/$HOME}" 2>/dev/null)
    for value in "${plain[@]}"; do
        [[ $filenames || $cur == [\\"\\']* ]] || printf -v value %%q "$value"
        COMPREPLY+=("$value")
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""
    )

    def source(self) -> str:
        """The script. No bash is started to ask for its version."""
        return ShellComplete.source(self)

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one at the cursor, and that one, as the shell would understand them."""
        return _words(os.environ["COMP_WORDS"])

    def format_completion(self, item: CompletionItem) -> str:
        """A line of its type and what readline is to insert."""
        if item.type != "plain":
            return f"{item.type},"
        _, word = _words(os.environ["COMP_WORDS"])
        before = max(word.rfind(":"), word.rfind("=")) + 1
        value = str(item.value)
        if before and value.startswith(word[:before]):
            value = value[before:]  # readline has split the word there
        return f"plain,{value}"


class _Zsh(ZshComplete):
    source_template = """\
#compdef %(prog_name)s
# SPDX-License-Identifier: GPL-2.0-or-later
_%(prog_name)s() {
    local -a response described plain
    local kind value text result=1
    response=("${(@f)$(env %(complete_var)s=zsh_complete COMP_WORDS="${(j: :)words[1,CURRENT-1]} $PREFIX" \\
        ${~words[1]} 2>/dev/null)}")
    [[ $PREFIX == --*=* ]] && compset -P 1 '*='
    for kind value text in $response; do
        case $kind in
            plain)
                if [[ $text == _ ]]; then plain+=("$value"); else described+=("${value//:/\\\\:}:$text"); fi
                ;;
            json) _files -g '*.json' && result=0 ;;
            command) _command_names -e && result=0 ;;
            dir) _files -/ && result=0 ;;
            file) _files && result=0 ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U -i "$IPREFIX" && result=0
    (( $#plain )) && compadd -U -i "$IPREFIX" -V unsorted -a plain && result=0
    return result
}

if [[ $funcstack[1] == _%(prog_name)s ]]; then
    _%(prog_name)s "$@"  # this file was loaded to complete: the first time
else
    compdef _%(prog_name)s %(prog_name)s
fi
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        """As for bash."""
        return _words(os.environ["COMP_WORDS"])

    def format_completion(self, item: CompletionItem) -> str:
        """Three lines: type, value, and what is said of it."""
        return f"{item.type}\n{item.value}\n{_summary(item) or '_'}"


class _Fish(FishComplete):
    source_template = (
        _LICENCE
        + """\
function %(complete_func)s
    set -l command (commandline -opc)[1]
    set -l token (commandline -ct)
    for line in (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp | string collect) $command 2>/dev/null)
        set -l parts (string split --max 1 , -- $line)
        switch $parts[1]
            case plain
                echo -- $parts[2]
            case json
                __fish_complete_suffix .json
            case command
                __fish_complete_command
            case dir
                __fish_complete_directories $token
            case file
                __fish_complete_path $token
        end
    end
end

complete --command %(prog_name)s --no-files --keep-order --arguments '(%(complete_func)s)'
"""
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        """As for bash."""
        return _words(os.environ["COMP_WORDS"])

    def format_completion(self, item: CompletionItem) -> str:
        """A line of type, value, and what is said of it."""
        text = _summary(item)
        option, equals, _ = _words(os.environ["COMP_WORDS"])[1].partition("=")
        before = f"{option}=" if equals and option.startswith("--") else ""  # fish replaces that, too
        return f"{item.type},{before}{item.value}" + (f"\t{text}" if text else "")


def _words(line: str) -> tuple[list[str], str]:
    """The words of a line up to the cursor but the command, and the last, which may be empty or its quotes be open."""
    *words, last = split_arg_string(f"{line}{_CURSOR}")
    return words[1:], last.removesuffix(_CURSOR)


SHELLS: tuple[type[ShellComplete], ...] = (_Bash, _Zsh, _Fish)


def register() -> None:
    """Have click complete by these."""
    for shell in SHELLS:
        add_completion_class(shell)
