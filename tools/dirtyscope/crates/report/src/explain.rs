// SPDX-License-Identifier: GPL-2.0-only

//! What led to a failure, in lines.

use events::{Call, Difference, Event};
use std::collections::VecDeque;

/// Steps shown of what led to a failure.
const STEPS: usize = 40;

/// What is known of the test in progress.
#[derive(Default)]
pub struct Test {
    steps: VecDeque<Step>,
    /// Steps that are forgotten.
    skipped: usize,
    difference: Option<Difference>,
}

struct Step {
    call: Option<Call>,
    text: String,
}

impl Test {
    /// Notices an event of it. It begins anew with a test, and with a sequence.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Begin(_) | Event::Sequence => *self = Self::default(),
            Event::Difference(difference) => self.difference = Some(difference.clone()),
            Event::Call(call) => {
                let text = format!("{} ...", call.op);
                self.push(Step { call: Some(call.clone()), text });
            }
            Event::Answer(answer) => {
                let of = |step: &&mut Step| step.call.as_ref().is_some_and(|c| c.n == answer.n);
                if let Some(step) = self.steps.iter_mut().rev().find(of) {
                    let op = step.call.as_ref().map_or("", |call| &call.op);
                    step.text = format!("{op} -> {}", answer.kernel.text);
                }
            }
            Event::Note { text } => self.push(Step { call: None, text: text.clone() }),
            _ => {}
        }
    }

    fn push(&mut self, step: Step) {
        self.steps.push_back(step);
        if self.steps.len() > STEPS {
            self.steps.pop_front();
            self.skipped += 1;
        }
    }

    /// Why it ended as it did, and the steps that led there. Those that deal with the first page that
    /// is wrong are marked.
    pub fn explain(&self, why: &str) -> String {
        let mut lines: Vec<_> = why.lines().map(str::to_owned).collect();
        let first = self.difference.as_ref().and_then(first_wrong);
        if let Some(first) = first {
            lines.push(format!("first wrong: {first:#x}; steps that deal with it are marked *"));
        }
        if self.skipped > 0 {
            lines.push(format!("       ({} steps before)", self.skipped));
        }
        for (number, step) in (self.skipped + 1..).zip(&self.steps) {
            let deals = first.is_some_and(|first| step.deals_with(first));
            let mark = if deals { '*' } else { ' ' };
            lines.push(format!("{mark} {number:4}  {}", step.text));
        }
        lines.join("\n")
    }
}

impl Step {
    fn deals_with(&self, iova: u64) -> bool {
        let range = self.call.as_ref().and_then(|call| call.range);
        range.is_some_and(|(start, end)| start <= iova && iova < end)
    }
}

/// The lowest IOVA that is wrong.
fn first_wrong(difference: &Difference) -> Option<u64> {
    let runs = difference.lost.iter().chain(&difference.spurious);
    runs.map(|run| run.0).chain(difference.at).min()
}
