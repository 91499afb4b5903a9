// SPDX-License-Identifier: GPL-2.0-only

//! What KCOV says: which of the places that the compiler marked were run.

use crate::lines::{Count, Function};
use anyhow::{Context as _, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// A line of a driver, or a part of it, and the basic block that it is in.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// The block: `MODULE SECTION OFFSET`, as KCOV's are written.
    pub block: String,
    /// From the root of the kernel tree on.
    pub file: String,
    pub line: u32,
}

/// Bytes of the operand of the call that marks a block. Where it is, the linker has to know; KCOV says
/// where the call returns.
const OPERAND: u64 = 4;

/// Reads places: for each section, a line `= MODULE SECTION`, lines `: INSTRUCTION OPERAND` (of each
/// instruction, the operand of the call that marks its block), and what `addr2line -a -f -i` says of
/// the instructions. Of functions that are inlined in each other, the innermost in `below` has it: what
/// it calls of the kernel crate belongs to its line.
pub fn places(text: &str, below: &[String]) -> Result<Vec<Place>> {
    let (mut places, mut section, mut block) = (Vec::new(), "", None);
    let mut operands = HashMap::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("= ") {
            section = name;
            operands.clear();
        } else if let Some(pair) = line.strip_prefix(": ") {
            let (instruction, operand) = pair.split_once(' ').context("not a pair")?;
            operands.insert(hexadecimal(instruction)?, hexadecimal(operand)?);
        } else if let Some(address) = line.strip_prefix("0x") {
            let operand = operands.get(&hexadecimal(address)?);
            block = operand.map(|operand| format!("{section} {:#x}", operand + OPERAND));
        } else {
            let location = lines.next().context("addr2line: a function without a line")?;
            let Some((file, number)) = location.split_once(':') else { continue };
            let file = normal(file);
            let Some(file) = below.iter().find_map(|b| file.find(b.as_str()).map(|i| &file[i..]))
            else {
                continue;
            };
            let number = number.split(' ').next().and_then(|n| n.parse().ok());
            let (Some(line_number), Some(block)) = (number, block.take()) else { continue };
            // What bindgen has made is nobody's.
            if !file.ends_with("/bindings_generated.rs") && line_number > 0 {
                places.push(Place { block, file: file.to_owned(), line: line_number });
            }
        }
    }
    Ok(places)
}

fn hexadecimal(text: &str) -> Result<u64> {
    u64::from_str_radix(text, 16).with_context(|| format!("not an address: {text}"))
}

/// The functions that these places are in, by the text of files. What a line's branches are to gcov,
/// its blocks are here, of all its copies; a line was run if one of them was.
pub fn functions(
    places: &[Place],
    run: &HashSet<&str>,
    mut text_of: impl FnMut(&str) -> Vec<String>,
) -> Vec<Function> {
    let mut files = BTreeMap::<&str, BTreeMap<u32, BTreeSet<&str>>>::new();
    for Place { block, file, line } in places {
        files.entry(file).or_default().entry(*line).or_default().insert(block);
    }
    let mut found = BTreeMap::<(&str, String), BTreeMap<u32, Count>>::new();
    for (file, lines) in files {
        let text = text_of(file);
        let text: Vec<_> = text.iter().map(String::as_str).collect();
        for (line, blocks) in lines {
            let Some(name) = function_of(&text, line) else { continue };
            let times: Vec<_> = blocks.iter().map(|block| u64::from(run.contains(block))).collect();
            let count = Count { times: times.iter().sum(), branches: times };
            found.entry((file, name.to_owned())).or_default().insert(line, count);
        }
    }
    let function =
        |((file, name), lines): ((&str, _), _)| Function { file: file.to_owned(), name, lines };
    found.into_iter().map(function).collect()
}

/// Without `x/..`.
fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        if part == ".." && parts.last().is_some_and(|last| *last != "..") {
            parts.pop();
        } else if part != "." {
            parts.push(part);
        }
    }
    parts.join("/")
}

/// The function that a line of Rust is in, or nothing if it is a head, or closes what others opened:
/// a function that is inlined has none of these.
fn function_of<'a>(source: &[&'a str], line: u32) -> Option<&'a str> {
    let at = line as usize - 1;
    let text = source.get(at)?.trim();
    if head(text).is_some() || text.chars().all(|c| " {}()[],;?".contains(c)) {
        return None;
    }
    Some(source[..at].iter().rev().find_map(|line| head(line.trim())).unwrap_or("module"))
}

/// The name of the function that begins in a line.
fn head(line: &str) -> Option<&str> {
    let (front, name) = line.split_once("fn ")?;
    let words = ["pub", "pub(crate)", "pub(super)", "const", "unsafe", "extern", "\"C\""];
    let is_head = front.split_whitespace().all(|word| words.contains(&word));
    is_head.then(|| name.split(['(', '<']).next()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
= rust_mdev_dma .text
: 18 1c
: 1b 1c
: 22 2c
0x0000000000000018
core::ptr::read::<u8>
/usr/lib/core/ptr.rs:7
<rust_mdev_dma::device::Engine as rust_mdev_dma::abstractions::vfio::Ops<fn() -> u8>>::write::{closure#0}
/kernel/src/samples/rust_vfio_edu/../rust_mdev_dma/device/engine.rs:4 (discriminator 3)
<rust_mdev_dma::device::Engine>::outer
/kernel/src/samples/rust_mdev_dma/device/engine.rs:5
0x000000000000001b
rust_mdev_dma::Engine::outer
/kernel/src/samples/rust_mdev_dma/device/engine.rs:6
0x0000000000000022
core::fmt::write
/usr/lib/core/fmt.rs:9
= rust_mdev_dma .init.text
: 0 0
0x0000000000000000
rust_mdev_dma::init
/kernel/src/samples/rust_mdev_dma/rust_mdev_dma.rs:3
";

    #[test]
    fn a_place_belongs_to_the_innermost_line_of_the_driver() {
        let below = ["samples/rust_mdev_dma/".to_owned()];
        let all = places(TEXT, &below).unwrap();
        let place = |block: &str, file: &str, line| Place {
            block: block.to_owned(),
            file: format!("samples/rust_mdev_dma/{file}"),
            line,
        };
        let first = place("rust_mdev_dma .text 0x20", "device/engine.rs", 4);
        let second = place("rust_mdev_dma .text 0x20", "device/engine.rs", 6);
        let last = place("rust_mdev_dma .init.text 0x4", "rust_mdev_dma.rs", 3);
        assert_eq!(all, [first, second, last]);

        let text =
            "impl A {\n    pub(crate) fn one<T>(\n    ) {\n        a();\n    }\n    fn_two();\n";
        let text_of = |_: &str| text.lines().map(str::to_owned).collect();
        let found =
            functions(&all, &["rust_mdev_dma .text 0x20", "vfio .text 0x4"].into(), text_of);
        let count = |times| Count { times, branches: vec![times] };
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "one");
        assert_eq!(found[0].lines, [(4, count(1)), (6, count(1))].into());
    }
}
