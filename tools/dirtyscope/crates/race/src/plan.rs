// SPDX-License-Identifier: GPL-2.0-only

//! What is done at the same time, as text too.

use anyhow::{Context as _, Result, bail, ensure};
use mdev_dma::{GeneratorConfig, PAGE};
use std::{
    fmt::{self, Display, Formatter},
    ops::Range,
    str::FromStr,
};
use testbed::{Op, at};

/// Threads at most, with a device each.
pub const LANES_MAX: usize = 4;

/// Where mappings may be, in pages: each at a multiple of what PIN and `vfio_dma_rw()` are cut at.
/// The last is so large that it takes long to pin: others get a turn meanwhile.
pub const PLACES: [Range<u64>; 4] = [0..4, 64..72, 128..192, 4096..8192];

/// So many of them are small.
pub const SMALL: usize = 3;

/// The range that has all of them: IOVA and size.
pub fn whole() -> (u64, u64) {
    (at(PLACES[0].start, 0), (PLACES[SMALL].end - PLACES[0].start) * PAGE)
}

/// IOVA and size of a place.
pub fn place(i: usize) -> (u64, u64) {
    let pages = &PLACES[i];
    (at(pages.start, 0), (pages.end - pages.start) * PAGE)
}

/// The place that has this IOVA.
pub fn place_of(iova: u64) -> Option<usize> {
    (0..PLACES.len()).find(|&i| {
        let (start, size) = place(i);
        iova.checked_sub(start).is_some_and(|offset| offset < size)
    })
}

/// Acts of threads at most whose orders are searched.
pub const HISTORY_MAX: usize = 64;

/// What a thread does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// An operation; its device is that of the thread.
    Op(Op),
    /// The device's generator begins to write, by itself.
    Generate(GeneratorConfig),
    /// It stops.
    Halt,
}

/// An act, and how long the thread idles before it, in ns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub pause: u32,
    pub act: Act,
}

/// Where threads run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpus {
    /// Wherever the kernel likes.
    Any,
    /// Each on one of its own, as long as there are any.
    Each,
    /// All on one: they take turns where they wait, or are preempted.
    One,
}

/// What is done before, by one thread, and then by several at the same time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    pub cpus: Cpus,
    pub setup: Vec<Op>,
    pub lanes: Vec<Vec<Step>>,
}

impl Round {
    /// Acts of all threads.
    pub fn len(&self) -> usize {
        self.lanes.iter().map(Vec::len).sum()
    }

    /// Whether what it does is too much for a search of its orders: devices write by themselves, or use
    /// the large place, where nothing is done at once.
    pub fn is_storm(&self) -> bool {
        let large = |op: &Op| op.range().is_some_and(|(iova, _)| place_of(iova) == Some(SMALL));
        self.len() > HISTORY_MAX
            || self.setup.iter().any(large)
            || self.lanes.iter().flatten().any(|step| match &step.act {
                Act::Op(op) => large(op),
                Act::Generate(_) => true,
                Act::Halt => false,
            })
    }

    /// What is left of it without the acts that `kept` refuses, as long as devices are closed, groups
    /// taken out, and generators stopped by those that have done the opposite before.
    pub fn without(&self, kept: impl Fn(usize, usize) -> bool) -> Option<Self> {
        let lanes = self.lanes.iter().enumerate().map(|(lane, steps)| {
            let steps = steps.iter().enumerate().filter(|&(i, _)| kept(lane, i));
            steps.map(|(_, step)| step.clone()).collect::<Vec<_>>()
        });
        let round = Self { lanes: lanes.collect(), ..self.clone() };
        round.is_possible().then_some(round)
    }

    fn is_possible(&self) -> bool {
        self.lanes.iter().all(|steps| {
            let (mut open, mut joined, mut generates) = (true, true, false);
            let possible = steps.iter().all(|step| {
                let possible;
                (possible, (open, joined)) = match &step.act {
                    Act::Op(Op::Open { .. }) => (joined && !open, (true, joined)),
                    Act::Op(Op::Close { .. }) => (open, (false, joined)),
                    Act::Op(Op::Leave { .. }) => (joined && !open, (open, false)),
                    Act::Op(Op::Join { .. }) => (!joined, (open, true)),
                    Act::Op(Op::Command { .. }) | Act::Generate(_) | Act::Halt => {
                        (open, (open, joined))
                    }
                    Act::Op(_) => (true, (open, joined)),
                };
                generates = match step.act {
                    Act::Generate(_) => true,
                    Act::Halt | Act::Op(Op::Close { .. }) => false,
                    _ => generates,
                };
                possible
            });
            possible && !generates
        })
    }
}

