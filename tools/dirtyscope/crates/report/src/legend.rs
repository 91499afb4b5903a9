// SPDX-License-Identifier: GPL-2.0-only

//! What is what in the pictures, and the hatching that all of them use.

use maud::{Markup, html};

/// Classes of a rectangle, the sign on it, and what it means.
const ENTRIES: &[(&str, &str, &str)] = &[
    ("mapping", "", "mapping, from MAP to UNMAP"),
    ("pins d0", "", "pinned by device 0"),
    ("pins d1", "", "by device 1"),
    ("write d0", "", "written by device 0"),
    ("write d1", "", "by device 1"),
    ("asked", "", "asked for, and not done"),
    ("hidden", "", "hidden from the process"),
    ("read", "", "read"),
    ("dirty", "", "reported dirty"),
    ("wrong lost", "×", "lost: written, not reported"),
    ("wrong spurious", "+", "spurious: reported, not dirty"),
    ("gap", "", "IOVA left out"),
];

/// The legend of a page. Widths in pictures grow with the square root of sizes.
pub fn legend() -> Markup {
    html! {
        div.legend {
            (patterns())
            ul {
                @for (class, sign, text) in ENTRIES {
                    li {
                        svg width="26" height="16" aria-hidden="true" {
                            rect x="1" y="1" width="24" height="14" class=(class) {}
                            @if !sign.is_empty() {
                                text x="13" y="12" class=(format!("sign {}", class.trim_start_matches("wrong "))) { (sign) }
                            }
                        }
                        " " (text)
                    }
                }
            }
            p.note { "IOVA goes across, not to scale: widths grow with the square root of sizes. Time goes down, a step each." }
        }
    }
}

/// Hatching, so that nothing is told by colour alone.
fn patterns() -> Markup {
    let lines = [
        ("h-d0", "M0 6 6 0M-1 1 1 -1M5 7 7 5"),
        ("h-d1", "M0 0 6 6M-1 5 1 7M5 -1 7 1"),
        ("h-d2", "M0 3H6"),
        ("h-d3", "M3 0V6"),
        ("h-hidden", "M0 0 6 6M0 6 6 0"),
        ("h-gap", "M3 2V4"),
    ];
    html! {
        svg.patterns width="0" height="0" aria-hidden="true" {
            defs {
                @for (id, path) in lines {
                    pattern id=(id) width="6" height="6" patternUnits="userSpaceOnUse" { path d=(path) {} }
                }
            }
        }
    }
}
