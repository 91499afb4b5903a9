// SPDX-License-Identifier: GPL-2.0-only

//! Where the functions of a C file are, in the kernel's style: a name at the left margin, braces there,
//! too. gcov knows no function that was inlined everywhere.

use std::ops::RangeInclusive;

/// The functions that a file defines, and which lines they are.
pub fn functions(source: &str) -> Vec<(String, RangeInclusive<u32>)> {
    let mut found = Vec::new();
    // The function whose parameters, or whose body, we are in.
    let mut head: Option<(String, u32)> = None;
    let mut in_body = false;
    for (line, number) in source.lines().zip(1..) {
        if in_body {
            if line.starts_with('}') {
                found.extend(head.take().map(|(name, first)| (name, first..=number)));
                in_body = false;
            }
            continue;
        }
        if head.is_none() && line.starts_with(|c: char| c.is_ascii_alphabetic()) {
            head = name(line).map(|name| (name, number));
        }
        if head.is_some() {
            if line == "{" {
                in_body = true;
            } else if line.ends_with([';', '=']) || line.ends_with("= {") || line.is_empty() {
                head = None;
            }
        }
    }
    found
}

/// What is in front of the first parenthesis.
fn name(line: &str) -> Option<String> {
    let (front, _) = line.split_once('(')?;
    let name = front.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next()?;
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_found_and_declarations_are_not() {
        let source = "\
static int declared(struct a *a);
module_param_named(limit, limit,
\t\t   uint, 0644);
static const struct ops ops = {
\t.f = f,
};

static int one(int a,
\t       int b)
{
\tif (a) {
\t}
}
DEFINE_MUTEX(lock);
// c
int two(void)
{
}
";
        let found = functions(source);
        let names: Vec<_> = found.iter().map(|(name, at)| (name.as_str(), at.clone())).collect();
        assert_eq!(names, [("one", 8..=13), ("two", 16..=18)]);
    }
}
