"""Makes the completion for bash and zsh from the parsers of the commands in setup.cfg.

``python completion/make.py`` (``make completion``) writes ``bash/`` and ``zsh/`` beside this file;
a test holds them to the parsers.  Groups and LDSUs are read from the group files when somebody
presses the key.  For bash there is a file for each command, by which bash-completion finds it; they
read the one that has it all.
"""

from __future__ import annotations

import argparse
import configparser
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

NOTE = "# Made from the parsers by completion/make.py: do not change this, run make completion.\n"
#: What may stand where a metavar does; of the others nothing is known.
KINDS = {
    "DEV": "file",
    "DEVICE": "file",
    "DIR": "dir",
    "FILE": "file",
    "HOST": "host",
    "LDSU": "ldsu",
}
#: Words that stand for names in the group files.
NAMED = {"THROTTLE.value=": "throttle", "THROTTLE.limit=": "throttle"}


class Option(NamedTuple):
    """An option, or a positional argument, which has no names.

    :ivar value: what may stand for its value: kinds and ``=WORD``; ``None`` if it has none.
    :ivar many: whether it may be given again.
    :ivar excludes: options that do not go with it.
    """

    names: tuple[str, ...]
    value: tuple[str, ...] | None
    metavar: str
    help: str
    many: bool
    optional: bool
    excludes: tuple[str, ...]


class Spec(NamedTuple):
    """What a command, or a subcommand, takes."""

    name: str
    options: list[Option]
    places: list[Option]
    commands: dict[str, str]


# -- the parsers -----------------------------------------------------------------------------------


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Make the parser of every console script.

    ``main`` has ``build_parser()``, ``kill_main`` has ``build_kill_parser()``; a module with one
    function for each command has ``build_parser(NAME)``.
    """
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for line in setup["options.entry_points"]["console_scripts"].strip().splitlines():
        name, entry = (part.strip() for part in line.split("="))
        module, _, function = entry.partition(":")
        kind = function.removesuffix("main").strip("_") if function.endswith("main") else ""
        build: Any = getattr(
            importlib.import_module(module), f"build_{kind}_parser" if kind else "build_parser"
        )
        yield name, build(name) if inspect.signature(build).parameters else build()


def specs() -> Iterator[Spec]:
    """Describe every command, each followed by its subcommands."""
    for name, parser in sorted(parsers()):
        yield from describe(name, parser)


def describe(name: str, parser: argparse.ArgumentParser) -> Iterator[Spec]:
    """Describe a command and its subcommands."""
    spec = Spec(name, [], [], {})
    inner: list[Spec] = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                spec.commands[choice.dest] = choice.help or ""
                inner += describe(f"{name} {choice.dest}", action.choices[choice.dest])
        elif action.option_strings:
            spec.options.append(_option(parser, action))
        else:
            spec.places.append(_option(parser, action))
    yield spec
    yield from inner


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> Option:
    excludes = [
        name
        for group in parser._mutually_exclusive_groups
        if action in group._group_actions
        for other in group._group_actions
        for name in other.option_strings
        if other is not action
    ]
    many = action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction)
    optional = bool(action.option_strings) or action.nargs in ("*", "?")
    metavar = str(action.metavar or action.dest).upper()
    text = (action.help or "").replace("%%", "%")
    names = tuple(action.option_strings)
    return Option(names, _value(action), metavar, text, many, optional, tuple(excludes))


def _value(action: argparse.Action) -> tuple[str, ...] | None:
    """Give the kinds of what may stand for an action's value."""
    if action.nargs == 0:
        return None
    words = action.choices or getattr(action, "completes", ())
    kinds = list(dict.fromkeys(NAMED.get(word, f"={word}") for word in words))
    if action.dest == "numbers":
        kinds.append("group")
    elif not action.choices and action.metavar in KINDS:
        kinds.append(KINDS[str(action.metavar)])
    return tuple(kinds)


# -- bash ------------------------------------------------------------------------------------------

