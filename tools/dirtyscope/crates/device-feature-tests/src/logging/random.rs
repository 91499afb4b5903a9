// SPDX-License-Identifier: GPL-2.0-only

//! Random sequences of what a user and a device do about the log, beside its model.

use anyhow::{Result, anyhow};
use harness::{Context, Scenario, scenario};
use mdev_dma::Opcode;
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner},
};
use std::{cell::RefCell, ops::Range};
use testbed::{PAGE, at, logging::LoggingPair};

pub const SCENARIOS: &[Scenario] = &[scenario(
    "device/logging/random",
    "random sequences of START, writes, REPORT and STOP: the log has what is due",
    random,
)];

/// Pages of memory, of which those before `PINNED` are pinned.
const PAGES: u64 = 200;
const PINNED: u64 = 120;

/// Sequences, and the longest one.
const SEQUENCES: u32 = 1500;
const LENGTH: usize = 30;

/// What all sequences follow from.
const SEED: u8 = 1;

#[derive(Clone, Debug)]
enum Step {
    Start { ranges: Vec<(u64, u64)>, page_size: u64 },
    Stop,
    Write { opcode: Opcode, iova: u64, length: u64 },
    Report { iova: u64, length: u64, page_size: u64 },
}

fn random(context: &Context<'_>) -> Result<()> {
    let pair = RefCell::new(LoggingPair::new(context, PAGES)?);
    pair.borrow().fixture().pin(0..PINNED)?;
    let config = Config { cases: SEQUENCES, failure_persistence: None, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[SEED; 32]);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let tried = runner.run(&vec(step(), 1..LENGTH), |steps| {
        let result = sequence(&mut pair.borrow_mut(), &steps);
        result.map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    match tried {
        Ok(()) => Ok(()),
        Err(TestError::Fail(why, steps)) => {
            Err(anyhow!("{why}\nafter these {} steps: {steps:x?}", steps.len()))
        }
        Err(TestError::Abort(why)) => Err(anyhow!("no sequences: {why}")),
    }
}

/// Takes these steps, on a device that doesn't log, and reads all of its log then.
fn sequence(pair: &mut LoggingPair, steps: &[Step]) -> Result<()> {
    pair.stop()?;
    for step in steps {
        match step {
            Step::Start { ranges, page_size } => pair.start(ranges, *page_size)?,
            Step::Stop => pair.stop()?,
            &Step::Write { opcode, iova, length } => {
                let outcome = pair.fixture().device().run(opcode as u32, iova, length, 1)?;
                pair.written(iova, length, outcome);
            }
            &Step::Report { iova, length, page_size } => pair.report(iova, length, page_size)?,
        }
    }
    pair.report_all()
}

fn step() -> impl Strategy<Value = Step> {
    let opcode = select(vec![Opcode::Write, Opcode::DmaWrite]);
    let report = (bytes(), select(vec![PAGE, PAGE, PAGE, 2 * PAGE, 16 * PAGE, 1 << 21, 2048]));
    prop_oneof![
        2 => start(),
        1 => Just(Step::Stop),
        6 => (opcode, bytes())
            .prop_map(|(opcode, (iova, length))| Step::Write { opcode, iova, length: length.max(1) }),
        6 => report.prop_map(|((iova, length), page_size)| Step::Report { iova, length, page_size }),
    ]
}

fn start() -> impl Strategy<Value = Step> {
    let ranges = prop_oneof![
        3 => Just(vec![(at(0, 0), PAGES * PAGE)]),
        3 => vec(pages(), 1..6),
        // Side by side, or with a gap, and not in order.
        3 => vec((0..3u64, 1..30u64), 1..8).prop_map(apart),
        1 => vec(bytes(), 0..3),
    ];
    (ranges, select(vec![PAGE, PAGE, PAGE, PAGE, 1, 16 * PAGE]))
        .prop_map(|(ranges, page_size)| Step::Start { ranges, page_size })
}

/// Ranges of so many pages, so many from each other.
fn apart(sizes: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut next = 0;
    let place = |(gap, size): (u64, u64)| {
        let first = next + gap;
        next = first + size;
        (at(first, 0), size * PAGE)
    };
    let mut ranges: Vec<_> = sizes.into_iter().map(place).collect();
    ranges.reverse();
    ranges
}

/// First byte and length of some pages, which may go beyond the memory.
fn pages() -> impl Strategy<Value = (u64, u64)> {
    (0..PAGES, 1..70u64).prop_map(|(first, count)| (at(first, 0), count * PAGE))
}

/// The same of pages, or of other bytes.
fn bytes() -> impl Strategy<Value = (u64, u64)> {
    let end: Range<u64> = 0..PAGE;
    prop_oneof![
        3 => pages(),
        2 => (pages(), end.clone(), end).prop_map(|((iova, length), first, last)| {
            (iova + first, length - last)
        }),
        1 => (0..PAGES, 0..PAGE, 0..20u64).prop_map(|(page, byte, length)| (at(page, byte), length)),
    ]
}
