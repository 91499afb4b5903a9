# SPDX-License-Identifier: GPL-2.0
"""What mutants there are of type1, and in which order they are tried."""

import collections
import contextlib
import hashlib
import io
import pathlib
import random
import re

RULES = ["universal.rules", "c_like.rules", "c.rules"]
SOURCE = "drivers/vfio/vfio_iommu_type1.c"
HERE = pathlib.Path(__file__).parent


def entries(name):
    """The lines of a file of tools/ that are neither empty nor comments."""
    lines = (HERE.parent / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def functions():
    """The functions to mutate."""
    names, group = set(), None
    for line in (HERE.parent / "vm/coverage-functions").read_text().splitlines():
        if line and not line[0].isspace():
            group = line.split()[0]
        elif group == "type1":
            names.update(line.split())
    for line in entries("mutants/functions"):
        names.update(line.split())
    return names


def bodies(lines, names):
    """(function, number of its first line, of the first of its body, of the one behind that), counted from 0."""
    head = start = None
    for number, line in enumerate(lines):
        if re.match(r"[a-z].*\(", line):
            head, start = re.findall(r"(\w+)\(", line)[0], number
            # The type that it returns may have a line of its own.
            if re.match(r"[a-z].*[\w*]$", lines[number - 1]):
                start -= 1
        elif line.startswith("{") and head in names:
            end = next(n for n in range(number, len(lines)) if lines[n].startswith("}"))
            yield head, start, number + 1, end


def operator(rule, source):
    """The class of a rule, or None for what isn't a change of code."""
    find, _, replace = rule.partition(" ==>")
    replace = replace.strip()
    if "kernel.rules" in source:
        return "return" if "return" in replace else "lock"
    if find == '".+"':
        return None
    if "break;" in replace or "continue;" in replace:
        return "leave"
    if "/*" in replace:
        return "delete"
    if find.startswith(("if", "while", "else")):
        return "condition"
    if any(word in find for word in ("&&", r"\|\|", "! ", "([^&])&", r"([^|])\|")) or find == "!":
        return "logical"
    if r"\d" in find:
        return "constant"
    if find in ("!=", "==", ">=", "<=", "<", "([^-])>"):
        return "relational"
    if "," in find:
        return "arguments"
    return "arithmetic"


def pointless(line, text):
    """Whether a mutant is the original by construction: an assertion or cond_resched() is gone, what is new is
    behind a jump, or it is in the text of a message."""
    line = line.strip()
    if re.sub(r'"[^"]*"', '""', line) == re.sub(r'"[^"]*"', '""', text.strip()):
        return True
    gone = text.strip() in (";", f"/*{line}*/") and re.match(r"(WARN_ON(_ONCE)?|cond_resched|lockdep_\w+)\(", line)
    return gone or re.match(r"(return|break|continue|goto)\b.*;$", line) and text.strip().startswith(line)


def generate(source):
    """All mutants of the file, each with an id that is the same wherever its line moves to."""
    from universalmutator import mutator

    lines = source.read_text().splitlines(keepends=True)
    found = {}
    for function, _, first, last in bodies(lines, functions()):
        body = ["\n"] * first + lines[first:last]
        with contextlib.redirect_stdout(io.StringIO()):
            # Its own rules first: a rule's class is that of the first that makes a mutant.
            made = mutator.mutants_regexp(
                body, [str(HERE / "kernel.rules")] + RULES, ignorePatterns=[])
        for number, text, (rule, rules_of), _ in made:
            kind = operator(rule, rules_of)
            # One line stays one line, so that what names lines in the object stays as it is.
            text = text.rstrip("\n").replace("\n", " ") + "\n"
            line = lines[number - 1]
            if kind is None or text.split() == line.split() or pointless(line, text):
                continue
            ordinal = lines[first:number - 1].count(line)
            content = f"{function}\n{line.strip()}\n{text.strip()}\n{ordinal}"
            name = hashlib.sha256(content.encode()).hexdigest()[:10]
            found.setdefault(name, dict(
                id=name, function=function, operator=kind, line=number,
                was=line.strip(), now=text.strip(), text=text))
    return lines, list(found.values())


def sample(mutants, seed):
    """All of them, in the order of a sample that is stratified by function and operator."""
    strata = collections.defaultdict(list)
    for one in sorted(mutants, key=lambda one: one["id"]):
        strata[one["function"], one["operator"]].append(one)
    dice = random.Random(seed)
    for stratum in strata.values():
        dice.shuffle(stratum)
    while strata:
        keys = sorted(strata)
        dice.shuffle(keys)
        for key in keys:
            yield strata[key].pop()
            if not strata[key]:
                del strata[key]


def done(one, engines):
    """Whether these engines have nothing to say any more of a mutant that has this result."""
    if "tried" not in one:
        return True  # it doesn't compile, or is equal to another
    said = [one["tried"][name]["result"] for name in engines if name in one["tried"]]
    return "killed" in said or len(said) == len(engines)


def wanted(mutants, seed, engines, known, others):
    """All of which these engines have still something to say, first those that have no result under another
    suite either, then those that survived, then those that were killed. What doesn't compile needs no suite.

    Engines without the scenarios are given what these have tried before."""
    results = others | known
    left = [one for one in mutants if one["id"] not in known or not done(known[one["id"]], engines)]
    groups = (None,), ("survived", "error"), ("killed",)
    for group in groups if "scenarios" in engines else groups[1:]:
        yield from sample([one for one in left if results.get(one["id"], {}).get("result") in group], seed)
