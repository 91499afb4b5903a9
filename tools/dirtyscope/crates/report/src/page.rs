// SPDX-License-Identifier: GPL-2.0-only

//! A run as a page: one file, which needs no network.

use crate::{
    legend::legend,
    passes,
    picture::{Picture, tell},
    story::{Row, Story},
    totals::Totals,
};
use events::{Event, Run, TestResult, Verdict};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use std::ops::Range;

/// Bytes that a page has at most, less what is behind the last test.
const SIZE: usize = 950_000;

/// Steps that are shown of a test: the first ones, and the last ones.
const FIRST: usize = 20;
const LAST: usize = 100;

/// Gathers what a page shows.
#[derive(Default)]
pub struct Page {
    name: Option<String>,
    run: Option<Run>,
    test: Story,
    totals: Totals,
    /// Whether tests that passed are shown, too.
    whole: bool,
    /// Tests that are shown, and what they did.
    failed: Vec<(TestResult, Story)>,
    others: Vec<(TestResult, Story)>,
}

impl Page {
    /// Of a run that has this name, if not that of what is run.
    pub fn new(name: Option<&str>) -> Self {
        Self { name: name.map(str::to_owned), ..Self::default() }
    }

    /// Of events that are shown whether tests passed or not.
    pub fn whole() -> Self {
        Self { whole: true, ..Self::default() }
    }

    /// Notices an event.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Run(run) => self.run = Some(run.clone()),
            Event::Begin(begin) => self.test = Story::new(begin),
            Event::Result(result) => {
                self.totals.add(result);
                let story = std::mem::take(&mut self.test);
                match result.verdict {
                    Verdict::Fail { .. } => self.failed.push((result.clone(), story)),
                    Verdict::Known { .. } => self.others.push((result.clone(), story)),
                    _ if self.whole => self.others.push((result.clone(), story)),
                    _ => {}
                }
            }
            _ => self.test.event(event),
        }
    }

    /// The page.
    pub fn to_html(&self) -> String {
        let engine = self.run.as_ref().map_or("none", |run| &run.engine);
        let title = self.name.as_deref().unwrap_or(engine);
        let planned = self.run.as_ref().map_or(0, |run| run.planned);
        let missing = planned.saturating_sub(self.totals.count());
        let mut size = 0;
        let mut sections = Vec::new();
        let mut left_out = Vec::new();
        for (result, story) in self.failed.iter().chain(&self.others) {
            let section = test(sections.len(), result, story).into_string();
            if size + section.len() > SIZE {
                left_out.push(&result.name);
                continue;
            }
            size += section.len();
            sections.push((result, section));
        }
        let index = html! {
            @for (i, (result, _)) in sections.iter().enumerate() {
                li { a href=(format!("#t{i}")) { (result.name) } " " (badge(&result.verdict)) }
            }
            @for name in &left_out {
                li { (name) " (left out: the page would be too large; events.jsonl has it)" }
            }
        };
        let content = html! {
            h1 { "dirtyscope " (title) }
            @if let Some(run) = &self.run { (describe(run)) }
            @if !(self.whole && self.failed.is_empty()) { (self.counts(missing)) }
            @if !sections.is_empty() { ul.index { (index) } (legend()) }
            @else if missing == 0 && self.failed.is_empty() { p { "Nothing failed, so there is nothing to see." } }
            @for (_, section) in &sections { (PreEscaped(section)) }
            @if !self.totals.skipped.is_empty() {
                section { h2 { "Skipped" } ul { @for name in &self.totals.skipped { li { (name) } } } }
            }
        };
        document(&format!("dirtyscope {title}"), &content)
    }

    fn counts(&self, missing: usize) -> Markup {
        let Totals { pass, failed, known, skipped } = &self.totals;
        let parts = [
            (*pass, "passed"),
            (failed.len(), "failed"),
            (missing, "without a result"),
            (known.len(), "known"),
            (skipped.len(), "skipped"),
        ];
        html! {
            p.counts {
                @for (count, what) in parts.iter().filter(|(count, what)| *count > 0 || *what == "failed") {
                    span { b { (count) } " " (what) }
                }
            }
        }
    }
}

/// A file of its own with this in it.
pub fn document(title: &str, content: &Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) }
                style { (PreEscaped(include_str!("page.css"))) }
            }
            body {
                main { (content) }
                script { (PreEscaped(include_str!("page.js"))) }
            }
        }
    }
    .into_string()
}

fn describe(run: &Run) -> Markup {
    html! {
        p.run {
            @if !run.kernel.is_empty() { "Linux " (run.kernel) ", " }
            code { "dirtyscope " (run.arguments.join(" ")) }
        }
        @if let Some(why) = &run.skip { p { "Skipped: " (why) } }
    }
}

fn badge(verdict: &Verdict) -> Markup {
    html! {
        @match verdict {
            Verdict::Fail { .. } => span.badge.fail { "× failed" },
            Verdict::Known { defect, .. } => span.badge.known { "known " (defect) },
            Verdict::Pass => {},
            Verdict::Skip { .. } => span.badge { "skipped" },
        }
    }
}

/// A test, and what it did.
fn test(number: usize, result: &TestResult, story: &Story) -> Markup {
    let why = match &result.verdict {
        Verdict::Fail { why } | Verdict::Known { why, .. } | Verdict::Skip { why } => {
            why.trim_end()
        }
        Verdict::Pass => "",
    };
    let spans = story.spans();
    html! {
        section id=(format!("t{number}")) {
            h2 { (result.name) " " (badge(&result.verdict)) }
            @if !story.about.is_empty() { p { (story.about) } }
            @if !why.is_empty() { pre.why { (why) } }
            @for file in &story.saved { p { "Saved as " code { (file) } "." } }
            (passes::bars(&story.passes))
            @for shown in windows(story.rows.len()) {
                @if shown.start > 0 {
                    p.note { (shown.start - FIRST) " steps are not shown." }
                }
                @let picture = Picture::new(&story.rows, &spans, shown.clone());
                @if let Some(left_out) = picture.as_ref().map(|p| p.left_out).filter(|&n| n > 0) {
                    p.note { (left_out) " mappings or pins are not drawn." }
                }
                div.chart.plain[picture.is_none()] {
                    @if let Some(picture) = &picture {
                        div.picture { (PreEscaped(picture.draw(&result.name).to_string())) }
                    }
                    ol.program { @for i in shown.clone() { (step(i, &story.rows[i])) } }
                }
            }
            @if !story.messages.is_empty() {
                details {
                    summary { "What the kernel logged" }
                    pre { @for message in story.messages.iter().take(200) { (format!("[{:12.6}] {}\n", message.seconds, message.text)) } }
                }
            }
        }
    }
}

/// Which of so many rows are shown.
fn windows(rows: usize) -> Vec<Range<usize>> {
    match rows {
        0 => Vec::new(),
        rows if rows <= FIRST + LAST => vec![0..rows],
        rows => vec![0..FIRST, rows - LAST..rows],
    }
}

/// A row beside the picture.
fn step(i: usize, row: &Row) -> Markup {
    let (class, number) = match &row.call {
        _ if row.differs => ("differs", row.call.as_ref().map(|call| call.n)),
        Some(call) => ("", Some(call.n)),
        None => ("said", None),
    };
    html! {
        li class=(class) data-row=(i) tabindex="0" {
            span.n { @if let Some(n) = number { (n) } }
            span.op { (row.text) @if let Some(reply) = &row.kernel { " → " (reply.text) } }
            pre.more role="tooltip" { (tell(row)) }
        }
    }
}
