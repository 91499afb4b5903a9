// SPDX-License-Identifier: GPL-2.0-only

//! What a machine's memory must contain.

use crate::machine::{Machine, Role};
use anyhow::{Context as _, Result};
use events::Difference;
use mdev_dma::{PAGE, Program, pattern};
use std::{fmt, fs::File, ops::Range, os::unix::fs::FileExt};

/// Pages that are compared at once.
const CHUNK: usize = 256;

/// Wrong pages that are shown one by one.
const SHOWN: usize = 8;

/// Who wrote a page last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// This tool, before anything else.
    Background,
    /// A command.
    Command,
    /// Write `n` of the generator of device `device`.
    Generator { device: usize, n: u64 },
}

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Background => f.write_str("the background"),
            Self::Command => f.write_str("a command"),
            Self::Generator { device, n } => {
                write!(f, "write {n} of the generator of device {device}")
            }
        }
    }
}

/// Who wrote a page, and the seed of the pattern that it was filled with.
type Write = (Writer, u64);

/// What every page of a machine's memory must contain, and what it had before: all writes to it,
/// each of which fills it with a pattern.
pub struct Contents {
    pages: Vec<Vec<Write>>,
}

impl Contents {
    /// Fills all `bytes` of `ram` with a pattern.
    pub fn fill(ram: &File, bytes: u64, seed: u64) -> Result<Self> {
        let contents =
            Self { pages: vec![vec![(Writer::Background, seed)]; (bytes / PAGE) as usize] };
        let mut chunk = vec![0; CHUNK * PAGE as usize];
        for at in (0..bytes).step_by(chunk.len()) {
            pattern::fill(&mut chunk, seed, at);
            ram.write_all_at(&chunk, at).context("fill the machine's memory")?;
        }
        Ok(contents)
    }

    /// Command number `seed` wrote these pages.
    pub fn commanded(&mut self, pages: Range<u64>, seed: u64) {
        pages.for_each(|page| self.pages[page as usize].push((Writer::Command, seed)));
    }

    /// The generator of `device` made these writes.
    pub fn generated(&mut self, device: usize, program: &Program, writes: Range<u64>) {
        for n in writes {
            let page = (program.page(n) / PAGE) as usize;
            self.pages[page].push((Writer::Generator { device, n }, program.seed(n)));
        }
    }

    /// Compares all of a machine's memory. The error is [`WrongPages`] if it differs.
    pub fn check(&self, machine: &Machine) -> Result<()> {
        self.check_file(&machine.name, machine.role, machine.ram())
    }

    fn check_file(&self, whose: &str, role: Role, ram: &File) -> Result<()> {
        let mut found = vec![0; CHUNK * PAGE as usize];
        let mut wanted = vec![0; PAGE as usize];
        let mut wrong = Vec::new();
        for (i, pages) in self.pages.chunks(CHUNK).enumerate() {
            let first = (i * CHUNK) as u64;
            let found = &mut found[..pages.len() * PAGE as usize];
            ram.read_exact_at(found, first * PAGE).context("read the machine's memory")?;
            for ((page, writes), found) in (first..).zip(pages).zip(found.chunks(PAGE as usize)) {
                let &(_, seed) = last(writes);
                pattern::fill(&mut wanted, seed, page * PAGE);
                if found != wanted {
                    wrong.push(WrongPage::new(page, writes, found));
                }
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(WrongPages { whose: whose.into(), role, wrong }.into())
    }
}

fn last(writes: &[Write]) -> &Write {
    writes.last().expect("the background is always there")
}

/// A page that doesn't contain what was written to it last.
#[derive(Debug)]
struct WrongPage {
    page: u64,
    wanted: Writer,
    /// The write whose contents it has, and how many there were after it.
    found: Option<(Writer, usize)>,
}

impl WrongPage {
    fn new(page: u64, writes: &[Write], found: &[u8]) -> Self {
        let mut of_write = vec![0; PAGE as usize];
        let found = writes.iter().rev().zip(0..).skip(1).find_map(|(&(writer, seed), later)| {
            pattern::fill(&mut of_write, seed, page * PAGE);
            (found == of_write).then_some((writer, later))
        });
        Self { page, wanted: last(writes).0, found }
    }
}

impl fmt::Display for WrongPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}: must have what {} wrote, ", self.page * PAGE, self.wanted)?;
        match self.found {
            Some((writer, later)) => write!(f, "has what {writer} wrote, {later} earlier"),
            None => write!(f, "has what nobody wrote"),
        }
    }
}

