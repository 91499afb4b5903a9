// SPDX-License-Identifier: GPL-2.0-only

//! Migration data: the sections and fields that the device's header says it has, changed one by one, with
//! the checksum made right again.

use crate::rng::{BOUNDARIES, Rng};
use mdev_dma::{PAGE, pattern, uapi};
use std::fmt;

/// Bytes of a section's header, and where in it the length is, and the checksum.
const HEADER: usize = 32;
const LENGTH: usize = 16;
const CHECKSUM: usize = 24;

/// Where the parts of a DEVICE section's contents begin: configuration space, registers, numbers, runs.
const REGISTERS: usize = 256;
const NUMBERS: usize = REGISTERS + uapi::RUST_MDEV_DMA_REG_GEN_COUNTER as usize + 8;
const RUNS: usize = NUMBERS + 14 * 8;

/// The numbers behind the registers: a u64 each.
const NAMES: [&str; 14] = [
    "queued",
    "command",
    "command IOVA",
    "command LENGTH",
    "command SEED",
    "running",
    "GEN_IOVA",
    "GEN_LENGTH",
    "GEN_SEED",
    "GEN_LIMIT",
    "GEN_RATE and GEN_MODE",
    "GEN_COUNTER",
    "GEN_STATUS",
    "runs",
];

/// A change of a stream, or of how it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A field of a section's contents: its bytes there, and what it is set to.
    Set { section: usize, at: usize, bytes: usize, to: u64 },
    /// A field of a section's header.
    Header { section: usize, at: usize, bytes: usize, to: u64 },
    /// Another run of pinned pages.
    Run { iova: u64, pages: u32, count: u32, counted: bool },
    /// A raw pin, in a section of its own.
    Raw { iova: u64, pages: u32, protection: u32 },
    /// The section comes once more.
    Repeat(usize),
    /// It changes places with the next one.
    Swap(usize),
    /// It is left out.
    Omit(usize),
    /// Only so many bytes, of the whole.
    Cut(usize),
    /// More bytes behind it.
    More(usize),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set { section: 1, at, to, .. } if (NUMBERS..RUNS).contains(at) => {
                write!(f, "{}={to:#x}", NAMES[(at - NUMBERS) / 8].replace(' ', "_"))
            }
            Self::Set { section: 1, at, bytes, to } if (REGISTERS..NUMBERS).contains(at) => {
                write!(f, "register_{:#x}.{bytes}={to:#x}", at - REGISTERS)
            }
            Self::Set { section, at, bytes, to } => write!(f, "{section}.{at:#x}.{bytes}={to:#x}"),
            Self::Header { section, at, to, .. } => write!(f, "header_{section}.{at}={to:#x}"),
            Self::Run { iova, pages, count, counted } => {
                let counted = if *counted { "" } else { "?" };
                write!(f, "run{counted}={iova:#x}+{pages:#x}x{count:#x}")
            }
            Self::Raw { iova, pages, protection } => {
                write!(f, "raw={iova:#x}+{pages:#x},{protection:#x}")
            }
            Self::Repeat(section) => write!(f, "repeat_{section}"),
            Self::Swap(section) => write!(f, "swap_{section}"),
            Self::Omit(section) => write!(f, "omit_{section}"),
            Self::Cut(len) => write!(f, "cut={len}"),
            Self::More(len) => write!(f, "more={len}"),
        }
    }
}

/// Numbers near which something changes, in streams of a device whose memory is here.
pub fn limits(iova: u64, pages: u64) -> [u64; 10] {
    [
        iova,
        iova + pages * PAGE,
        pages,
        pages * PAGE,
        uapi::RUST_MDEV_DMA_PAGE_PINS.into(),
        uapi::RUST_MDEV_DMA_PIN_BATCH.into(),
        uapi::RUST_MDEV_DMA_DMA_CHUNK.into(),
        // max_pins, max_length, and what the number of pages of a generator is less than.
        65536,
        268_435_456,
        1 << 31,
    ]
}

/// Every number of a state at every boundary, one after the other; nothing when all have been.
pub fn number_at_boundary(n: u64) -> Option<Change> {
    let (number, boundary) = (n as usize % NAMES.len(), n as usize / NAMES.len());
    let to = *BOUNDARIES.get(boundary)?;
    Some(Change::Set { section: 1, at: NUMBERS + 8 * number, bytes: 8, to })
}

/// Changes of a stream with these sections, whose memory is at `iova`.
pub fn changes(rng: &mut Rng, iova: u64, pages: u64) -> Vec<Change> {
    let count = 1 + if rng.one_in(2) { 0 } else { rng.below(3) };
    (0..count).map(|_| change(rng, iova, pages)).collect()
}

