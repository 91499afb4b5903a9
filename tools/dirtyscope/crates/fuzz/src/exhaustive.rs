// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope scope`: everything in a small universe, all sequences of some length and every pair of
//! steps from every state.

use crate::{
    Job,
    search::Search,
    triggers::TRIGGERS,
    universe::{State, Universe},
};
use anyhow::{Result, bail};
use events::Sink;
use harness::{Engine, Message, Output, stop_on_signals, worker};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::PathBuf,
    process::ExitCode,
};
use testbed::{Op, slots};
use uuid::Uuid;

/// What --length is by default.
const LENGTH: usize = 4;

/// What --depth is by default.
const DEPTH: usize = 6;

/// The most steps of a program that does pairs.
const STEPS_MAX: usize = 100;

/// Try everything that decides which pages are dirty, in a small universe
///
/// In a container with two mappings of two pages and a mediated device, groups with an IOMMU join,
/// are promoted, and leave; pages are pinned, written, mapped and unmapped, tracked and read. All
/// sequences of LENGTH such steps are tried, and every pair of them from every state that DEPTH steps
/// lead to. A sequence that fails is shortened, shown, and saved as a file for "dirtyscope fuzz --replay".
///
/// Needs what "dirtyscope verify" needs, an IOMMU, and two of QEMU's edu in groups of their own. With
/// the driver rust_vfio_edu, groups are promoted, too. Prints KTAP version 1.
#[derive(clap::Args)]
pub struct Arguments {
    /// An existing mediated device to use; without it, one is created and removed at the end
    #[arg(long, value_name = "UUID")]
    device: Option<Uuid>,

    /// The directory to save sequences in that fail
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    save: PathBuf,

    /// Steps of the sequences that are all tried
    #[arg(long, value_name = "LENGTH", default_value_t = LENGTH)]
    length: usize,

    /// The most steps to a state from which all pairs are tried
    #[arg(long, value_name = "DEPTH", default_value_t = DEPTH)]
    depth: usize,

    #[command(flatten)]
    output: Output,
}

/// Runs the command. `print` gets what happens.
pub fn run(arguments: &Arguments, print: Sink) -> Result<ExitCode> {
    let &Arguments { device, ref save, length, depth, ref output } = arguments;
    let Some((job, log)) = worker::job::<Job>()? else {
        let engine = Engine { name: "scope", output, save, counts: ("", "") };
        return engine.run(&[Job::Sequences, Job::Pairs], print);
    };
    let universe = Universe::new(slots::can_promote());
    let (programs, what) = match job {
        Job::Sequences => {
            let all = sequences(&universe, length);
            let what =
                format!("{} sequences of {length} of {} steps", all.len(), universe.steps.len());
            (all, what)
        }
        Job::Pairs => {
            let (all, count) = pairs(&universe, depth);
            let near = universe.depth.iter().filter(|&&least| least <= depth).count();
            let states = universe.next.len();
            (all, format!("{count} pairs of steps from {near} of {states} states"))
        }
        Job::Seed(_) | Job::Replay(_) => bail!("this is no job of the exhaustive search"),
    };
    let longest = programs.iter().map(Vec::len).max().unwrap_or_default();
    let avoided = TRIGGERS.iter().collect();
    let mut search = Search::new(device, avoided, longest, stop_on_signals()?, log)?;
    let found = search.all(&programs, &what)?;
    worker::send(&found.unwrap_or(Message::Passed))?;
    Ok(ExitCode::SUCCESS)
}

/// All sequences of so many steps, up to exchange of the groups: a group with an IOMMU is the second
/// one only after the first one.
pub fn sequences(universe: &Universe, length: usize) -> Vec<Vec<Op>> {
    let mut all = Vec::new();
    let mut steps = Vec::new();
    extend(universe, 0, length, &mut steps, &mut all);
    all
}

fn extend(
    universe: &Universe,
    state: State,
    length: usize,
    steps: &mut Vec<usize>,
    all: &mut Vec<Vec<Op>>,
) {
    if steps.len() == length {
        all.push(universe.program(steps));
        return;
    }
    for (step, next) in universe.from(state).collect::<Vec<_>>() {
        let first = || steps.iter().any(|&step| universe.steps[step].group == Some(0));
        if universe.steps[step].group != Some(1) || first() {
            steps.push(step);
            extend(universe, next, length, steps, all);
            steps.pop();
        }
    }
}

