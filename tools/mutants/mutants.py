#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Mutants of type1: generates, samples and builds them, and says what became of them.

Runs in the build room, for tools/vm/mutants. universalmutator is on PYTHONPATH, as the
wheel that pip fetched.
"""

import argparse
import collections
import concurrent.futures
import itertools
import json
import os
import pathlib
import re
import time

from compiler import Compiler
from generate import HERE, SOURCE, entries, generate, wanted

# How many are built before the VMs have taken them.
AHEAD = 80


def load(path):
    return json.loads(path.read_text()) if path.exists() else {}


def save(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, sort_keys=True))
    os.replace(temporary, path)


def engines(names):
    """What tries a mutant: lines of an engine's name and arguments of dirtyscope, those of these engines."""
    lines = entries("vm/mutants-engines")
    if unknown := set(names) - {line.split()[0] for line in lines}:
        raise SystemExit("error: tools/vm/mutants-engines has no engine that is called " + ", ".join(sorted(unknown)))
    return [line for line in lines if line.split()[0] in names]


class Sample:
    """What is built, for the VMs to take while more is: in `list`, with ID.engines, what tries it. What
    isn't to be run is in `dropped.json`."""

    def __init__(self, out, results, names):
        self.out, self.engines = out, engines(names)
        self.killers = Killers(results) if "scenarios" in names else None
        self.ready, self.dropped = [], {}
        (out / "list").touch()
        self.tried_by("base", self.engines)

    def taken(self):
        """How many of `list` the VMs have taken."""
        taken = self.out / "taken"
        return int(taken.read_text() or 0) if taken.exists() else 0

    def tried_by(self, name, lines):
        (self.out / f"{name}.engines").write_text("".join(line + "\n" for line in lines))

    def add(self, one):
        likely = " ".join(f"--filter {test}" for test in self.killers.likely(one)) if self.killers else ""
        first = [f"scenarios verify --strict {likely}"] if likely else []
        self.tried_by(one["id"], first + self.engines)
        self.ready.append(one)

    def drop(self, one, result, **why):
        one.pop("text", None)
        self.dropped[one["id"]] = one | dict(result=result) | why

    def publish(self):
        """What `list` names has been described before."""
        names = list(dict.fromkeys(line.split()[0] for line in self.engines))
        save(self.out / "sample.json", dict(engines=names, mutants=self.ready))
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
    compiler = Compiler(arguments.base, arguments.out, arguments.jobs)
    original = compiler.build("base", "".join(lines))
    if original is None:
        raise SystemExit("error: type1 itself does not build as kbuild built it, see " + str(arguments.out))
    others = elsewhere(arguments.results)
    if arguments.operators:
        mutants = [one for one in mutants if one["operator"] in arguments.operators]
    made = Sample(arguments.out, arguments.results, arguments.engines)
    for one in compiler.refused(lines, [one for one in mutants if one["id"] not in results]):
        one["code"] = None
        made.drop(one, "not built")
    mutants = [one for one in mutants if one["id"] not in made.dropped]
    print(f"{len(made.dropped)} don't compile, as the compiler's front end sees at once", flush=True)
    if arguments.ids:
        order = iter([one for one in mutants if one["id"] in arguments.ids])
    else:
        order = wanted(mutants, arguments.seed, arguments.engines, results, others)
    seen = {original: "base"}
    seen.update({one["code"]: name for name, one in (others | results).items() if one.get("code")})

    def one_build(one):
        text = list(lines)
        text[one["line"] - 1] = one.pop("text")
        return one, compiler.build(one["id"], "".join(text))

    # The VMs have the CPUs first.
    os.nice(5)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        while len(made.ready) < arguments.count:
            while len(made.ready) - made.taken() > AHEAD:
                time.sleep(1)
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
    sample = load(arguments.out / "sample.json")
    made = {one["id"]: one for one in sample["mutants"]}
    said = arguments.said.read_text(errors="replace").splitlines()
    if not any(line.startswith("mutant base survived") for line in said):
        return
    for line in said:
        match = re.match(r"mutant (\w{10}) (killed|survived|error) (\S+) (\S+) ?(.*)", line)
        if match and match[1] in made:
            tried = results.get(match[1], {}).get("tried", {})
            results[match[1]] = made[match[1]] | dict(tried=tried | verdicts(sample["engines"], *match.groups()[1:]))
            results[match[1]]["result"] = overall(results[match[1]]["tried"])
    save(arguments.results, results)


def overall(tried):
    """What became of a mutant of which the engines say this."""
    said = {by["result"] for by in tried.values()}
    return next(result for result in ("killed", "error", "survived") if result in said)


def verdicts(engines, result, seconds, engine, test):
    """What each of these engines, tried in this order, has made of a mutant of which a VM said this: those
    before the one that ended it have let it live. That it can't be loaded all would see, that it can't be
    unloaded is seen behind the last."""
    by = {"load": engines[0], "unload": engines[-1], "-": None}.get(engine, engine)
    before = engines if by is None else engines[:engines.index(by)]
    tried = {name: dict(result="survived") for name in before}
    if by is not None:
        tried[by] = dict(result=result, seconds=float(seconds), test=test.strip() or engine)
    return tried


def ranked(killed):
    """The scenarios that killed these, those first that killed most in least time."""
    count, spent = collections.Counter(), collections.Counter()
    for one in killed:
        count[one["test"]] += 1
        spent[one["test"]] += one["seconds"]
    return sorted(count, key=lambda test: -count[test] ** 2 / (1 + spent[test]))


