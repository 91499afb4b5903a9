// SPDX-License-Identifier: GPL-2.0-only

//! Groups of functions as text, and what is wrong with them.

use crate::{
    groups::{Group, Reasons},
    lines::{Function, Share},
};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// A line that was not run.
pub struct Missing<'a> {
    pub function: &'a Function,
    pub line: u32,
    pub text: String,
    pub reason: Option<&'a str>,
}

/// A group, its functions and their missing lines.
pub struct Part<'a> {
    pub group: &'a Group,
    pub functions: &'a [Function],
    pub missing: Vec<Missing<'a>>,
}

impl<'a> Part<'a> {
    /// `text_of` has the lines of a file.
    pub fn new(
        group: &'a Group,
        functions: &'a [Function],
        reasons: &'a Reasons,
        mut text_of: impl FnMut(&str) -> Vec<String>,
    ) -> Self {
        let mut missing = Vec::new();
        for function in functions {
            let text = text_of(&function.file);
            for (&line, _) in function.lines.iter().filter(|(_, count)| count.times == 0) {
                let text = text.get(line as usize - 1).map_or("", |line| line.trim()).to_owned();
                let reason = reasons.of(&function.name, &text);
                missing.push(Missing { function, line, text, reason });
            }
        }
        Self { group, functions, missing }
    }

    pub fn lines(&self) -> Share {
        self.functions.iter().map(Function::run).sum()
    }

    /// What is wrong, if anything.
    pub fn complaints(&self) -> Vec<String> {
        let Group { name, goal, .. } = self.group;
        let Some(goal) = goal else { return Vec::new() };
        let mut complaints = Vec::new();
        if self.lines().percent() < f64::from(*goal) {
            complaints.push(format!(
                "{name}: {:.1} % of lines, less than {goal} %",
                self.lines().percent()
            ));
        }
        for missing in self.missing.iter().filter(|missing| missing.reason.is_none()) {
            let Missing { function: Function { file, name, .. }, line, text, .. } = missing;
            complaints
                .push(format!("{file}:{line}: {name}: {text}: not run, and no reason is given"));
        }
        complaints
    }

    fn branches(&self) -> Share {
        self.functions.iter().map(Function::branches).sum()
    }

    /// All of it, for programs.
    pub fn json(&self) -> Value {
        let functions = self.functions.iter().map(|function| {
            let (lines, branches) = (function.run(), function.branches());
            json!({ "file": function.file, "name": function.name, "lines": lines, "branches": branches })
        });
        let missing = self.missing.iter().map(|missing| {
            let Missing { function: Function { file, name, .. }, line, text, reason } = missing;
            json!({ "file": file, "line": line, "function": name, "text": text, "reason": reason })
        });
        json!({
            "name": self.group.name,
            "goal": self.group.goal,
            "lines": self.lines(),
            "branches": self.branches(),
            "functions": functions.collect::<Vec<_>>(),
            "missing": missing.collect::<Vec<_>>(),
        })
    }

    pub fn text(&self) -> String {
        let Group { name, goal, .. } = self.group;
        let branches = self.branches();
        let goal = goal.map_or(String::new(), |goal| format!(", of which {goal} % is the goal"));
        let mut out = format!("{name}\n  {}  {branches}  all{goal}\n", self.lines());
        for function in self.functions {
            let file = function.file.rsplit('/').next().unwrap_or_default();
            let (lines, branches) = (function.run(), function.branches());
            let _ = writeln!(out, "  {lines}  {branches}  {file} {}", function.name);
        }
        out
    }

    pub fn missing_text(&self) -> String {
        let mut out = String::new();
        for Missing { function: Function { file, name, .. }, line, text, reason } in &self.missing {
            let _ = writeln!(out, "  {file}:{line} {name}: {text}");
            let _ = writeln!(out, "      {}", reason.unwrap_or("no reason is given"));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lines::Count;

    fn part<'a>(group: &'a Group, functions: &'a [Function], reasons: &'a Reasons) -> Part<'a> {
        Part::new(group, functions, reasons, |_| vec!["\tone;".to_owned(), "\ttwo;".to_owned()])
    }

    #[test]
    fn a_line_without_a_reason_and_a_goal_that_is_missed_are_wrong() {
        let group =
            |goal| Group { name: "g".into(), goal, path: "a/b.c".into(), functions: vec![] };
        let count = |times| Count { times, branches: vec![times, 0] };
        let lines = [(1, count(3)), (2, count(0))].into();
        let functions = [Function { file: "a/b.c".into(), name: "f".into(), lines }];
        let (none, one) = (Reasons::default(), Reasons::read("= why\n f: two;\n").unwrap());
        assert!(part(&group(None), &functions, &none).complaints().is_empty());
        assert!(part(&group(Some(50)), &functions, &one).complaints().is_empty());
        assert_eq!(
            part(&group(Some(51)), &functions, &none).complaints(),
            [
                "g: 50.0 % of lines, less than 51 %",
                "a/b.c:2: f: two;: not run, and no reason is given"
            ]
        );
        assert!(
            part(&group(None), &functions, &none)
                .text()
                .contains("1/2     50.0 %     1/4     25.0 %  b.c f")
        );
    }
}