#: For awk: the numbers of throttles in group files, for either shell.
THROTTLES = r"""
        function say(key) { if (!(key in said)) print key; said[key] }
        /^[ \t]*\[[^[]/ { inside = /^[ \t]*\[[ \t]*throttles[ \t]*\]/; name = "" }
        inside && /^[ \t]*\[\[[^[]/ {
            name = $0
            gsub(/^[ \t]*\[\[[ \t]*|[ \t]*\]\].*$/, "", name)
            if (name ~ /["\047]/) name = ""
            if (name) say(name ".value=")
        }
        name && !/^[ \t]*#/ && /(^|=|["\047])[ \t]*limit[ \t]+([0-9]|off)/ {
            say(name ".limit=")
        }
""".strip("\n")

BASH_HEAD = r"""# bash completion of qdsmirror's commands.

# The directory of the group files: of --root, else of QDS_ROOT.
_qdsmirror_etc() {
    local root=${1:-$QDS_ROOT}
    root=${root/#\~/$HOME}
    if [[ $root ]]; then echo "$root/etc"; else echo /etc/opt/QLIXds; fi
}

_qdsmirror_groups() {
    local file
    for file in "$(_qdsmirror_etc "$1")"/dsgrp[0-9][0-9][0-9].cfg; do
        if [[ -e $file ]]; then
            file=${file##*/dsgrp}
            echo $((10#${file%.cfg}))
        fi
    done
}

_qdsmirror_ldsus() {
    cat "$(_qdsmirror_etc "$1")"/dsgrp[0-9][0-9][0-9].cfg 2>/dev/null | awk '
        /^[ \t]*\[[^[]/ { inside = /^[ \t]*\[[ \t]*ldsus[ \t]*\]/ }
        inside && /^[ \t]*\[\[[^[]/ { gsub(/^[ \t]*\[\[[ \t]*|[ \t]*\]\].*$/, ""); print }'
}

# The numbers of throttles that qdsset turns.
_qdsmirror_throttles() {
    cat "$(_qdsmirror_etc "$1")"/dsgrp[0-9][0-9][0-9].cfg 2>/dev/null | awk '
@THROTTLES@'
}

# Offer for the word $1 what is of the kinds $3...; the root is $2.
_qdsmirror_offer() {
    local word=$1 root=$2 kind
    shift 2
    for kind; do
        case $kind in
            =*) COMPREPLY+=($(compgen -W "${kind#=}" -- "$word")) ;;
            group) COMPREPLY+=($(compgen -W "$(_qdsmirror_groups "$root")" -- "$word")) ;;
            ldsu) COMPREPLY+=($(compgen -W "$(_qdsmirror_ldsus "$root")" -- "$word")) ;;
            throttle)
                local each
                while read -r each; do
                    printf -v each %q "$each"
                    if [[ $each == "$word"* ]]; then COMPREPLY+=("$each"); fi
                done < <(_qdsmirror_throttles "$root")
                ;;
            host) COMPREPLY+=($(compgen -A hostname -- "$word")) ;;
            dir | file)
                local option=-f IFS=$'\n'
                if [[ $kind == dir ]]; then option=-d; fi
                compopt -o filenames 2>/dev/null
                COMPREPLY+=($(compgen $option -- "$word"))
                ;;
        esac
    done
    if [[ ${#COMPREPLY[@]} == 1 && $COMPREPLY == *= ]]; then compopt -o nospace 2>/dev/null; fi
}

_qdsmirror() {
    local word=${COMP_WORDS[COMP_CWORD]} name=${COMP_WORDS[0]##*/} root= kind= only= at i count=0
    local flags commands rest
    local -a places
    local -A values
    COMPREPLY=()
    _qdsmirror_takes "$name" || return
    if [[ $word == = ]]; then word=; fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        at=${COMP_WORDS[i]}
        if [[ ! $only && $at == -- ]]; then
            only=1
        elif [[ ! $only && ${values[$at]+known} ]]; then
            if [[ ${COMP_WORDS[i + 1]} == = ]]; then ((i++)); fi
            ((i++))
            if ((i >= COMP_CWORD)); then kind=${values[$at]:-none}; fi
            if [[ $at == --root ]]; then root=${COMP_WORDS[i]}; fi
        elif [[ ! $only && $at == -* ]]; then
            :
        elif [[ $commands && " $commands " == *" $at "* ]]; then
            _qdsmirror_takes "$name $at" || return
            count=0
        else
            ((count++))
        fi
    done
    if [[ ${COMP_WORDS[COMP_CWORD - 1]} == *[\<\>] ]]; then kind=file; fi
    if [[ $kind ]]; then
        _qdsmirror_offer "$word" "$root" $kind
    elif [[ ! $only && $word == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    elif [[ $commands ]]; then
        COMPREPLY=($(compgen -W "$commands" -- "$word"))
    else
        _qdsmirror_offer "$word" "$root" ${places[count]:-$rest}
    fi
}

# What a command takes: its options, the kinds of their values, and of what stands in each place.
_qdsmirror_takes() {
    flags= commands= rest= places=() values=()
    case $1 in
""".replace("@THROTTLES@", THROTTLES)


