#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Mutants of type1: generates, samples and builds them, and says what became of them.

Runs in the build room, for tools/vm/mutants. universalmutator is on PYTHONPATH, as the
wheel that pip fetched.
"""

import argparse
import concurrent.futures
import contextlib
import collections
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import re
import subprocess

RULES = ["universal.rules", "c_like.rules", "c.rules"]
SOURCE = "drivers/vfio/vfio_iommu_type1.c"
# The engines whose tests have names that --filter takes.
SCENARIOS = ("first", "core", "verify", "long")
HERE = pathlib.Path(__file__).parent


def functions():
    """The functions to mutate."""
    names, group = set(), None
    for line in (HERE.parent / "vm/coverage-functions").read_text().splitlines():
        if line and not line[0].isspace():
            group = line.split()[0]
        elif group == "type1":
            names.update(line.split())
    for line in (HERE / "functions").read_text().splitlines():
        if not line.startswith("#"):
            names.update(line.split())
    return names


def bodies(lines, names):
    """(function, number of the first line of its body, of the last), counted from 0."""
    head = None
    for number, line in enumerate(lines):
        if re.match(r"[a-z].*\(", line):
            head = re.findall(r"(\w+)\(", line)[0]
        elif line.startswith("{") and head in names:
            end = next(n for n in range(number, len(lines)) if lines[n].startswith("}"))
            yield head, number + 1, end


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


def generate(source):
    """All mutants of the file, each with an id that is the same wherever its line moves to."""
    from universalmutator import mutator

    lines = source.read_text().splitlines(keepends=True)
    found = {}
    for function, first, last in bodies(lines, functions()):
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
            if kind is None or text == line or text.split() == line.split():
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


def wanted(mutants, seed, known, others):
    """All that have no result, first those that have none under another suite either, then those that
    survived that. What doesn't compile needs no suite."""
    left = [one for one in mutants if one["id"] not in known]
    for results in ((None,), ("survived", "error"), ("killed",)):
        yield from sample([one for one in left if others.get(one["id"], {}).get("result") in results], seed)


class Compiler:
    """Builds a type1 of another source, as kbuild built the base in `base`."""

    def __init__(self, base, out):
        self.base, self.out = base, out
        text = (base / "out/.vfio_iommu_type1.o.cmd").read_text().splitlines()[0]
        self.command = text.partition(":= ")[2].replace("$(pound)", "#").replace("$$", "$")
        link = (base / "out/.vfio_iommu_type1.ko.cmd").read_text().splitlines()[0]
        self.link = link.partition(":= ")[2]

    def build(self, name, source):
        """Builds it; the hash of its code, or None if it doesn't compile."""
        directory = self.out / "work" / name
        directory.mkdir(parents=True)
        original = str(self.base / "src/drivers/vfio")
        (directory / "vfio_iommu_type1.c").write_text(f'#line 1 "{original}/vfio_iommu_type1.c"\n' + source)
        # Relative paths are those of kbuild's directory, /kernel/b or out.
        command = self.command.replace(f"{original}/vfio_iommu_type1.c", str(directory / "vfio_iommu_type1.c"))
        command = re.sub(r"(?<=\s)vfio_iommu_type1\.o\b", str(directory / "vfio_iommu_type1.o"), command)
        command = re.sub(r"-Wp,-MMD,\S+|\s-g(?=\s)", "", command)
        command = command.replace("gcc-14 ", f"gcc-14 -I{original} ", 1)
        cwd = self.base / "out"
        done = subprocess.run(["sh", "-c", command], cwd=cwd, capture_output=True, text=True)
        (directory / "log").write_text(command + "\n" + done.stdout + done.stderr)
        if done.returncode:
            return None
        target = directory / "vfio_iommu_type1.o"
        subprocess.run(["strip", "-g", target], check=True)
        code = hashlib.sha256(target.read_bytes()).hexdigest()
        link = re.sub(r"(?<=\s)vfio_iommu_type1\.o\b", str(target), self.link)
        link = re.sub(r"(?<=\s)vfio_iommu_type1\.ko\b", str(self.out / f"{name}.ko"), link)
        subprocess.run(["sh", "-c", link], cwd=cwd, check=True, capture_output=True)
        subprocess.run(["rm", "-rf", directory], check=True)
        return code


def load(path):
    return json.loads(path.read_text()) if path.exists() else {}


def save(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, sort_keys=True))
    os.replace(temporary, path)


