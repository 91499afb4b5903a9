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
/// The fourth is so large that it takes long to pin: others get a turn meanwhile. In the last each page
/// is a mapping of its own: what has to do with all mappings takes long.
pub const PLACES: [Range<u64>; 5] = [0..4, 64..72, 128..192, 4096..8192, 256..384];

/// So many of them are small.
pub const SMALL: usize = 3;

/// The one whose pages are mapped one by one.
pub const CRUMBS: usize = 4;

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
    /// A group with an IOMMU, which no device of ours is in, joins the container.
    JoinIommu,
    /// It leaves.
    LeaveIommu,
}

/// An act, and what the thread does before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Whether it waits, for a short time, until the others are where they meet.
    pub meets: bool,
    /// How long it idles then, in ns.
    pub pause: u32,
    pub act: Act,
}

impl Step {
    /// An act at once.
    pub fn new(act: Act) -> Self {
        Self { meets: false, pause: 0, act }
    }
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
    /// How often the first thread does all that it has to do. If that is more than once, the others do what
    /// they have to do again and again until it has.
    pub times: u32,
    pub setup: Vec<Op>,
    pub lanes: Vec<Vec<Step>>,
}

/// What of a round can be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All that was answered: whether some order of the operations answers so.
    History,
    /// Must, may and memory: devices write by themselves, or use the large place, where nothing is done at
    /// once, or there is too much for a search of its orders.
    Storm,
    /// That the kernel survives it, and has nothing left at the end: the same is done again and again.
    Hammer,
}

impl Round {
    /// Acts of all threads, each counted once.
    pub fn len(&self) -> usize {
        self.lanes.iter().map(Vec::len).sum()
    }

    /// What of it can be checked.
    pub fn kind(&self) -> Kind {
        let iommu = |step: &Step| matches!(step.act, Act::JoinIommu | Act::LeaveIommu);
        if self.times > 1 || self.lanes.iter().flatten().any(iommu) {
            Kind::Hammer
        } else if self.is_storm() {
            Kind::Storm
        } else {
            Kind::History
        }
    }

    /// Whether a thread goes on until the first has ended.
    pub fn follows(&self, lane: usize) -> bool {
        self.times > 1 && lane > 0
    }

    fn is_storm(&self) -> bool {
        let large = |op: &Op| op.range().is_some_and(|(iova, _)| place_of(iova) == Some(SMALL));
        self.len() > HISTORY_MAX
            || self.setup.iter().any(large)
            || self.lanes.iter().flatten().any(|step| match &step.act {
                Act::Op(op) => large(op),
                Act::Generate(_) => true,
                _ => false,
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
        // One thread may have the group with an IOMMU come and go.
        let iommu = |step: &Step| matches!(step.act, Act::JoinIommu | Act::LeaveIommu);
        self.lanes.iter().filter(|steps| steps.iter().any(iommu)).count() <= 1
            && self.lanes.iter().all(|steps| {
                let mut now =
                    Situation { open: true, joined: true, generates: false, iommu: false };
                steps.iter().all(|step| now.allows(&step.act))
                    && !now.generates
                    && !now.iommu
                    // Done once more, it begins as it did.
                    && (self.times == 1 || now.open && now.joined)
            })
    }
}

/// What a thread has done with its device, and the groups.
struct Situation {
    open: bool,
    joined: bool,
    generates: bool,
    iommu: bool,
}

impl Situation {
    /// Whether the thread may do this, which it then has done.
    fn allows(&mut self, act: &Act) -> bool {
        let Self { open, joined, iommu, .. } = *self;
        match act {
            Act::Op(Op::Open { .. }) => {
                self.open = true;
                joined && !open
            }
            Act::Op(Op::Close { .. }) => {
                (self.open, self.generates) = (false, false);
                open
            }
            Act::Op(Op::Leave { .. }) => {
                self.joined = false;
                joined && !open
            }
            Act::Op(Op::Join { .. }) => {
                self.joined = true;
                !joined
            }
            Act::Op(Op::Command { .. }) => open,
            Act::Op(_) => true,
            Act::Generate(_) => {
                self.generates = true;
                open
            }
            Act::Halt => {
                self.generates = false;
                open
            }
            Act::JoinIommu => {
                self.iommu = true;
                !iommu
            }
            Act::LeaveIommu => {
                self.iommu = false;
                iommu
            }
        }
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
            Self::JoinIommu => f.write_str("JOIN_IOMMU"),
            Self::LeaveIommu => f.write_str("LEAVE_IOMMU"),
        }
    }
}

impl FromStr for Act {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "HALT" => return Ok(Self::Halt),
            "JOIN_IOMMU" => return Ok(Self::JoinIommu),
            "LEAVE_IOMMU" => return Ok(Self::LeaveIommu),
            _ => {}
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
        if self.times > 1 {
            writeln!(f, "times {}", self.times)?;
        }
        for op in &self.setup {
            writeln!(f, "before {op}")?;
        }
        for (lane, steps) in self.lanes.iter().enumerate() {
            for Step { meets, pause, act } in steps {
                let meets = if *meets { " meets" } else { "" };
                writeln!(f, "thread {lane}{meets} after {pause} {act}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for Round {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut round = Self { cpus: Cpus::Any, times: 1, setup: Vec::new(), lanes: Vec::new() };
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
            "times" => {
                self.times = rest.parse()?;
                ensure!(self.times > 0, "times 1, or more");
            }
            "before" => self.setup.push(rest.parse()?),
            "thread" => {
                let form = "thread N [meets] after N ACT";
                let (lane, rest) = rest.split_once(' ').context(form)?;
                let lane = lane.parse::<usize>()?;
                let (meets, rest) = match rest.strip_prefix("meets ") {
                    Some(rest) => (true, rest),
                    None => (false, rest),
                };
                let rest = rest.strip_prefix("after ").context(form)?;
                let (pause, act) = rest.split_once(' ').context(form)?;
                let (pause, act) = (pause.parse()?, act.parse()?);
                ensure!(lane < LANES_MAX, "there are no more than {LANES_MAX} threads");
                while self.lanes.len() <= lane {
                    self.lanes.push(Vec::new());
                }
                self.lanes[lane].push(Step { meets, pause, act });
            }
            _ => bail!("a line begins with cpus, times, before, or thread"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "cpus one
times 3
before MAP 0x40000000+0x4000 rw
thread 0 after 12 UNMAP_BITMAP 0x40000000+0x4000
thread 1 after 0 GENERATE 0x40000000 0x4000 4 7
thread 1 after 9 HALT
thread 1 meets after 0 device 1 CLOSE
thread 1 after 0 device 1 OPEN
thread 2 after 0 JOIN_IOMMU
thread 2 after 0 LEAVE_IOMMU
";

    #[test]
    fn what_is_shown_can_be_read() {
        let round: Round = TEXT.parse().unwrap();
        assert_eq!(round.to_string(), TEXT);
        assert_eq!(round.kind(), Kind::Hammer);
        let shorter = round.without(|lane, i| (lane, i) != (1, 0)).unwrap();
        assert_eq!(shorter.len(), 6);
        // Each time begins as the first did.
        assert!(round.without(|lane, i| (lane, i) != (1, 3)).is_none());
        assert!(round.without(|lane, i| (lane, i) != (2, 1)).is_none());
        let once = Round { times: 1, ..round.without(|lane, _| lane != 2).unwrap() };
        assert_eq!(once.kind(), Kind::Storm);
        assert!("thread 0 after 0 device 0 OPEN".parse::<Round>().is_err());
        assert!("thread 9 after 0 START".parse::<Round>().is_err());
    }
}
