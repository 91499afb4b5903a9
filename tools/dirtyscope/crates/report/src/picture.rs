// SPDX-License-Identifier: GPL-2.0-only

//! A picture of a test: IOVA across, steps down.
//!
//! Places across are in percent, so that it is as wide as there is room and nothing is distorted;
//! colours and hatching are the page's.

use crate::{
    scale::Scale,
    story::{Row, Span, What},
};
use events::Kind;
use std::{collections::BTreeSet, ops::Range};
use svg::node::element::{Group, Line, Rectangle, SVG, Text, Title};

/// Pixels of the axis, and of a row: the program beside it has the same.
pub const AXIS: usize = 34;
pub const ROW: usize = 24;

/// So much of what lasts is drawn, first what the rows deal with.
const SPANS: usize = 120;

/// Devices that are told apart.
const DEVICES: usize = 4;

/// What is drawn: some rows of a story, and what lasts of them.
pub struct Picture<'a> {
    rows: &'a [Row],
    shown: Range<usize>,
    spans: Vec<&'a Span>,
    scale: Scale,
    /// What lasts and isn't drawn.
    pub left_out: usize,
}

impl<'a> Picture<'a> {
    /// Of rows `shown`; if they are about IOVA.
    pub fn new(rows: &'a [Row], spans: &'a [Span], shown: Range<usize>) -> Option<Self> {
        let seen = &rows[shown.clone()];
        let dealt: Vec<_> = seen.iter().flat_map(Row::places).collect();
        let touches = |span: &&Span| dealt.iter().any(|d| d.0 < span.range.1 && span.range.0 < d.1);
        let lasts =
            |span: &&Span| span.from < shown.end && span.to.is_none_or(|to| to >= shown.start);
        let (important, others): (Vec<_>, Vec<_>) = spans.iter().filter(lasts).partition(touches);
        let count = important.len() + others.len();
        let mut spans: Vec<_> = important.into_iter().chain(others).take(SPANS).collect();
        spans.sort_by_key(|span| span.what != What::Mapping);
        let left_out = count - spans.len();

        let lasting = spans.iter().map(|span| span.range);
        let used: Vec<_> = lasting.chain(dealt).filter(|range| range.0 < range.1).collect();
        // All of IOVA needs no place of its own.
        let asked = seen.iter().filter_map(|row| Some(row.ranged()?.1));
        let others: Vec<_> = asked.filter(|range| range.1 - range.0 < u64::MAX).collect();
        Some(Self { rows, shown, spans, scale: Scale::new(&used, &others)?, left_out })
    }

    /// Draws it.
    pub fn draw(&self, label: &str) -> SVG {
        let height = AXIS + self.shown.len() * ROW;
        let mut svg = SVG::new()
            .set("width", "100%")
            .set("height", height)
            .set("role", "img")
            .set("aria-label", format!("{label}: IOVA across, steps down"))
            .add(self.bands())
            .add(self.axis());
        for (class, run) in self.guides() {
            svg = svg.add(self.block(run, AXIS, height - AXIS).set("class", class));
        }
        for span in &self.spans {
            svg = svg.add(self.span(span));
        }
        for i in self.shown.clone() {
            svg = svg.add(self.row(i));
        }
        svg
    }

    fn top(&self, row: usize) -> usize {
        AXIS + row.saturating_sub(self.shown.start) * ROW
    }

    /// A rectangle that has a range's width.
    fn block(&self, range: (u64, u64), y: usize, height: usize) -> Rectangle {
        let (start, end) = (self.scale.at(range.0), self.scale.at(range.1));
        Rectangle::new()
            .set("x", percent(start))
            .set("width", percent(end - start))
            .set("y", y)
            .set("height", height)
    }

    fn bands(&self) -> Group {
        self.shown.clone().fold(Group::new(), |group, i| {
            let class = if self.rows[i].differs { "band differs" } else { "band" };
            let band = Rectangle::new().set("width", "100%").set("y", self.top(i));
            group.add(band.set("height", ROW).set("class", class).set("data-row", i))
        })
    }

    /// Where pages are wrong, to be seen in all rows.
    fn guides(&self) -> BTreeSet<(&'static str, (u64, u64))> {
        let rows = self.rows[self.shown.clone()].iter();
        let runs = rows.flat_map(|row| {
            let lost = row.lost.iter().map(|&run| ("guide lost", run));
            lost.chain(row.spurious.iter().map(|&run| ("guide spurious", run)))
        });
        runs.collect()
    }

    fn axis(&self) -> Group {
        let mut group = Group::new().set("class", "axis");
        let height = self.shown.len() * ROW;
        for &gap in self.scale.gaps() {
            let text = format!("{} bytes that nothing uses are left out", bytes(gap.1 - gap.0));
            let block = self.block(gap, AXIS, height).set("class", "gap").add(Title::new(text));
            group = group.add(block);
        }
        let wrong = self.guides().into_iter().map(|(_, run)| run.0);
        let first: Vec<_> = wrong.chain(self.spans.iter().map(|span| span.range.0)).collect();
        for (number, (iova, at)) in self.scale.ticks(&first, 5).into_iter().enumerate() {
            let (anchor, shift) = match at {
                ..15.0 => ("start", 2),
                85.0.. => ("end", -2),
                _ => ("middle", 0),
            };
            let line = Line::new().set("x1", percent(at)).set("x2", percent(at));
            let text = Text::new(format!("{iova:#x}")).set("x", percent(at)).set("dx", shift);
            let text = text.set("text-anchor", anchor).set("y", AXIS - 12);
            let class = if number % 2 == 0 { "tick" } else { "tick minor" };
            let tick = Group::new().set("class", class);
            group =
                group.add(tick.add(line.set("y1", AXIS - 8).set("y2", AXIS + height)).add(text));
        }
        group
    }