/// Pages of memory that don't contain what was written to them last.
#[derive(Debug)]
pub struct WrongPages {
    whose: String,
    /// Whether that is the machine that was left, or the one that was migrated to.
    pub role: Role,
    wrong: Vec<WrongPage>,
}

impl WrongPages {
    /// As an event: what a migration has lost.
    pub fn difference(&self) -> Difference {
        let runs = self.wrong.chunk_by(|a, b| a.page + 1 == b.page);
        let lost = runs.map(|run| (run[0].page * PAGE, (run[run.len() - 1].page + 1) * PAGE));
        let what = format!("the memory of {} isn't what was written to it", self.whose);
        Difference { what, lost: lost.collect(), ..Default::default() }
    }
}

impl fmt::Display for WrongPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the memory of {} isn't what was written to it", self.whose)?;
        write!(f, "wrong pages: {}, at {}", self.wrong.len(), Runs(&self.wrong))?;
        self.wrong.iter().take(SHOWN).try_for_each(|page| write!(f, "\n  {page}"))
    }
}

impl std::error::Error for WrongPages {}

/// Addresses of pages that follow each other, from the first byte to the last.
struct Runs<'a>(&'a [WrongPage]);

impl fmt::Display for Runs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs: Vec<_> = self.0.chunk_by(|a, b| a.page + 1 == b.page).collect();
        for (i, run) in runs.iter().take(SHOWN).enumerate() {
            let (start, end) = (run[0].page * PAGE, (run[run.len() - 1].page + 1) * PAGE - 1);
            write!(f, "{}{start:#x}-{end:#x}", if i == 0 { "" } else { ", " })?;
        }
        if runs.len() > SHOWN { write!(f, " and {} more", runs.len() - SHOWN) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = CHUNK as u64 * 2;

    fn memory() -> (Contents, File) {
        let file = tempfile::tempfile().unwrap();
        (Contents::fill(&file, PAGES * PAGE, 7).unwrap(), file)
    }

    fn write(file: &File, page: u64, seed: u64) {
        let mut bytes = vec![0; PAGE as usize];
        pattern::fill(&mut bytes, seed, page * PAGE);
        file.write_all_at(&bytes, page * PAGE).unwrap();
    }

    #[test]
    fn what_was_written_is_right() {
        let (mut contents, file) = memory();
        contents.check_file("it", Role::Destination, &file).unwrap();
        let program =
            Program { iova: 2 * PAGE, length: 5 * PAGE, seed: 1, limit: 0, rate: 0, mode: 1 };
        contents.generated(0, &program, 0..13);
        assert!(contents.check_file("it", Role::Destination, &file).is_err());
        (0..13).for_each(|n| write(&file, program.page(n) / PAGE, program.seed(n)));
        contents.check_file("it", Role::Destination, &file).unwrap();
    }

    #[test]
    fn wrong_pages_are_named() {
        let (mut contents, file) = memory();
        contents.commanded(3..6, 8);
        contents.commanded(4..5, 9);
        // The second write is lost, and the only one to page 5; page 511 has one wrong byte.
        write(&file, 3, 8);
        write(&file, 4, 8);
        file.write_all_at(&[0], 511 * PAGE + 4095).unwrap();
        let error = contents.check_file("it", Role::Destination, &file).unwrap_err();
        assert!(error.is::<WrongPages>());
        assert_eq!(
            error.to_string(),
            "the memory of it isn't what was written to it\n\
             wrong pages: 3, at 0x4000-0x5fff, 0x1ff000-0x1fffff\n\
             \x20 0x4000: must have what a command wrote, has what a command wrote, 1 earlier\n\
             \x20 0x5000: must have what a command wrote, has what the background wrote, 1 earlier\n\
             \x20 0x1ff000: must have what the background wrote, has what nobody wrote"
        );
    }
}