def bash(found: list[Spec]) -> str:
    """Give the completion for bash, of all commands."""
    lines = []
    for spec in found:
        lines.append(f"        {_quoted(spec.name)})")
        flags = " ".join(name for option in spec.options for name in option.names)
        lines.append(f"            flags={_quoted(flags)}")
        if spec.commands:
            lines.append(f"            commands={_quoted(' '.join(spec.commands))}")
        values = [
            f"[{name}]={_quoted(' '.join(option.value))}"
            for option in spec.options
            if option.value is not None
            for name in option.names
        ]
        lines.append(f"            values=({' '.join(values)})")
        kinds = [_quoted(" ".join(place.value or ())) for place in spec.places]
        many = bool(spec.places and spec.places[-1].many)
        if len(kinds) > many:
            lines.append(f"            places=({' '.join(kinds[: -1 if many else None])})")
        if many:
            lines.append(f"            rest={kinds[-1]}")
        lines.append("            ;;")
    names = " ".join(spec.name for spec in found if " " not in spec.name)
    end = f"        *) return 1 ;;\n    esac\n}}\n\ncomplete -F _qdsmirror {names}\n"
    return NOTE + BASH_HEAD + "\n".join(lines) + "\n" + end


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# -- zsh -------------------------------------------------------------------------------------------

ZSH_HEAD = r"""
# The directory of the group files: of --root, else of QDS_ROOT.
_qdsmirror_etc() {
    local root=${opt_args[--root]:-$QDS_ROOT}
    root=${root/#\~/$HOME}
    if [[ -n $root ]]; then print -r -- $root/etc; else print -r -- /etc/opt/QLIXds; fi
}

_qdsmirror_groups() {
    local -a files groups
    files=($(_qdsmirror_etc)/dsgrp[0-9][0-9][0-9].cfg(N:t:r))
    groups=(${${files#dsgrp}/(#b)0#([0-9]##)/$match[1]})
    compadd -a groups
}

_qdsmirror_ldsus() {
    local -a files ldsus
    files=($(_qdsmirror_etc)/dsgrp[0-9][0-9][0-9].cfg(N))
    (( $#files )) || return 1
    ldsus=(${(f)"$(awk '
        /^[ \t]*\[[^[]/ { inside = /^[ \t]*\[[ \t]*ldsus[ \t]*\]/ }
        inside && /^[ \t]*\[\[[^[]/ { gsub(/^[ \t]*\[\[[ \t]*|[ \t]*\]\].*$/, ""); print }
    ' $files)"})
    compadd -a ldsus
}

# The numbers of throttles that qdsset turns.
_qdsmirror_throttles() {
    local -a files numbers
    files=($(_qdsmirror_etc)/dsgrp[0-9][0-9][0-9].cfg(N))
    (( $#files )) || return 1
    numbers=(${(f)"$(awk '
@THROTTLES@
    ' $files)"})
    compadd -S '' -a numbers
}

# Offer the words $1...; one that ends with = goes on.
_qdsmirror_words() {
    local word
    for word; do
        if [[ $word == *= ]]; then compadd -S '' -- $word; else compadd -- $word; fi
    done
}

# All of $1...: words, with a + before them, and what other functions offer.
_qdsmirror_either() {
    local one
    for one; do
        if [[ $one == +* ]]; then _qdsmirror_words ${one#+}; else _qdsmirror_$one; fi
    done
}

_qdsmirror() {
    local curcontext=$curcontext state line
    typeset -A opt_args
    case $service in
""".replace("@THROTTLES@", THROTTLES)

