// SPDX-License-Identifier: GPL-2.0-only

//! A machine's memory: filled, and held against what it must contain.

use crate::vmm::{Layout, Role};
use anyhow::{Context as _, Result};
use events::Difference;
use mdev_dma::{Contents, GeneratorConfig, PAGE, contents::WrongPages, pattern};
use std::{
    fmt,
    fs::{File, OpenOptions},
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
};

/// Bytes that are read or written at once.
const CHUNK: usize = 256 * PAGE as usize;

/// A machine's memory: a file that its VMM shares with this program, and with nobody else.
pub struct Memory {
    /// What failures call the machine.
    pub machine: String,
    /// What the machine is in the migration that began last.
    pub role: Role,
    file: File,
}

impl Memory {
    /// Makes that file, zeroed, of so many bytes.
    pub fn new(path: &Path, bytes: u64, machine: &str, role: Role) -> Result<Self> {
        let mut open = OpenOptions::new();
        let file = open.read(true).write(true).create_new(true).open(path);
        let file = file.with_context(|| path.display().to_string())?;
        file.set_len(bytes).context("the machine's memory")?;
        Ok(Self { machine: machine.into(), role, file })
    }

    /// The same memory, of another machine.
    pub fn shared(&self, machine: &str, role: Role) -> Result<Self> {
        let file = self.file.try_clone().context("the machine's memory")?;
        Ok(Self { machine: machine.into(), role, file })
    }

    /// By which path other processes can open that file: it isn't in a directory any more.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }
}

/// A part of a machine's memory, whose addresses have no gap.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Its addresses, in bytes.
    pub addresses: Range<u64>,
    /// Where it is in the file that is the machine's memory.
    pub offset: u64,
}

impl Piece {
    /// Does something with each chunk of it: its address, and its offset in the file.
    fn chunks(&self, mut each: impl FnMut(u64, u64, &mut [u8]) -> Result<()>) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        for at in self.addresses.clone().step_by(CHUNK) {
            let length = CHUNK.min((self.addresses.end - at) as usize);
            each(at, self.offset + (at - self.addresses.start), &mut chunk[..length])?;
        }
        Ok(())
    }
}

/// What all of a machine's memory must contain.
pub struct MemoryContents(Vec<(Piece, Contents)>);

impl MemoryContents {
    /// Fills the memory of a machine of this layout with a pattern.
    pub fn fill(memory: &Memory, layout: &Layout, seed: u64) -> Result<Self> {
        let fill = |piece: Piece| {
            piece.chunks(|at, offset, chunk| {
                pattern::fill(chunk, seed, at);
                memory.file.write_all_at(chunk, offset).context("fill the machine's memory")
            })?;
            let Range { start, end } = piece.addresses;
            Ok((piece, Contents::filled(start, end - start, seed)))
        };
        layout.pieces().into_iter().map(fill).collect::<Result<_>>().map(Self)
    }

    /// A command wrote the pattern of `seed` to these bytes, whole pages of one piece.
    pub fn commanded(&mut self, bytes: Range<u64>, seed: u64) {
        self.of(bytes.start).commanded(bytes, seed);
    }

    /// The generator of device number `device`, whose pages are in one piece, made these writes.
    pub fn generated(&mut self, device: usize, config: &GeneratorConfig, writes: Range<u64>) {
        self.of(config.iova).generated(device, config, writes);
    }

    fn of(&mut self, address: u64) -> &mut Contents {
        let piece = self.0.iter_mut().find(|(piece, _)| piece.addresses.contains(&address));
        &mut piece.expect("there is memory at this address").1
    }

    /// Compares all of a machine's memory. The error is [`WrongMemory`] if it differs.
    pub fn check(&self, memory: &Memory) -> Result<()> {
        let mut wrong = WrongPages::default();
        for (piece, contents) in &self.0 {
            piece.chunks(|at, offset, chunk| {
                memory.file.read_exact_at(chunk, offset).context("read the machine's memory")?;
                wrong.append(contents.wrong_pages(at, chunk));
                Ok(())
            })?;
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(WrongMemory { whose: memory.machine.clone(), role: memory.role, wrong }.into())
    }
}

/// Memory that doesn't contain what was written to it last.
#[derive(Debug)]
pub struct WrongMemory {
    whose: String,
    /// Whether that is the machine that was left, or the one that was migrated to.
    pub role: Role,
    wrong: WrongPages,
}

impl WrongMemory {
    /// Whether these bytes are wrong in the machine that was migrated to, and no others.
    pub fn is_lost(&self, bytes: &Range<u64>) -> bool {
        self.role == Role::Destination && self.wrong.runs() == [bytes.clone()]
    }

    /// As an event: what a migration has lost.
    pub fn difference(&self) -> Difference {
        let lost = self.wrong.runs().into_iter().map(|run| (run.start, run.end));
        let what = format!("the memory of {} isn't what was written to it", self.whose);
        Difference { what, lost: lost.collect(), ..Default::default() }
    }
}

impl fmt::Display for WrongMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the memory of {} isn't what was written to it\n{}", self.whose, self.wrong)
    }
}

impl std::error::Error for WrongMemory {}