    fn span(&self, span: &Span) -> Rectangle {
        let (inset, class, what) = match span.what {
            What::Mapping => (2, "mapping".into(), "mapping".into()),
            What::Pins(slot) => {
                (5, format!("pins d{}", slot % DEVICES), format!("pins of device {slot}"))
            }
            What::Hidden => (3, "hidden".into(), "hidden from the process".into()),
        };
        let top = if span.from < self.shown.start { AXIS } else { self.top(span.from) + inset };
        let last = span.to.unwrap_or(self.shown.end).min(self.shown.end);
        // It is there until its last row has done its work, and goes on if none ends it.
        let bottom = match span.to {
            Some(to) if to < self.shown.end => self.top(to) + ROW / 2,
            _ => self.top(last),
        };
        let (start, end) = span.range;
        let text = format!("{what} {start:#x}-{:#x}, {}", end - 1, bytes(end - start));
        let height = bottom.saturating_sub(top).max(4);
        self.block(span.range, top, height).set("class", class).add(Title::new(text))
    }

    /// What a row does.
    fn row(&self, i: usize) -> Group {
        let row = &self.rows[i];
        let mut group = Group::new().set("data-row", i).add(Title::new(tell(row)));
        let y = self.top(i);
        let mark =
            |range, class: &str| self.block(range, y + 7, ROW - 14).set("class", class.to_owned());
        if let Some((call, range)) = row.ranged().filter(|(_, range)| range.0 < range.1) {
            let device = format!("d{}", call.device.unwrap_or(0) % DEVICES);
            let ok = row.kernel.as_ref().is_none_or(|reply| reply.ok);
            match call.kind {
                Kind::Write => {
                    let done = row.done(range);
                    group = group.add(mark(range, "asked"));
                    if done.0 < done.1 {
                        group = group.add(mark(done, &format!("write {device}")));
                    }
                }
                Kind::Pin | Kind::Unpin if ok => {
                    group = group.add(mark(range, &format!("pinning {device}")))
                }
                Kind::Map | Kind::Hide | Kind::Show if ok => {}
                _ if ok => group = group.add(mark(range, "read")),
                _ => group = group.add(mark(range, "asked")),
            }
            let dirty = row.kernel.as_ref().and_then(|reply| reply.dirty.as_ref());
            for &run in dirty.into_iter().flatten() {
                group = group.add(mark(run, "dirty"));
            }
        }
        for (runs, class, sign) in [(&row.lost, "lost", "×"), (&row.spurious, "spurious", "+")] {
            for &run in runs {
                group = group
                    .add(self.block(run, y + 3, ROW - 6).set("class", format!("wrong {class}")));
                let middle = (self.scale.at(run.0) + self.scale.at(run.1)) / 2.0;
                let text = Text::new(sign).set("x", percent(middle)).set("y", y + ROW - 7);
                group = group.add(text.set("class", format!("sign {class}")));
            }
        }
        if let Some(at) = row.at {
            let text = Text::new("!").set("x", percent(self.scale.at(at))).set("y", y + ROW - 7);
            group = group.add(text.set("class", "sign lost"));
        }
        group
    }
}

/// All there is to say of a row, in lines.
pub fn tell(row: &Row) -> String {
    let mut lines = vec![row.text.clone()];
    // Of what nobody has done, there is what the contract says.
    let done = row.call.as_ref().is_some_and(|call| call.thread != 0);
    if let Some(call) = &row.call {
        let thread = done.then(|| format!("thread {}", call.thread));
        let device = call.device.map(|device| format!("device {device}"));
        let group = call.group.map(|group| format!("group {group}"));
        let who: Vec<_> = [thread, device, group].into_iter().flatten().collect();
        lines.extend((!who.is_empty()).then(|| who.join(", ")));
    }
    let kernel = row.kernel.as_ref().filter(|_| done);
    for (side, reply) in [("kernel", kernel), ("contract", row.model.as_ref())] {
        lines.extend(reply.map(|reply| format!("{side}: {}", reply.text)));
    }
    for (what, runs) in [("lost", &row.lost), ("spurious", &row.spurious)] {
        if !runs.is_empty() {
            let runs: Vec<_> =
                runs.iter().take(8).map(|r| format!("{:#x}-{:#x}", r.0, r.1 - 1)).collect();
            lines.push(format!("{what}: {}", runs.join(" ")));
        }
    }
    lines.join("\n")
}

fn percent(at: f64) -> String {
    format!("{at:.2}%")
}

/// A size as people say it.
fn bytes(size: u64) -> String {
    const UNITS: [(u64, &str); 4] =
        [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.iter().find(|(unit, _)| size >= *unit) {
        Some((unit, name)) if size % unit == 0 => format!("{} {name}", size / unit),
        Some((unit, name)) => format!("{:.1} {name}", size as f64 / *unit as f64),
        None => format!("{size} B"),
    }
}