def engines():
    """What tries a mutant: lines of a name and arguments of dirtyscope."""
    lines = (HERE.parent / "vm/mutants-engines").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


class Sample:
    """What is built, for the VMs to take while more is: in `list`, with ID.engines, what tries it. What
    isn't to be run is in `dropped.json`."""

    def __init__(self, out, results):
        self.out, self.killers = out, Killers(results)
        self.ready, self.dropped = [], {}
        (out / "list").touch()
        self.tried_by("base", engines())

    def tried_by(self, name, lines):
        (self.out / f"{name}.engines").write_text("".join(line + "\n" for line in lines))

    def add(self, one):
        likely = " ".join(f"--filter {test}" for test in self.killers.likely(one))
        first = [f"first verify {likely}"] if likely else []
        self.tried_by(one["id"], first + engines())
        self.ready.append(one)

    def drop(self, one, result, **why):
        self.dropped[one["id"]] = one | dict(result=result) | why

    def publish(self):
        """What `list` names has been described before."""
        save(self.out / "sample.json", self.ready)
        save(self.out / "dropped.json", self.dropped)
        temporary = self.out / "list.tmp"
        temporary.write_text("".join(one["id"] + "\n" for one in self.ready))
        os.replace(temporary, self.out / "list")


def build(arguments):
    """Builds a sample of those that have no result yet."""
    results = load(arguments.results)
    lines, mutants = generate(arguments.base / "src" / SOURCE)
    if unknown := set(arguments.operators) - {one["operator"] for one in mutants}:
        raise SystemExit("error: no operator makes mutants that is called " + ", ".join(sorted(unknown)))
    compiler = Compiler(arguments.base, arguments.out)
    original = compiler.build("base", "".join(lines))
    if original is None:
        raise SystemExit("error: type1 itself does not build as kbuild built it, see " + str(arguments.out))
    others = elsewhere(arguments.results)
    if arguments.operators:
        mutants = [one for one in mutants if one["operator"] in arguments.operators]
    if arguments.ids:
        order = iter([one for one in mutants if one["id"] in arguments.ids])
    else:
        order = wanted(mutants, arguments.seed, results, others)
    seen = {original: "base"}
    seen.update({one["code"]: name for name, one in (others | results).items() if one.get("code")})
    made = Sample(arguments.out, arguments.results)

    def one_build(one):
        text = list(lines)
        text[one["line"] - 1] = one.pop("text")
        return one, compiler.build(one["id"], "".join(text))

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        while len(made.ready) < arguments.count:
            batch = list(itertools.islice(order, 8))
            if not batch:
                break
            for one, code in pool.map(one_build, batch):
                one["code"] = code
                if code is None:
                    made.drop(one, "not built")
                elif seen.get(code, one["id"]) != one["id"] and not arguments.ids:
                    made.drop(one, "equal", **{"as": seen[code]})
                    (arguments.out / f"{one['id']}.ko").unlink()
                else:
                    seen[code] = one["id"]
                    made.add(one)
            made.publish()
            print(f"{len(made.ready)} built", flush=True)
    made.publish()
    counts = collections.Counter(one["result"] for one in made.dropped.values())
    print(f"{len(mutants)} mutants of {len({one['function'] for one in mutants})} functions, of which"
          f" {counts['not built']} tried do not compile, {counts['equal']} are equal to type1 or to another,"
          f" and {len(made.ready)} are to be run")


def record(arguments):
    """Adds to the results what wasn't to be run, and what a VM said: "mutant ID RESULT SECONDS
    ENGINE [TEST]".

    Nothing of the latter counts unless type1 itself survived."""
    results = load(arguments.results) | load(arguments.out / "dropped.json")
    save(arguments.results, results)
    made = {one["id"]: one for one in json.loads((arguments.out / "sample.json").read_text())}
    said = arguments.said.read_text(errors="replace").splitlines()
    if not any(line.startswith("mutant base survived") for line in said):
        return
    for line in said:
        match = re.match(r"mutant (\w{10}) (killed|survived|error) (\S+) (\S+) ?(.*)", line)
        if match and match[1] in made:
            results[match[1]] = made[match[1]] | dict(
                result=match[2], seconds=float(match[3]), engine=match[4], test=match[5].strip())
    save(arguments.results, results)


