// SPDX-License-Identifier: GPL-2.0-only

//! What `gcov --json-format` says.

use crate::lines::{Count, Lines};
use anyhow::Result;
use serde::Deserialize;

#[derive(Deserialize)]
struct Report {
    files: Vec<File>,
}

#[derive(Deserialize)]
struct File {
    file: String,
    lines: Vec<Line>,
}

#[derive(Deserialize)]
struct Line {
    line_number: u32,
    count: u64,
    #[serde(default)]
    branches: Vec<Branch>,
}

#[derive(Deserialize)]
struct Branch {
    count: u64,
}

/// Adds one object's counts, of one boot.
pub fn add(lines: &mut Lines, json: &str) -> Result<()> {
    let report: Report = serde_json::from_str(json)?;
    for File { file, lines: of_file } in report.files {
        // A line of which several functions have a copy is there several times.
        let mut counts = std::collections::BTreeMap::<u32, Count>::new();
        for Line { line_number, count, branches } in of_file {
            let sum = counts.entry(line_number).or_default();
            sum.times += count;
            sum.branches.extend(branches.iter().map(|branch| branch.count));
        }
        for (line, count) in counts {
            lines.add(&file, line, count);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_boots_and_of_copies_add_up() {
        let boot = |first: u64, second: u64| {
            format!(
                r#"{{"gcc_version": "14", "files": [{{"file": "drivers/vfio/x.c", "functions": [],
                "lines": [
                  {{"line_number": 7, "function_name": "f", "count": {first}, "unexecuted_block": true,
                   "branches": [{{"count": {first}, "throw": false, "fallthrough": true}},
                                {{"count": 0, "throw": false, "fallthrough": false}}]}},
                  {{"line_number": 7, "function_name": "g", "count": {second}, "branches": []}},
                  {{"line_number": 8, "function_name": "g", "count": 0}}]}}]}}"#
            )
        };
        let mut lines = Lines::default();
        add(&mut lines, &boot(1, 2)).unwrap();
        add(&mut lines, &boot(10, 0)).unwrap();
        let of = lines.of("drivers/vfio/x.c");
        assert_eq!(of[&7], Count { times: 13, branches: vec![11, 0] });
        assert_eq!(of[&8], Count { times: 0, branches: vec![] });
        assert!(add(&mut lines, r#"{"files": 1}"#).is_err());
    }
}
