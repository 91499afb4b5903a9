// SPDX-License-Identifier: GPL-2.0-only

//! What a test did, as a picture needs it: a row for each step, and what lasts from one row to another.

use events::{Begin, Call, Difference, Event, Kernel, Kind, Pass, Reply, Runs};

/// What happened in a test.
#[derive(Default)]
pub struct Story {
    /// What it is about.
    pub about: String,
    /// Its steps.
    pub rows: Vec<Row>,
    /// The passes of a migration.
    pub passes: Vec<Pass>,
    /// What the kernel logged meanwhile.
    pub messages: Vec<Kernel>,
    /// Files that were saved.
    pub saved: Vec<String>,
}

/// A step.
#[derive(Default)]
pub struct Row {
    /// The operation, if it is one.
    pub call: Option<Call>,
    /// In words.
    pub text: String,
    /// What the contract says, if that was recorded.
    pub model: Option<Reply>,
    /// What the kernel did, if that was.
    pub kernel: Option<Reply>,
    /// Dirty pages that were not reported.
    pub lost: Runs,
    /// Reported pages that are not dirty.
    pub spurious: Runs,
    /// The address of what else is wrong.
    pub at: Option<u64>,
    /// Kernel and contract differ here.
    pub differs: bool,
}

impl Row {
    /// The operation and its range.
    pub fn ranged(&self) -> Option<(&Call, (u64, u64))> {
        let call = self.call.as_ref()?;
        Some((call, call.range?))
    }

    /// The ranges whose pages it changes or says something of.
    pub fn places(&self) -> Vec<(u64, u64)> {
        let mut places = [self.lost.as_slice(), &self.spurious].concat();
        places.extend(self.at.map(|at| (at, at.saturating_add(1))));
        let replies = [&self.model, &self.kernel].into_iter().flatten();
        places.extend(replies.filter_map(|reply| reply.dirty.as_ref()).flatten());
        if let Some((Call { kind: Kind::Pin | Kind::Write, .. }, range)) = self.ranged() {
            places.push(self.done(range));
        }
        places
    }

    /// The part of `range` that the kernel has dealt with.
    pub fn done(&self, range: (u64, u64)) -> (u64, u64) {
        match &self.kernel {
            Some(reply) => (range.0, range.0.saturating_add(reply.count).min(range.1)),
            None => range,
        }
    }
}

/// What lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Mapping,
    /// Pins of the device in a slot.
    Pins(usize),
    Hidden,
}

/// Something that lasts, from the row where it begins to that where it ends, if it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub what: What,
    pub range: (u64, u64),
    pub from: usize,
    pub to: Option<usize>,
}

impl Story {
    /// Of a test that begins.
    pub fn new(begin: &Begin) -> Self {
        Self { about: begin.about.clone(), ..Self::default() }
    }

    /// Notices an event of it.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Sequence => self.rows.clear(),
            Event::Call(call) => {
                let (text, call) = (call.op.clone(), Some(call.clone()));
                self.rows.push(Row { call, text, ..Row::default() });
            }
            Event::Answer(answer) => {
                let of = |row: &&mut Row| row.call.as_ref().is_some_and(|c| c.n == answer.n);
                if let Some(row) = self.rows.iter_mut().rev().find(of) {
                    row.answer(&answer.model, &answer.kernel);
                }
            }
            Event::Difference(difference) => self.difference(difference),
            Event::Note { text } | Event::Progress { text } => {
                self.rows.push(Row { text: text.clone(), ..Row::default() });
            }
            Event::Pass(pass) => self.passes.push(pass.clone()),
            Event::Kernel(message) => self.messages.push(message.clone()),
            Event::Saved { file, .. } => self.saved.push(file.clone()),
            _ => {}
        }
    }

    fn difference(&mut self, difference: &Difference) {
        let Difference { what, lost, spurious, at } = difference.clone();
        self.rows.push(Row { text: what, lost, spurious, at, differs: true, ..Row::default() });
    }

    /// What lasts, in the order in which it began.
    pub fn spans(&self) -> Vec<Span> {
        let mut spans = Spans::default();
        for (i, row) in self.rows.iter().enumerate() {
            let Some(call) = &row.call else { continue };
            // What was in progress when all ended had no effect that is known.
            let last = i + 1 == self.rows.len();
            if row.kernel.as_ref().map_or(!last, |reply| reply.ok) {
                spans.apply(i, call);
            }
        }
        spans.all.sort_by_key(|span| span.from);
        spans.all
    }
}

