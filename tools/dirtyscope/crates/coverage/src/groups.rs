// SPDX-License-Identifier: GPL-2.0-only

//! What is to be covered, and why lines are not: the two files that people write.

use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeMap;

/// Functions of one file, or all below a directory (a path that ends with `/`).
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    pub name: String,
    /// Percent of lines that must be run, with a reason for each that is not; nothing if this is only
    /// reported.
    pub goal: Option<u32>,
    pub path: String,
    /// If there are none, all that no other group names.
    pub functions: Vec<String>,
}

/// Reads lines `GROUP GOAL PATH`, where GOAL is `-` if there is none; indented lines that follow have
/// names of functions.
pub fn groups(text: &str) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let words = line.split_whitespace().map(str::to_owned);
        if line.starts_with(char::is_whitespace) {
            groups.last_mut().context("functions without a file")?.functions.extend(words);
            continue;
        }
        let words: Vec<_> = words.collect();
        let [name, goal, path] = &words[..] else { anyhow::bail!("not GROUP GOAL PATH: {line}") };
        let goal = if goal == "-" { None } else { Some(goal.parse().context(line.to_owned())?) };
        let (name, path) = (name.clone(), path.clone());
        groups.push(Group { name, goal, path, functions: Vec::new() });
    }
    Ok(groups)
}

/// Why lines need not be run: by function and text of a line. The text `*` is all of a function.
#[derive(Default)]
pub struct Reasons(BTreeMap<(String, String), String>);

impl Reasons {
    /// Reads reasons, lines that begin with `= `, and the lines they are for, indented:
    /// `FUNCTION: TEXT`.
    pub fn read(text: &str) -> Result<Self> {
        let (mut reasons, mut reason) = (BTreeMap::new(), "");
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            if let Some(text) = line.strip_prefix("= ") {
                reason = text;
                continue;
            }
            let (function, text) = line
                .trim()
                .split_once(": ")
                .with_context(|| format!("not FUNCTION: TEXT: {line}"))?;
            ensure!(!reason.is_empty(), "no reason for {line}");
            reasons.insert((function.to_owned(), text.trim().to_owned()), reason.to_owned());
        }
        Ok(Self(reasons))
    }

    pub fn of(&self, function: &str, text: &str) -> Option<&str> {
        let get = |text: &str| self.0.get(&(function.to_owned(), text.to_owned()));
        get(text).or_else(|| get("*")).map(String::as_str)
    }

    /// Those for lines that there are not among these.
    pub fn without(&self, lines: &[(String, String)]) -> Vec<String> {
        let there = |function: &str, text: &str| {
            lines.iter().any(|(f, t)| f == function && (t == text || text == "*"))
        };
        let left = self.0.keys().filter(|(function, text)| !there(function, text));
        left.map(|(function, text)| format!("{function}: {text}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_functions_or_all() {
        let text = "# SPDX\ntype1 95 a/b.c\n\tone two\n\tthree\n\ncore - c/\n";
        let read = groups(text).unwrap();
        let goals: Vec<_> = read.iter().map(|group| group.goal).collect();
        assert_eq!(goals, [Some(95), None]);
        assert_eq!(read[0].functions, ["one", "two", "three"]);
        assert_eq!((read[1].path.as_str(), read[1].functions.len()), ("c/", 0));
        assert!(groups("type1 95\n").is_err());
        assert!(groups("\tone\n").is_err());
    }

    #[test]
    fn a_reason_is_for_one_line_or_a_function() {
        let text = "# why\n= no memory\n\tone: return -ENOMEM;\n= never called\n\ttwo: *\n";
        let reasons = Reasons::read(text).unwrap();
        assert_eq!(reasons.of("one", "return -ENOMEM;"), Some("no memory"));
        assert_eq!(reasons.of("one", "return 0;"), None);
        assert_eq!(reasons.of("two", "return 0;"), Some("never called"));
        let missing = [("two".to_owned(), "return 0;".to_owned())];
        assert_eq!(reasons.without(&missing), ["one: return -ENOMEM;"]);
        assert!(Reasons::read("\tone: x\n").is_err());
    }
}
