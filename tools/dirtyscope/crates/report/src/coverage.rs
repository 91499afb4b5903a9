// SPDX-License-Identifier: GPL-2.0-only

//! Which lines of the kernel were run, as `dirtyscope coverage` has found.

use crate::page::document;
use maud::{Markup, html};
use serde::Deserialize;

/// What is shown of it: groups of functions.
#[derive(Deserialize)]
pub struct Coverage(Vec<Group>);

#[derive(Deserialize)]
struct Group {
    name: String,
    /// Percent of lines that must be run.
    goal: Option<u32>,
    lines: Share,
    branches: Share,
    functions: Vec<Function>,
    missing: Vec<Missing>,
}

#[derive(Deserialize)]
struct Function {
    file: String,
    name: String,
    lines: Share,
    branches: Share,
}

/// A line that was not run.
#[derive(Deserialize)]
struct Missing {
    file: String,
    line: u32,
    function: String,
    text: String,
    reason: Option<String>,
}

/// So many of so many.
#[derive(Clone, Copy, Deserialize)]
struct Share(u32, u32);

impl Share {
    fn percent(self) -> f64 {
        if self.1 == 0 { 100.0 } else { f64::from(self.0) * 100.0 / f64::from(self.1) }
    }
}

/// A page with a table of all groups, and of each its functions and the lines that were not run.
pub fn page(coverage: &Coverage, name: Option<&str>) -> String {
    let title = format!("dirtyscope {}", name.unwrap_or("coverage"));
    let content = html! {
        h1 { (title) }
        p.note { "Branches are basic blocks where the code is in Rust." }
        table.coverage {
            thead { tr { th { "What" } th { "lines" } th { "branches" } th { "goal" } } }
            @for group in &coverage.0 {
                tr {
                    td { a href=(format!("#{}", group.name)) { (group.name) } }
                    (share(group.lines, group.goal))
                    (share(group.branches, None))
                    td.share { @if let Some(goal) = group.goal { (goal) " %" } }
                }
            }
        }
        @for group in &coverage.0 { (details(group)) }
    };
    document(&title, &content)
}

fn details(group: &Group) -> Markup {
    html! {
        section id=(group.name) {
            h2 { (group.name) }
            table.coverage {
                thead { tr { th { "Function" } th { "lines" } th { "branches" } th { "file" } } }
                @for function in &group.functions {
                    tr {
                        td { code { (function.name) } }
                        (share(function.lines, None))
                        (share(function.branches, None))
                        td { (function.file) }
                    }
                }
            }
            @if !group.missing.is_empty() {
                details {
                    summary { (group.missing.len()) " lines were not run" }
                    table.coverage {
                        thead { tr { th { "Where" } th { "line" } th { "why" } } }
                        @for line in &group.missing { (missing(line, group.goal.is_some())) }
                    }
                }
            }
        }
    }
}

/// A line that was not run; where there is a goal, there has to be a reason.
fn missing(line: &Missing, wanted: bool) -> Markup {
    html! {
        tr {
            td { (line.file) ":" (line.line) " " code { (line.function) } }
            td { code { (line.text) } }
            td {
                @if let Some(reason) = &line.reason { (reason) }
                @else if wanted { span.short { "no reason is given" } }
            }
        }
    }
}

/// A cell, which shows it if the goal is missed.
fn share(share: Share, goal: Option<u32>) -> Markup {
    let text = format!("{}/{} {:.1} %", share.0, share.1, share.percent());
    let short = goal.is_some_and(|goal| share.percent() < f64::from(goal));
    html! {
        td.share { @if short { span.short { (text) } } @else { (text) } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"[{"name": "type1", "goal": 95, "lines": [1, 2], "branches": [0, 0],
        "functions": [{"file": "a/b.c", "name": "f", "lines": [1, 2], "branches": [0, 0]}],
        "missing": [{"file": "a/b.c", "line": 7, "function": "f", "text": "a < b;", "reason": null}]}]"#;

    #[test]
    fn what_misses_its_goal_or_a_reason_is_seen() {
        let page = page(&serde_json::from_str(TEXT).unwrap(), None);
        assert!(page.contains(r#"<span class="short">1/2 50.0 %</span>"#));
        assert!(page.contains(r#"<td class="share">0/0 100.0 %</td>"#));
        assert!(page.contains("a &lt; b;"));
        assert!(page.contains("no reason is given"));
    }

    #[test]
    fn what_reaches_its_goal_is_not_marked() {
        let text = TEXT.replace("95", "50").replace("null", "\"why\"");
        let page = page(&serde_json::from_str(&text).unwrap(), None);
        assert!(!page.contains(r#"class="short""#));
    }
}