def ranked(killed):
    """The scenarios that killed these, those first that killed most in least time."""
    count, spent = collections.Counter(), collections.Counter()
    for one in killed:
        count[one["test"]] += 1
        spent[one["test"]] += one["seconds"]
    return sorted(count, key=lambda test: -count[test] ** 2 / (1 + spent[test]))


def elsewhere(results):
    """What became of mutants of this type1 under other suites, the latest of each."""
    everything = {}
    base = results.name.rpartition("-")[0]
    for path in sorted(results.parent.glob(f"{base}-*.json"), key=lambda path: path.stat().st_mtime):
        if path.name != results.name:
            everything.update(load(path))
    return everything


class Killers:
    """What killed mutants so far, under this suite or another."""

    def __init__(self, results):
        self.by_id, by_function, everywhere = {}, collections.defaultdict(list), []
        for one in (elsewhere(results) | load(results)).values():
            if one["result"] == "killed" and one["engine"] in SCENARIOS:
                self.by_id[one["id"]] = one["test"]
                by_function[one["function"]].append(one)
                everywhere.append(one)
        self.everywhere = ranked(everywhere)[:4]
        self.by_function = {function: ranked(killed)[:4] for function, killed in by_function.items()}

    def likely(self, one):
        """The scenarios that are to try a mutant before all others: that which killed it once, then those
        that killed others of its function."""
        tests = [self.by_id[one["id"]]] if one["id"] in self.by_id else []
        tests += self.by_function.get(one["function"], []) + self.everywhere
        return list(dict.fromkeys(tests))


def report(arguments):
    """The matrix, the score by function, and the survivors."""
    here = load(arguments.results)
    results = list((elsewhere(arguments.results) | here).values())
    argued = {}
    for line in (HERE / "argued").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, why = line.partition(" ")
            argued[name] = why
    by = collections.defaultdict(collections.Counter)
    engines, operators = collections.Counter(), collections.defaultdict(collections.Counter)
    survivors = []
    for one in results:
        result = one["result"]
        if result == "survived" and one["id"] in argued:
            result = one["result"] = "argued"
            one["why"] = argued[one["id"]]
        by[one["function"]][result] += 1
        operators[one["operator"]][result] += 1
        if result == "killed":
            engines[one["engine"]] += 1
        elif result in ("survived", "error"):
            survivors.append(one)
    arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True))
    table = []

    def rows(title, what):
        table.append(f"{title:<40} {'ran':>5} {'killed':>6} {'argued':>6} {'left':>5} {'score':>6}"
                     f" {'equal':>6} {'no build':>8}")
        total = collections.Counter()
        for name in sorted(what) + ["all"]:
            one = total if name == "all" else what[name]
            if name != "all":
                total.update(one)
            killed, left = one["killed"], one["survived"] + one["error"]
            ran = killed + left + one["argued"]
            score = f"{100 * killed / (killed + left):.1f}" if killed + left else "-"
            table.append(f"{name:<40} {ran:>5} {killed:>6} {one['argued']:>6} {left:>5} {score:>6}"
                         f" {one['equal']:>6} {one['not built']:>8}")
        table.append("")

    rows("function", by)
    rows("operator", operators)
    ran = [one for one in results if one["result"] not in ("not built", "equal")]
    table.append(f"{sum(one['id'] in here for one in ran)} of {len(ran)} ran under this suite, the others under those before")
    table.append("killed first by: " + ", ".join(f"{name} {count}" for name, count in engines.most_common()))
    seconds = sorted(one["seconds"] for one in results if one["result"] == "killed")
    if seconds:
        table.append(f"seconds to kill: median {seconds[len(seconds) // 2]}, most {seconds[-1]}, all {sum(seconds):.0f}")
    table.append("")
    table += [f"{one['result']}: {one['id']} {one['function']}:{one['line']}\n  - {one['was']}\n  + {one['now']}"
              for one in sorted(survivors, key=lambda one: one["line"])]
    text = "\n".join(table) + "\n"
    arguments.text.write_text(text)
    print(text, end="")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(function, *paths):
        one = commands.add_parser(function.__name__, help=function.__doc__)
        one.set_defaults(function=function)
        for path in ("results", *paths):
            one.add_argument(path, type=pathlib.Path)
        return one

    one = command(build, "base", "out")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--count", type=int, default=300)
    one.add_argument("--operators", type=str.split, default=[])
    one.add_argument("--jobs", type=int, default=os.cpu_count())
    one.add_argument("ids", nargs="*")
    command(record, "out", "said")
    command(report, "json", "text")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
