// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's console, which has what nobody in the VM could record any more.

use events::is_complaint;
use std::collections::HashMap;

/// Lines shown from a complaint on.
const LINES: usize = 40;

/// Lines shown of the end of a console without one.
const TAIL: usize = 20;

/// What a console says, line by line, without colours and times.
pub struct Console(Vec<String>);

impl Console {
    /// Takes what was read from a serial port.
    pub fn new(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        Self(text.lines().map(clean).collect())
    }

    /// The first complaint that isn't among those that were recorded, and what follows it.
    pub fn unrecorded(&self, recorded: &[String]) -> Option<String> {
        let mut left = HashMap::<&str, usize>::new();
        // Where a message has several lines, the console shows them as such.
        for line in recorded.iter().flat_map(|text| text.split("\\x0a")) {
            *left.entry(line.trim()).or_default() += 1;
        }
        let unknown = |line: &String| {
            is_complaint(line)
                && match left.get_mut(line.trim()) {
                    Some(count @ 1..) => {
                        *count -= 1;
                        false
                    }
                    _ => true,
                }
        };
        let first = self.0.iter().position(unknown)?;
        Some(self.show(first, LINES))
    }

    /// The end of it.
    pub fn tail(&self) -> String {
        self.show(self.0.len().saturating_sub(TAIL), TAIL)
    }

    fn show(&self, from: usize, count: usize) -> String {
        let lines = self.0.iter().skip(from).take(count);
        lines.map(|line| format!("  {}", line.trim_end())).collect::<Vec<_>>().join("\n")
    }
}

/// A line without the sequences that move a cursor or set a colour, control characters, and the
/// `[   12.345678]` that begins it.
fn clean(line: &str) -> String {
    let mut text = String::new();
    let mut chars = line.chars().peekable();
    while let Some(char) = chars.next() {
        if char == '\x1b' && chars.next_if_eq(&'[').is_some() {
            while chars.next_if(|c| !c.is_ascii_alphabetic()).is_some() {}
            chars.next();
        } else if !char.is_control() || char == '\t' {
            text.push(char);
        }
    }
    let mut rest = text.as_str();
    // With CONFIG_PRINTK_CALLER, the task or CPU follows in another pair.
    while let Some((inside, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        let number = inside.trim_start().trim_start_matches(['T', 'C']);
        if number.is_empty() || !number.chars().all(|c| c.is_ascii_digit() || c == '.') {
            break;
        }
        rest = after.strip_prefix(' ').unwrap_or(after);
    }
    rest.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_recorded() {
        assert_eq!(clean("[   12.345678] BUG: it\r"), "BUG: it");
        assert_eq!(clean("[    1.000000][   T17]  [<addr>] f+0x1"), " [<addr>] f+0x1");
        assert_eq!(clean("\x1b[2J\x1b[01;31mred\x1b[0m [x]"), "red [x]");
        assert_eq!(clean("[drm] ready"), "[drm] ready");
    }

    #[test]
    fn complaints_are_counted() {
        let console = Console::new(
            b"[ 1.0] vfio: fine\r\n[ 2.0] UBSAN: shift\r\n[ 2.0] more\r\n[ 3.0] UBSAN: shift\r\n[ 3.0] end\r\n",
        );
        let ubsan = || "UBSAN: shift".to_owned();
        assert_eq!(console.unrecorded(&[ubsan(), ubsan()]), None);
        let found = console.unrecorded(&[ubsan()]).unwrap();
        assert_eq!(found, "  UBSAN: shift\n  end");
        assert!(console.unrecorded(&[]).unwrap().starts_with("  UBSAN: shift\n  more\n"));
        assert!(console.tail().ends_with("  end"));
    }
}
