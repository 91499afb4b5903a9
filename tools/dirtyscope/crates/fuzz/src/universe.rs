// SPDX-License-Identifier: GPL-2.0-only

//! A universe that is small enough to try everything in it: two mappings of two pages, a group without
//! an IOMMU, two groups with one, and what has to do with what is dirty because of them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
};
use testbed::{
    Answer, Contract, Op, PAGE, command, limits_of, map, pages, program,
    slots::{EDU, PINNING},
};
use vfio_client::Leave;

/// The pages of its mappings: bitmaps of both begin with a word, so that no known defect gets between.
const MAPPINGS: [Range<u64>; 2] = [0..2, 64..66];

/// Both mappings, and what is between them.
const SPAN: u64 = 66 * PAGE;

/// What may happen, by one or several operations.
pub struct Step {
    pub name: String,
    pub ops: Vec<Op>,
    /// The group with an IOMMU that it is about.
    pub group: Option<usize>,
}

/// A state of the model, by number.
pub type State = usize;

/// All states that steps lead to, the first of which is where it begins.
pub struct Universe {
    pub steps: Vec<Step>,
    /// The operations before it begins.
    pub begin: Vec<Op>,
    /// Reads everything.
    pub read: usize,
    /// For each state, where each step leads, if it can be done.
    pub next: Vec<Vec<Option<State>>>,
    /// For each state, the least number of steps to it.
    pub depth: Vec<usize>,
}

impl Universe {
    /// With groups that can be promoted, or without.
    pub fn new(promotion: bool) -> Self {
        let steps = steps(promotion);
        let begin = MAPPINGS.map(map_step).to_vec();
        let mut contract = program::contract(u32::MAX, limits_of(u64::MAX, u64::MAX));
        for op in &begin {
            contract.apply(op);
        }
        let read = steps.iter().position(|step| step.name == READ).unwrap_or_default();
        let mut this = Self { steps, begin, read, next: Vec::new(), depth: vec![0] };
        let mut numbers = BTreeMap::from([(key(&contract), 0)]);
        let mut ahead = VecDeque::from([contract]);
        while let Some(contract) = ahead.pop_front() {
            let depth = this.depth[this.next.len()] + 1;
            let lead = this.steps.iter().map(|step| after(&contract, step)).map(|after| {
                let after = after?;
                let new = numbers.len();
                let state = *numbers.entry(key(&after)).or_insert(new);
                if state == new {
                    ahead.push_back(after);
                    this.depth.push(depth);
                }
                Some(state)
            });
            let lead = lead.collect();
            this.next.push(lead);
        }
        this
    }

    /// The steps that can be done in a state, and where they lead.
    pub fn from(&self, state: State) -> impl Iterator<Item = (usize, State)> {
        let next = self.next[state].iter().enumerate();
        next.filter_map(|(step, &next)| Some((step, next?)))
    }

    /// The program that does these steps.
    pub fn program(&self, steps: &[usize]) -> Vec<Op> {
        let steps = steps.iter().flat_map(|&step| &self.steps[step].ops);
        self.begin.iter().chain(steps).cloned().collect()
    }
}

const READ: &str = "READ";

fn steps(promotion: bool) -> Vec<Step> {
    let step = |name: &str, op| Step { name: name.into(), ops: vec![op], group: None };
    let buffer = |pages: Range<u64>| (pages.end - pages.start) * PAGE;
    let at = |page| testbed::at(page, 0);
    let [_, b] = MAPPINGS;
    let mut steps = vec![
        step("START", Op::Start),
        step("STOP", Op::Stop),
        step(READ, Op::get_bitmap(at(0), SPAN)),
        step("MAP", map_step(b.clone())),
        step("UNMAP", Op::unmap_bitmap(at(b.start), buffer(b))),
        step("PIN", command(0, mdev_dma::Opcode::Pin, pages(1..2))),
        step("UNPIN", command(0, mdev_dma::Opcode::Unpin, pages(1..2))),
        step("WRITE", command(0, mdev_dma::Opcode::DmaWrite, pages(64..65))),
    ];
    for (group, slot) in if promotion { PINNING } else { EDU }.into_iter().enumerate() {
        let mut of_group = |name: &str, ops| {
            steps.push(Step { name: format!("{name} {group}"), ops, group: Some(group) });
        };
        of_group("JOIN", vec![Op::Join { device: slot }]);
        of_group("LEAVE", vec![Op::Leave { device: slot, by: Leave::Unset }]);
        if promotion {
            let pin = command(slot, mdev_dma::Opcode::Pin, pages(0..1));
            of_group("PROMOTE", vec![Op::Open { device: slot }, pin, Op::Close { device: slot }]);
        }
    }
    steps
}

fn map_step(pages: Range<u64>) -> Op {
    map(pages, dirty_model::Protection::READ_WRITE)
}

/// What is owed after a step, if it can be done: pages that are pinned aren't pinned again.
fn after(contract: &Contract, step: &Step) -> Option<Contract> {
    let mut contract = contract.clone();
    for op in &step.ops {
        let again = step.name == "PIN" && contract.has_pins_in(testbed::at(1, 0), PAGE);
        if again || !contract.allows(op) {
            return None;
        }
        let Answer { status, .. } = contract.apply(op).answer;
        status.ok()?;
    }
    Some(contract)
}

/// What tells states apart.
fn key(contract: &Contract) -> String {
    let model = &contract.model;
    let mappings: Vec<_> = model.mappings().map(|m| (m.iova, m.dirty.map(|d| d.runs()))).collect();
    let pinned: BTreeSet<_> =
        contract.device(0).into_iter().flat_map(|device| model.pinned(device)).collect();
    let groups: Vec<_> = model.groups().collect();
    format!("{} {mappings:?} {pinned:?} {groups:?}", model.tracking())
}