impl Display for Act {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Op(op) => write!(f, "{op}"),
            Self::Generate(config) => {
                let &GeneratorConfig { iova, length, seed, mode, .. } = config;
                write!(f, "GENERATE {iova:#x} {length:#x} {mode} {seed}")
            }
            Self::Halt => f.write_str("HALT"),
        }
    }
}

impl FromStr for Act {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "HALT" {
            return Ok(Self::Halt);
        }
        let Some(numbers) = text.strip_prefix("GENERATE ") else {
            return Ok(Self::Op(text.parse()?));
        };
        let numbers: Vec<_> = numbers.split_whitespace().map(number).collect::<Result<_>>()?;
        let [iova, length, mode, seed] = numbers[..] else {
            bail!("GENERATE IOVA LENGTH MODE SEED")
        };
        let mode = u32::try_from(mode)?;
        Ok(Self::Generate(GeneratorConfig { iova, length, seed, limit: 0, rate: 0, mode }))
    }
}

fn number(text: &str) -> Result<u64> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.with_context(|| format!("{text:?} is no number"))
}

impl Display for Round {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let cpus = match self.cpus {
            Cpus::Any => "any",
            Cpus::Each => "each",
            Cpus::One => "one",
        };
        writeln!(f, "cpus {cpus}")?;
        for op in &self.setup {
            writeln!(f, "before {op}")?;
        }
        for (lane, steps) in self.lanes.iter().enumerate() {
            for Step { pause, act } in steps {
                writeln!(f, "thread {lane} after {pause} {act}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for Round {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut round = Self { cpus: Cpus::Any, setup: Vec::new(), lanes: Vec::new() };
        for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
            let parsed = round.line(line);
            parsed.with_context(|| format!("{line:?}"))?;
        }
        ensure!(!round.lanes.is_empty(), "nobody does anything");
        ensure!(round.is_possible(), "a device is used that isn't open");
        Ok(round)
    }
}

impl Round {
    fn line(&mut self, line: &str) -> Result<()> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "" => {}
            "cpus" => {
                self.cpus = match rest {
                    "any" => Cpus::Any,
                    "each" => Cpus::Each,
                    "one" => Cpus::One,
                    _ => bail!("cpus any, each, or one"),
                }
            }
            "before" => self.setup.push(rest.parse()?),
            "thread" => {
                let mut words = rest.splitn(4, ' ');
                let mut word = || words.next().context("thread N after N ACT");
                let (lane, _, pause) = (word()?.parse::<usize>()?, word()?, word()?.parse()?);
                let act = word()?.parse()?;
                ensure!(lane < LANES_MAX, "there are no more than {LANES_MAX} threads");
                while self.lanes.len() <= lane {
                    self.lanes.push(Vec::new());
                }
                self.lanes[lane].push(Step { pause, act });
            }
            _ => bail!("a line begins with cpus, before, or thread"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "cpus one
before MAP 0x40000000+0x4000 rw
thread 0 after 12 UNMAP_BITMAP 0x40000000+0x4000
thread 1 after 0 GENERATE 0x40000000 0x4000 4 7
thread 1 after 9 HALT
thread 1 after 0 device 1 CLOSE
";

    #[test]
    fn what_is_shown_can_be_read() {
        let round: Round = TEXT.parse().unwrap();
        assert_eq!(round.to_string(), TEXT);
        assert!(round.is_storm());
        let shorter = round.without(|lane, i| (lane, i) != (1, 0)).unwrap();
        assert_eq!(shorter.len(), 3);
        assert!("thread 0 after 0 device 0 OPEN".parse::<Round>().is_err());
        assert!("thread 9 after 0 START".parse::<Round>().is_err());
    }
}