fn change(rng: &mut Rng, iova: u64, pages: u64) -> Change {
    let limits = limits(iova, pages);
    match rng.below(32) {
        0..12 => {
            let at = NUMBERS + 8 * rng.below(NAMES.len() as u64) as usize;
            Change::Set { section: 1, at, bytes: 8, to: rng.u64(&limits) }
        }
        12..17 => {
            let bytes = rng.pick(&[1, 4, 8]);
            let words = (NUMBERS - REGISTERS) / bytes;
            let at = REGISTERS + bytes * rng.below(words as u64) as usize;
            Change::Set { section: 1, at, bytes, to: rng.u64(&limits) }
        }
        17..19 => Change::Set {
            section: 1,
            at: rng.below(REGISTERS as u64) as usize,
            bytes: 1,
            to: rng.below(256),
        },
        19 => {
            let at = 8 * rng.below(2) as usize;
            Change::Set { section: 0, at, bytes: 8, to: rng.u64(&[PAGE]) }
        }
        20..24 => {
            let good = rng.one_in(2);
            Change::Run {
                iova: if good { iova + rng.below(pages) * PAGE } else { rng.u64(&limits) },
                pages: if good { 1 + rng.below(4) as u32 } else { rng.u32(&limits) },
                count: if good { 1 + rng.below(3) as u32 } else { rng.u32(&limits) },
                counted: !rng.one_in(4),
            }
        }
        24 => Change::Raw {
            iova: rng.u64(&limits),
            pages: rng.u32(&limits),
            protection: rng.u32(&[3]),
        },
        25..27 => {
            let (at, bytes) = rng.pick(&[(0, 8), (8, 4), (12, 4), (LENGTH, 8), (CHECKSUM, 8)]);
            Change::Header { section: rng.below(2) as usize, at, bytes, to: rng.u64(&[2, 16]) }
        }
        27 => Change::Repeat(rng.below(2) as usize),
        28 => Change::Swap(0),
        29 => Change::Omit(rng.below(2) as usize),
        30 => Change::Cut(rng.below(900) as usize),
        _ => Change::More(1 + rng.below(64) as usize),
    }
}

/// Whether what is changed gets past magic number, version, order and checksum.
pub fn passes_first_gate(changes: &[Change]) -> bool {
    changes.iter().all(|change| {
        matches!(change, Change::Set { .. } | Change::Run { .. } | Change::Raw { .. })
    })
}

/// The stream with these changes.
pub fn apply(stream: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut sections = split(stream);
    for change in changes {
        match *change {
            Change::Set { section, at, bytes, to } => {
                put(&mut sections, section, HEADER + at, bytes, to);
            }
            Change::Run { iova, pages, count, counted } => {
                let Some(section) = sections.get_mut(1) else { continue };
                section.extend(iova.to_le_bytes());
                section.extend(pages.to_le_bytes());
                section.extend(count.to_le_bytes());
                if counted {
                    let at = HEADER + RUNS - 8;
                    let runs = u64_at(section, at).wrapping_add(1);
                    put(&mut sections, 1, at, 8, runs);
                }
            }
            Change::Raw { iova, pages, protection } => {
                let Some(first) = sections.first() else { continue };
                let mut raw = first[..HEADER].to_vec();
                raw[12..16].copy_from_slice(&uapi::RUST_MDEV_DMA_MIG_RAW_PINS.to_le_bytes());
                raw.extend(iova.to_le_bytes());
                raw.extend(pages.to_le_bytes());
                raw.extend(protection.to_le_bytes());
                sections.push(raw);
            }
            Change::Repeat(section) => {
                if let Some(again) = sections.get(section).cloned() {
                    sections.insert(section, again);
                }
            }
            Change::Swap(section) if section + 1 < sections.len() => {
                sections.swap(section, section + 1);
            }
            Change::Omit(section) if section < sections.len() => drop(sections.remove(section)),
            _ => (),
        }
    }
    for section in &mut sections {
        mend(section);
    }
    let mut before = sections.clone();
    for change in changes {
        if let Change::Header { section, at, bytes, to } = *change {
            put(&mut before, section, at, bytes, to);
            // Half of these are noticed by the checksum, the others by what they say.
            if at < CHECKSUM && to % 2 == 0 {
                if let Some(section) = before.get_mut(section) {
                    checksum(section);
                }
            }
        }
    }
    let mut stream = before.concat();
    for change in changes {
        match *change {
            Change::Cut(len) => stream.truncate(len),
            Change::More(len) => stream.extend(vec![0x5a; len]),
            _ => (),
        }
    }
    stream
}

/// Whether the generator of a state that was taken is one that START takes. What isn't must be refused.
pub fn generator_is_valid(stream: &[u8]) -> bool {
    let number = numbers(stream);
    let [running, iova, length, mode] = [number(5), number(6), number(7), number(10) >> 32];
    let whole = length != 0 && (iova | length) % PAGE == 0;
    running != 1 || whole && (1..8).contains(&mode) && iova.checked_add(length).is_some()
}

/// Whether the generator of a state runs, as fast as it can, so that it counts or ends at once.
pub fn generator_hurries(stream: &[u8]) -> bool {
    let number = numbers(stream);
    number(5) == 1 && number(10) as u32 == 0
}

/// The numbers of a DEVICE section, by their place in [`NAMES`].
fn numbers(stream: &[u8]) -> impl Fn(usize) -> u64 {
    let section = split(stream).into_iter().nth(1).unwrap_or_default();
    move |i| u64_at(&section, HEADER + NUMBERS + 8 * i)
}

fn split(mut stream: &[u8]) -> Vec<Vec<u8>> {
    let mut sections = Vec::new();
    while stream.len() >= HEADER {
        let len = HEADER + u64_at(stream, LENGTH) as usize;
        let (section, rest) = stream.split_at(len.min(stream.len()));
        sections.push(section.to_vec());
        stream = rest;
    }
    sections
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn put(sections: &mut [Vec<u8>], section: usize, at: usize, bytes: usize, to: u64) {
    let to = &to.to_le_bytes()[..bytes];
    if let Some(field) = sections.get_mut(section).and_then(|s| s.get_mut(at..at + bytes)) {
        field.copy_from_slice(to);
    }
}

/// Makes length and checksum right.
fn mend(section: &mut [u8]) {
    let length = (section.len() - HEADER) as u64;
    section[LENGTH..CHECKSUM].copy_from_slice(&length.to_le_bytes());
    checksum(section);
}

fn checksum(section: &mut [u8]) {
    let covered = [&section[..CHECKSUM], &section[HEADER..]].concat();
    section[CHECKSUM..HEADER].copy_from_slice(&pattern::digest(&covered, 0).to_le_bytes());
}
