// SPDX-License-Identifier: GPL-2.0-only

use anyhow::{Result, ensure};
use std::io::{self, Write};
use uuid::Uuid;

/// Which tests are run, and on which device.
#[derive(clap::Args)]
pub struct Selection {
    /// An existing mediated device to use; more are created as needed, and removed at the end
    #[arg(long, value_name = "UUID")]
    pub device: Option<Uuid>,

    /// List the tests that would be run, and end
    #[arg(long)]
    pub list: bool,

    /// Run tests whose name contains this, or matches it if it has * or ?; may be given again
    #[arg(long, value_name = "PATTERN")]
    pub filter: Vec<String>,
}

impl Selection {
    /// The selected ones of `all`, which have a name and say what they are about. None if they were
    /// only to be listed, which is done then.
    pub fn of<T>(
        &self,
        all: impl IntoIterator<Item = T>,
        describe: impl Fn(&T) -> (&str, &str),
    ) -> Result<Option<Vec<T>>> {
        let selected = select(all, |one| describe(one).0, &self.filter)?;
        if !self.list {
            return Ok(Some(selected));
        }
        let mut out = io::stdout().lock();
        for one in &selected {
            let (name, about) = describe(one);
            writeln!(out, "{name:<44} {about}")?;
        }
        Ok(None)
    }
}

/// Those of `all` whose name contains one of the patterns, or matches it if it has `*` or `?`; all of
/// them if there are no patterns. Fails if that leaves none.
pub fn select<T>(
    all: impl IntoIterator<Item = T>,
    name: impl Fn(&T) -> &str,
    patterns: &[String],
) -> Result<Vec<T>> {
    let mut selected: Vec<_> = all.into_iter().collect();
    if !patterns.is_empty() {
        let patterns = patterns.iter().map(|p| {
            // A pattern without wildcards is one with wildcards around it.
            let bare = !p.contains(['*', '?', '[']);
            glob::Pattern::new(&if bare { format!("*{p}*") } else { p.clone() })
        });
        let patterns = patterns.collect::<Result<Vec<_>, _>>()?;
        selected.retain(|one| patterns.iter().any(|p| p.matches(name(one))));
        ensure!(!selected.is_empty(), "--filter selects nothing; --list shows all names");
    }
    Ok(selected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let all = ["a/one", "a/two", "b/one"];
        let select = |patterns: &[&str]| {
            let patterns: Vec<_> = patterns.iter().map(|p| String::from(*p)).collect();
            select(all, |name| name, &patterns).ok()
        };
        assert_eq!(select(&[]).unwrap(), all);
        assert_eq!(select(&["a/"]).unwrap(), ["a/one", "a/two"]);
        assert_eq!(select(&["two", "b/*"]).unwrap(), ["a/two", "b/one"]);
        assert_eq!(select(&["one*"]), None);
    }
}