/// Every pair of steps from every state that so many steps lead to, read after each pair if dirty pages
/// are tracked then; and how many pairs there are. Programs do many pairs, on their way from state to
/// state.
pub fn pairs(universe: &Universe, depth: usize) -> (Vec<Vec<Op>>, usize) {
    let mut left = BTreeMap::new();
    for state in (0..universe.next.len()).filter(|&state| universe.depth[state] <= depth) {
        let pairs = universe.from(state).flat_map(|(first, between)| {
            universe.from(between).map(move |(second, _)| (first, second))
        });
        left.insert(state, pairs.collect::<BTreeSet<_>>());
    }
    let count = left.values().map(BTreeSet::len).sum();
    let mut programs = Vec::new();
    while !left.is_empty() {
        let mut steps = Vec::new();
        let mut state = 0;
        while let Some(way) = way(universe, state, &left) {
            let begun = !steps.is_empty();
            if begun && steps.len() + way.len() + 3 > STEPS_MAX {
                break;
            }
            for step in way {
                state = take(universe, state, step, &mut steps);
            }
            if let Some((first, second)) = next_pair(&mut left, state) {
                state = take(universe, state, first, &mut steps);
                state = take(universe, state, second, &mut steps);
            }
            if universe.next[state][universe.read].is_some() {
                state = take(universe, state, universe.read, &mut steps);
            }
        }
        programs.push(universe.program(&steps));
    }
    (programs, count)
}

/// Takes a pair that is left in a state.
fn next_pair(
    left: &mut BTreeMap<State, BTreeSet<(usize, usize)>>,
    state: State,
) -> Option<(usize, usize)> {
    let pairs = left.get_mut(&state)?;
    let pair = pairs.pop_first();
    if pairs.is_empty() {
        left.remove(&state);
    }
    pair
}

fn take(universe: &Universe, state: State, step: usize, steps: &mut Vec<usize>) -> State {
    steps.push(step);
    universe.next[state][step].expect("a step that can be done")
}

/// The shortest way to a state that has pairs left.
fn way<T>(universe: &Universe, from: State, left: &BTreeMap<State, T>) -> Option<Vec<usize>> {
    let mut came = BTreeMap::from([(from, None)]);
    let mut ahead = VecDeque::from([from]);
    while let Some(state) = ahead.pop_front() {
        if left.contains_key(&state) {
            let mut way = Vec::new();
            let mut at = state;
            while let Some((before, step)) = came[&at] {
                way.push(step);
                at = before;
            }
            way.reverse();
            return Some(way);
        }
        for (step, next) in universe.from(state) {
            came.entry(next).or_insert_with(|| {
                ahead.push_back(next);
                Some((state, step))
            });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use testbed::{limits_of, program};

    /// Fails unless the contract has all operations of a program succeed.
    fn succeeds(program: &[Op]) {
        let mut contract = program::contract(u32::MAX, limits_of(u64::MAX, u64::MAX));
        for op in program {
            assert!(contract.allows(op), "{op} in {}", program::text(program));
            let status = contract.apply(op).answer.status;
            assert_eq!(status, Ok(()), "{op} in {}", program::text(program));
        }
    }

    #[test]
    fn all_of_it_can_be_done_and_is_as_much_as_the_documentation_says() {
        for (promotion, steps, states, near, count, sequences_count) in
            [(false, 12, 84, 72, 4080, 1092), (true, 14, 216, 179, 13924, 1301)]
        {
            let universe = Universe::new(promotion);
            assert_eq!((universe.steps.len(), universe.next.len()), (steps, states));
            assert_eq!(universe.depth.iter().filter(|&&least| least <= DEPTH).count(), near);
            let sequences = sequences(&universe, LENGTH);
            assert_eq!(sequences.len(), sequences_count);
            let (programs, pairs) = pairs(&universe, DEPTH);
            assert_eq!(pairs, count);
            for program in sequences.iter().chain(&programs) {
                succeeds(program);
            }
        }
    }
}
