// SPDX-License-Identifier: GPL-2.0-only

//! What memory must contain after writes of devices, each of which fills pages with a pattern.

use crate::{GeneratorConfig, PAGE, pattern};
use std::{fmt, ops::Range};

/// Wrong pages, and runs of them, that are shown one by one.
const SHOWN: usize = 8;

/// Writes to a page that are remembered.
const REMEMBERED: usize = 100;

/// What filled a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// Whoever made the memory, before anything else.
    Initial,
    /// A command.
    Command,
    /// A CPU of the machine that has the device.
    Cpu,
    /// Write `n` of the generator of device number `device`.
    Generator {
        /// Which device.
        device: usize,
        /// Which write.
        n: u64,
    },
}

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Initial => f.write_str("its initial contents"),
            Self::Command => f.write_str("what a command wrote"),
            Self::Cpu => f.write_str("what the CPU wrote"),
            Self::Generator { device, n } => {
                write!(f, "what write {n} of the generator of device {device} wrote")
            }
        }
    }
}

/// What filled a page, and the seed of the pattern; none for zeroes.
type Write = (Writer, Option<u64>);

/// What every page of memory must contain, and what it contained before: the last writes to it.
pub struct Contents {
    /// Where the memory begins.
    iova: u64,
    pages: Vec<Vec<Write>>,
}

impl Contents {
    /// Of `bytes` of zeroed memory, whole pages, at `iova`.
    pub fn zeroed(iova: u64, bytes: u64) -> Self {
        Self::new(iova, bytes, None)
    }

    /// Of memory that was filled with the pattern of `seed`.
    pub fn filled(iova: u64, bytes: u64, seed: u64) -> Self {
        Self::new(iova, bytes, Some(seed))
    }

    fn new(iova: u64, bytes: u64, seed: Option<u64>) -> Self {
        Self { iova, pages: vec![vec![(Writer::Initial, seed)]; (bytes / PAGE) as usize] }
    }

    /// A command wrote the pattern of `seed` to these bytes, whole pages.
    pub fn commanded(&mut self, bytes: Range<u64>, seed: u64) {
        self.wrote(Writer::Command, bytes, seed);
    }

    /// The CPU wrote the pattern of `seed` to these bytes, whole pages.
    pub fn cpu_wrote(&mut self, bytes: Range<u64>, seed: u64) {
        self.wrote(Writer::Cpu, bytes, seed);
    }

    fn wrote(&mut self, writer: Writer, bytes: Range<u64>, seed: u64) {
        for iova in bytes.step_by(PAGE as usize) {
            self.remember(iova, (writer, Some(seed)));
        }
    }

    /// The generator of device number `device` made these writes.
    pub fn generated(&mut self, device: usize, config: &GeneratorConfig, writes: Range<u64>) {
        for n in writes {
            let write = (Writer::Generator { device, n }, Some(config.seed(n)));
            self.remember(config.page(n), write);
        }
    }

    /// Which pages of `memory`, the part of it that begins at `iova`, are wrong.
    pub fn wrong_pages(&self, iova: u64, memory: &[u8]) -> WrongPages {
        let iovas = (iova..).step_by(PAGE as usize);
        let wrong = iovas.zip(memory.chunks(PAGE as usize)).filter_map(|(iova, found)| {
            let writes = &self.pages[self.index(iova)];
            (!is_of(last(writes), iova, found)).then(|| WrongPage::new(iova, writes, found))
        });
        WrongPages(wrong.collect())
    }

    fn remember(&mut self, iova: u64, write: Write) {
        let index = self.index(iova);
        let writes = &mut self.pages[index];
        if writes.len() == REMEMBERED {
            // The initial contents are what a page has that was never sent.
            writes.remove(1);
        }
        writes.push(write);
    }

    fn index(&self, iova: u64) -> usize {
        ((iova - self.iova) / PAGE) as usize
    }
}

fn last(writes: &[Write]) -> &Write {
    writes.last().expect("the initial contents are always there")
}

/// Whether a page contains what a write put there.
fn is_of(&(_, seed): &Write, iova: u64, found: &[u8]) -> bool {
    match seed {
        Some(seed) => pattern::matches(found, seed, iova),
        None => found.iter().all(|&byte| byte == 0),
    }
}

/// A page that doesn't contain what was written to it last.
#[derive(Debug)]
struct WrongPage {
    iova: u64,
    expected: Writer,
    /// The write whose contents it has, and how many there were after it.
    found: Option<(Writer, usize)>,
}

impl WrongPage {
    fn new(iova: u64, writes: &[Write], found: &[u8]) -> Self {
        let mut earlier = writes.iter().rev().enumerate().skip(1);
        let found = earlier.find(|(_, write)| is_of(write, iova, found));
        let found = found.map(|(later, &(writer, _))| (writer, later));
        Self { iova, expected: last(writes).0, found }
    }
}