def killed_before():
    """What tools/mutants/killed has: what this and other machines have killed."""
    everything = {}
    for line in entries("mutants/killed"):
        name, function, operator, engine, seconds, test = line.split(" ", 5)
        by = dict(result="killed", seconds=float(seconds), test=test)
        one = dict(id=name, function=function, operator=operator, result="killed", tried={})
        everything.setdefault(name, one)["tried"][engine] = by
    return everything


def elsewhere(results):
    """What became of mutants of this type1 under other suites, the latest of each. What is argued has survived one."""
    everything = killed_before()
    for name in argued():
        everything.setdefault(name, dict(id=name, result="survived", tried=dict(scenarios=dict(result="survived"))))
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
            by = one.get("tried", {}).get("scenarios", {})
            if by.get("result") == "killed" and by["test"].startswith("type1/"):
                self.by_id[one["id"]] = by["test"]
                by_function[one["function"]].append(by)
                everywhere.append(by)
        self.everywhere = ranked(everywhere)[:4]
        self.by_function = {function: ranked(killed)[:4] for function, killed in by_function.items()}

    def likely(self, one):
        """The scenarios that are to try a mutant before all others: that which killed it once, then those
        that killed others of its function."""
        tests = [self.by_id[one["id"]]] if one["id"] in self.by_id else []
        tests += self.by_function.get(one["function"], []) + self.everywhere
        return list(dict.fromkeys(tests))


def argued():
    """Why a mutant need not be caught, by id."""
    return dict(line.split(" ", 1) for line in entries("mutants/argued"))


def judged(mutants, results, here):
    """The results of these mutants as they are reported: those of this suite, and of those before what it has
    not tried."""
    why = argued()
    for name, one in (results | here).items():
        if name not in mutants:
            continue
        one = mutants[name] | one
        if "tried" in one:
            one["tried"] = results.get(name, {}).get("tried", {}) | one["tried"]
            one["result"] = overall(one["tried"])
        if one["result"] == "survived" and name in why:
            one |= dict(result="argued", why=why[name])
        yield one


def by_group(title, results, group):
    """A table of what became of those of each group."""
    yield f"{title:<40} {'ran':>5} {'killed':>6} {'argued':>6} {'left':>5} {'score':>6} {'equal':>6} {'no build':>8}"
    counts = collections.defaultdict(collections.Counter)
    for one in results:
        for name in (one[group], "all"):
            counts[name][one["result"]] += 1
    for name in sorted(counts, key=lambda name: (name == "all", name)):
        count = counts[name]
        killed, left = count["killed"], count["survived"] + count["error"]
        score = f"{100 * killed / (killed + left):.1f}" if killed + left else "-"
        yield (f"{name:<40} {killed + left + count['argued']:>5} {killed:>6} {count['argued']:>6} {left:>5}"
               f" {score:>6} {count['equal']:>6} {count['not built']:>8}")
    yield ""


def by_engine(ran):
    """A table of what each engine kills of those that it has tried, told apart by what the scenarios say."""
    def rate(some, name):
        killed = sum(one["tried"][name]["result"] == "killed" for one in some)
        return f"{killed} of {len(some)}" if some else "-"

    yield f"{'engine':<12} {'kills':>14} {'of those that scenarios kill':>30} {'that they let live':>20} {'by it only':>11}"
    for name in dict.fromkeys(name for one in ran for name in one["tried"]):
        mine = [one for one in ran if name in one["tried"]]
        both = collections.defaultdict(list)
        for one in mine:
            both[one["tried"].get("scenarios", {}).get("result")].append(one)
        only = sum([other for other, by in one["tried"].items() if by["result"] == "killed"] == [name] for one in mine)
        yield f"{name:<12} {rate(mine, name):>14} {rate(both['killed'], name):>30} {rate(both['survived'], name):>20} {only:>11}"
    yield ""


def report(arguments):
    """The matrix, the score by function, operator and engine, and the survivors."""
    here = load(arguments.results)
    mutants = {one["id"]: one for one in generate(arguments.base / "src" / SOURCE)[1]}
    for one in mutants.values():
        del one["text"]
    results = list(judged(mutants, elsewhere(arguments.results), here))
    arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True))
    ran = [one for one in results if "tried" in one]
    lines = [*by_group("function", results, "function"), *by_group("operator", results, "operator"), *by_engine(ran)]
    same = sum("tried" in here.get(one["id"], {}) for one in ran)
    lines.append(f"{same} of {len(ran)} ran under this suite, the others under those before")
    seconds = sorted(by["seconds"] for one in ran for by in one["tried"].values() if by["result"] == "killed")
    if seconds:
        lines.append(f"seconds to kill: median {seconds[len(seconds) // 2]}, most {seconds[-1]}, all {sum(seconds):.0f}")
    lines.append("")
    lines += [f"{one['result']}: {one['id']} {one['function']}:{one['line']}\n  - {one['was']}\n  + {one['now']}"
              for one in sorted(ran, key=lambda one: one.get("line", 0)) if one["result"] in ("survived", "error")]
    text = "\n".join(lines) + "\n"
    arguments.text.write_text(text)
    print(text, end="")
    head = [line for line in (HERE / "killed").read_text().splitlines() if line.startswith("#")]
    arguments.killed.write_text("\n".join(head + sorted(
        f"{one['id']} {one['function']} {one['operator']} {engine} {by['seconds']:g} {by['test']}"
        for one in ran for engine, by in one["tried"].items() if by["result"] == "killed")) + "\n")


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
    one.add_argument("--engines", type=str.split, default=["scenarios", "pins", "fuzz"])
    one.add_argument("--jobs", type=int, default=os.cpu_count())
    one.add_argument("ids", nargs="*")
    command(record, "out", "said")
    command(report, "base", "json", "text", "killed")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