_ZSH = {
    "group": "_qdsmirror_groups",
    "ldsu": "_qdsmirror_ldsus",
    "throttle": "_qdsmirror_throttles",
    "file": "_files",
    "dir": "_files -/",
    "host": "_hosts",
}


def zsh(found: list[Spec]) -> str:
    """Give the completion for zsh, of all commands."""
    names = [spec.name for spec in found if " " not in spec.name]
    inner = {spec.name: spec for spec in found}
    lines = []
    for spec in (inner[name] for name in names):
        lines.append(f"        ({spec.name})")
        lines += _arguments(spec, "            ")
        if spec.commands:
            lines.append("            case $line[1] in")
            for command in spec.commands:
                lines.append(f"                ({command})")
                lines += _arguments(inner[f"{spec.name} {command}"], "                    ")
                lines.append("                    ;;")
            lines.append("            esac")
        lines.append("            ;;")
    head = f"#compdef {' '.join(names)}\n{NOTE}{ZSH_HEAD}"
    return head + "\n".join(lines) + '\n    esac\n}\n\n_qdsmirror "$@"\n'


def _arguments(spec: Spec, indent: str) -> Iterator[str]:
    parts = [one for option in spec.options for one in _zsh_option(option)]
    if spec.commands:
        words = " ".join(f'{name}\\:"{_plain(text)}"' for name, text in spec.commands.items())
        parts += [_quoted(f"1:command:(({words}))"), _quoted("*:: :->rest")]
    for number, place in enumerate(spec.places, 1):
        where = "*" if place.many else str(number)
        parts.append(_quoted(f"{where}:{_plain(place.metavar)}:{_action(place)}"))
    ends = " && return" if spec.commands else ""
    yield f"{indent}_arguments -S{' -C' * bool(spec.commands)} \\"
    yield from (f"{indent}    {part} \\" for part in parts[:-1])
    yield f"{indent}    {parts[-1]}{ends}"


def _zsh_option(option: Option) -> Iterator[str]:
    excludes = {*option.excludes, *(() if option.many else option.names)}
    before = f"({' '.join(sorted(excludes))})" if excludes else ""
    for name in option.names:
        ends = "=" if option.value is not None and name.startswith("--") else ""
        text = f"{'*' * option.many}{before}{name}{ends}[{_plain(option.help)}]"
        if option.value is not None:
            text += f":{_plain(option.metavar)}:{_action(option)}"
        yield _quoted(text)


def _action(option: Option) -> str:
    """Give what zsh does for a value."""
    kinds = option.value or ()
    if not kinds:
        return " "
    if all(kind.startswith("=") for kind in kinds):
        return f"({' '.join(kind[1:] for kind in kinds)})"
    if len(kinds) == 1:
        return _ZSH[kinds[0]]
    either = (_ZSH.get(kind, kind.replace("=", "+", 1)) for kind in kinds)
    either = (one.removeprefix("_qdsmirror_") for one in either)
    return f"_qdsmirror_either {' '.join(either)}"


def _plain(text: str) -> str:
    """Give a text as a specification of ``_arguments`` may have it."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace('"', "")
    for one in "[]:":
        text = text.replace(one, f"\\{one}")
    return text


# -- files -----------------------------------------------------------------------------------------


def files() -> dict[Path, str]:
    """Give every file of the completion, by its path, with its text."""
    found = list(specs())
    made = {HERE / "bash" / "_qdsmirror": bash(found), HERE / "zsh" / "_qdsmirror": zsh(found)}
    load = NOTE + '. "${BASH_SOURCE[0]%/*}/_qdsmirror"\n'
    return made | {HERE / "bash" / spec.name: load for spec in found if " " not in spec.name}


def main() -> None:
    """Write them, and remove those of commands that are gone."""
    made = files()
    for folder in ("bash", "zsh"):
        (HERE / folder).mkdir(exist_ok=True)
        for path in set((HERE / folder).iterdir()) - set(made):
            path.unlink()
    for path, text in made.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