impl fmt::Display for WrongPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}: must have {}, has ", self.iova, self.expected)?;
        match self.found {
            Some((writer, later)) => write!(f, "{writer}, {later} earlier"),
            None => write!(f, "what no write put there"),
        }
    }
}

/// Pages that don't contain what was written to them last, by ascending IOVA.
#[derive(Debug, Default)]
pub struct WrongPages(Vec<WrongPage>);

impl WrongPages {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds those of a later part of the same memory.
    pub fn append(&mut self, mut later: Self) {
        self.0.append(&mut later.0);
    }

    /// Runs of them, in bytes of IOVA.
    pub fn runs(&self) -> Vec<Range<u64>> {
        let runs = self.0.chunk_by(|a, b| a.iova + PAGE == b.iova);
        runs.map(|run| run[0].iova..run[run.len() - 1].iova + PAGE).collect()
    }
}

impl fmt::Display for WrongPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wrong pages: {}, at ", self.0.len())?;
        let runs = self.runs();
        for (i, run) in runs.iter().take(SHOWN).enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{:#x}-{:#x}", run.start, run.end - 1)?;
        }
        if runs.len() > SHOWN {
            write!(f, " and {} more", runs.len() - SHOWN)?;
        }
        self.0.iter().take(SHOWN).try_for_each(|page| write!(f, "\n  {page}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IOVA: u64 = 0x10_0000;

    fn write(memory: &mut [u8], iova: u64, seed: u64) {
        let at = (iova - IOVA) as usize;
        pattern::fill(&mut memory[at..at + PAGE as usize], seed, iova);
    }

    #[test]
    fn the_generator_and_its_counter_say_it_all() {
        let length = 5 * PAGE;
        let iova = IOVA + 2 * PAGE;
        let config = GeneratorConfig { iova, length, seed: 1, limit: 0, rate: 0, mode: 1 };
        let mut memory = vec![0; 8 * PAGE as usize];
        let mut contents = Contents::zeroed(IOVA, 8 * PAGE);
        for n in 0..13 {
            assert!(contents.wrong_pages(IOVA, &memory).is_empty());
            contents.generated(0, &config, n..n + 1);
            let wrong = contents.wrong_pages(IOVA, &memory);
            assert_eq!(wrong.runs(), [config.page(n)..config.page(n) + PAGE]);
            write(&mut memory, config.page(n), config.seed(n));
        }
        // Part of the memory can be looked at alone.
        memory[7 * PAGE as usize] = 1;
        assert!(contents.wrong_pages(IOVA, &memory[..7 * PAGE as usize]).is_empty());
        let rest = contents.wrong_pages(IOVA + 7 * PAGE, &memory[7 * PAGE as usize..]);
        assert_eq!(rest.runs(), [IOVA + 7 * PAGE..IOVA + 8 * PAGE]);
    }

    #[test]
    fn old_writes_are_forgotten_but_the_first() {
        let mut memory = vec![0; PAGE as usize];
        let mut contents = Contents::zeroed(IOVA, PAGE);
        for seed in 1..=1000 {
            contents.cpu_wrote(IOVA..IOVA + PAGE, seed);
        }
        let mut found = |seed| {
            write(&mut memory, IOVA, seed);
            contents.wrong_pages(IOVA, &memory).to_string()
        };
        assert!(
            found(902)
                .ends_with("must have what the CPU wrote, has what the CPU wrote, 98 earlier")
        );
        assert!(found(901).ends_with("has what no write put there"));
        assert!(
            contents
                .wrong_pages(IOVA, &[0; PAGE as usize])
                .to_string()
                .contains("initial contents")
        );
        assert_eq!(contents.pages[0].len(), REMEMBERED);
    }

    #[test]
    fn wrong_pages_are_named() {
        let mut memory = vec![0; 8 * PAGE as usize];
        pattern::fill(&mut memory, 7, IOVA);
        let mut contents = Contents::filled(IOVA, 8 * PAGE, 7);
        contents.commanded(IOVA + PAGE..IOVA + 4 * PAGE, 8);
        contents.commanded(IOVA + 2 * PAGE..IOVA + 3 * PAGE, 9);
        // The second write is lost, and the only one to page 3; page 6 has one wrong byte.
        write(&mut memory, IOVA + PAGE, 8);
        write(&mut memory, IOVA + 2 * PAGE, 8);
        memory[7 * PAGE as usize - 1] ^= 1;
        assert_eq!(
            contents.wrong_pages(IOVA, &memory).to_string(),
            "wrong pages: 3, at 0x102000-0x103fff, 0x106000-0x106fff\n\
             \x20 0x102000: must have what a command wrote, has what a command wrote, 1 earlier\n\
             \x20 0x103000: must have what a command wrote, has its initial contents, 1 earlier\n\
             \x20 0x106000: must have its initial contents, has what no write put there"
        );
    }
}
