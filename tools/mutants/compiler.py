# SPDX-License-Identifier: GPL-2.0
"""Compiles mutants of type1 as kbuild compiled the base."""

import collections
import concurrent.futures
import hashlib
import re
import subprocess

from generate import bodies


class Compiler:
    """Builds a type1 of another source, as kbuild built the base in `base`."""

    def __init__(self, base, out, jobs):
        self.base, self.out, self.jobs = base, out, jobs
        text = (base / "out/.vfio_iommu_type1.o.cmd").read_text().splitlines()[0]
        self.command = text.partition(":= ")[2].replace("$(pound)", "#").replace("$$", "$")
        link = (base / "out/.vfio_iommu_type1.ko.cmd").read_text().splitlines()[0]
        self.link = link.partition(":= ")[2]

    def _compile(self, directory, source, more=""):
        """Compiles `source` in `directory`, with these flags more."""
        directory.mkdir(parents=True)
        original = str(self.base / "src/drivers/vfio")
        (directory / "vfio_iommu_type1.c").write_text(f'#line 1 "{original}/vfio_iommu_type1.c"\n' + source)
        # Relative paths are those of kbuild's directory, /kernel/b or out.
        command = self.command.replace(f"{original}/vfio_iommu_type1.c", str(directory / "vfio_iommu_type1.c"))
        command = re.sub(r"(?<=\s)vfio_iommu_type1\.o\b", str(directory / "vfio_iommu_type1.o"), command)
        command = re.sub(r"-Wp,-MMD,\S+|\s-g(?=\s)", "", command)
        command = command.replace("gcc-14 ", f"gcc-14 {more} -I{original} ", 1)
        if more:
            # What comes behind the compiler is for an object.
            command = command.partition(" ; ")[0]
        done = subprocess.run(["sh", "-c", command], cwd=self.base / "out", capture_output=True, text=True)
        (directory / "log").write_text(command + "\n" + done.stdout + done.stderr)
        return done

    def build(self, name, source):
        """Builds it; the hash of its code, or None if it doesn't compile."""
        directory = self.out / "work" / name
        if self._compile(directory, source).returncode:
            return None
        target = directory / "vfio_iommu_type1.o"
        subprocess.run(["strip", "-g", target], check=True)
        code = hashlib.sha256(target.read_bytes()).hexdigest()
        link = re.sub(r"(?<=\s)vfio_iommu_type1\.o\b", str(target), self.link)
        link = re.sub(r"(?<=\s)vfio_iommu_type1\.ko\b", str(self.out / f"{name}.ko"), link)
        subprocess.run(["sh", "-c", link], cwd=self.base / "out", check=True, capture_output=True)
        subprocess.run(["rm", "-rf", directory], check=True)
        return code

    def refused(self, lines, mutants):
        """Those that don't compile, as far as the compiler's front end sees that: each function is read once, with
        its mutants behind it under names of their own, in place of all of type1 for each."""
        by_function = collections.defaultdict(list)
        for one in mutants:
            by_function[one["function"]].append(one)
        places = {name: place for name, *place in bodies(lines, by_function)}
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            chunks = [(lines, places[name], name, ones[at:at + 300])
                      for name, ones in by_function.items() for at in range(0, len(ones), 300)]
            found = set().union(*pool.map(lambda chunk: self._refused(*chunk), chunks))
        return [one for one in mutants if one["id"] in found]

    def _refused(self, lines, place, name, mutants):
        start, first, end = place
        unbalanced = {one["id"] for one in mutants if not balanced(lines[one["line"] - 1], one["text"])}
        text = lines[:end + 1]
        for one in mutants:
            if one["id"] not in unbalanced:
                head = "".join(lines[start:first])
                body = lines[first:end + 1]
                body[one["line"] - 1 - first] = one["text"]
                text += [f'#line 1 "{one["id"]}"\n', re.sub(rf"\b{name}\(", f"{name}_{one['id']}(", head, count=1), *body]
        directory = self.out / "work" / mutants[0]["id"]
        done = self._compile(directory, "".join(text), "-fsyntax-only -Wno-missing-prototypes -Wno-unused")
        subprocess.run(["rm", "-rf", directory], check=True)
        return unbalanced | blamed(done.stderr)


def balanced(was, now):
    """Whether there are as many brackets of each kind, less those that close, as before."""
    was, now = (re.sub(r"/\*.*?\*/|//.*", "", line) for line in (was, now))
    return all(was.count(opens) - was.count(closes) == now.count(opens) - now.count(closes)
               for opens, closes in ("{}", "()", "[]"))


def blamed(stderr):
    """The mutants that the compiler's errors are in, or, of those in a header, that are the first to be
    named behind one."""
    found, pending = set(), False
    for line in stderr.splitlines():
        error = re.match(r"(\S+?):\d+:\d+: (?:fatal )?error:", line)
        place = re.search(r"(?:^|from )([0-9a-f]{10}):\d+", line)
        if error:
            pending = not re.fullmatch(r"[0-9a-f]{10}", error[1])
            if not pending:
                found.add(error[1])
        elif pending and place:
            found.add(place[1])
            pending = False
    return found