impl Row {
    fn answer(&mut self, model: &Reply, kernel: &Reply) {
        if let (Some(dirty), Some(reported)) = (&model.dirty, &kernel.dirty) {
            self.lost = without(dirty, reported);
            self.spurious = without(reported, dirty);
        }
        self.differs = model != kernel;
        (self.model, self.kernel) = (Some(model.clone()), Some(kernel.clone()));
    }
}

#[derive(Default)]
struct Spans {
    all: Vec<Span>,
}

impl Spans {
    /// An operation has succeeded.
    fn apply(&mut self, row: usize, call: &Call) {
        let slot = call.device.unwrap_or(0);
        let everything = (0, u64::MAX);
        let Some(range) = call.range else {
            if call.kind == Kind::Release {
                self.end(row, everything, false, |what| what == What::Pins(slot));
            }
            return;
        };
        match call.kind {
            Kind::Map => self.begin(row, What::Mapping, range),
            Kind::Pin => self.begin(row, What::Pins(slot), range),
            Kind::Hide => self.begin(row, What::Hidden, range),
            Kind::Unmap => self.end(row, range, false, |_| true),
            Kind::Unpin => self.end(row, range, true, |what| what == What::Pins(slot)),
            Kind::Show => self.end(row, range, false, |what| what == What::Hidden),
            _ => {}
        }
    }

    fn begin(&mut self, from: usize, what: What, range: (u64, u64)) {
        self.all.push(Span { what, range, from, to: None });
    }

    /// Ends what there is in a range; if `once`, of several pins of a page the last one.
    fn end(&mut self, row: usize, range: (u64, u64), once: bool, of: impl Fn(What) -> bool) {
        let mut left = vec![range];
        for i in (0..self.all.len()).rev() {
            let span = self.all[i].clone();
            if span.to.is_some() || !of(span.what) {
                continue;
            }
            let ended = common(&left, span.range);
            if ended.is_empty() {
                continue;
            }
            let kept = without(&[span.range], &ended);
            self.all[i].range = ended[0];
            self.all[i].to = Some(row);
            let parts =
                ended[1..].iter().map(|&range| Span { range, to: Some(row), ..span.clone() });
            let kept = kept.iter().map(|&range| Span { range, ..span.clone() });
            let parts: Vec<_> = parts.chain(kept).collect();
            self.all.extend(parts);
            if once {
                left = without(&left, &ended);
            }
        }
    }
}

/// The parts of a range that are in runs.
fn common(runs: &[(u64, u64)], (start, end): (u64, u64)) -> Runs {
    let parts = runs.iter().map(|run| (run.0.max(start), run.1.min(end)));
    parts.filter(|(start, end)| start < end).collect()
}

/// Runs less others.
pub fn without(runs: &[(u64, u64)], others: &[(u64, u64)]) -> Runs {
    let mut left = runs.to_vec();
    for &(start, end) in others {
        let parts = left.iter().flat_map(|&run| {
            [(run.0, run.1.min(start.max(run.0))), (run.0.max(end.min(run.1)), run.1)]
        });
        left = parts.filter(|(start, end)| start < end).collect();
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_subtracted() {
        assert_eq!(without(&[(0, 10), (20, 30)], &[(2, 4), (25, 40)]), [(0, 2), (4, 10), (20, 25)]);
        assert_eq!(without(&[(0, 10)], &[(0, 10)]), []);
        assert_eq!(without(&[(5, 10)], &[(0, 5), (10, 20)]), [(5, 10)]);
        assert_eq!(without(&[(5, 10)], &[(0, 20)]), []);
    }

    #[test]
    fn pins_end_one_after_the_other() {
        let call = |kind, range| Call {
            n: 0,
            op: String::new(),
            kind,
            range: Some(range),
            thread: 1,
            device: Some(1),
            group: None,
        };
        let mut spans = Spans::default();
        spans.apply(0, &call(Kind::Map, (0, 8)));
        spans.apply(1, &call(Kind::Pin, (0, 4)));
        spans.apply(2, &call(Kind::Pin, (0, 4)));
        spans.apply(3, &call(Kind::Unpin, (1, 2)));
        spans.apply(4, &call(Kind::Unmap, (0, 8)));
        let pins = |range, from, to| Span { what: What::Pins(1), range, from, to: Some(to) };
        assert_eq!(spans.all.len(), 5);
        for pin in [pins((0, 4), 1, 4), pins((1, 2), 2, 3), pins((0, 1), 2, 4), pins((2, 4), 2, 4)]
        {
            assert!(spans.all.contains(&pin), "{pin:?} in {:?}", spans.all);
        }
        assert!(spans.all.iter().all(|span| span.to.is_some()));
    }
}
