// SPDX-License-Identifier: GPL-2.0-only

//! The passes of a migration, as bars.

use events::Pass;
use maud::{Markup, html};

/// What each pass sent and what was left, against the most that either is.
pub fn bars(passes: &[Pass]) -> Markup {
    let mut before = 0;
    let rows: Vec<_> = passes
        .iter()
        .map(|pass| {
            let sent = pass.sent.saturating_sub(std::mem::replace(&mut before, pass.sent));
            (pass.number, sent, pass.remaining)
        })
        .collect();
    let most = rows.iter().map(|row| row.1.max(row.2)).max().unwrap_or(0).max(1);
    let width = |bytes: u64| format!("width:{:.1}%", bytes as f64 / most as f64 * 100.0);
    html! {
        @if !rows.is_empty() {
            table.passes {
                caption { "Passes: bytes sent in each, and dirty ones that remained" }
                thead { tr { th scope="col" { "pass" } th scope="col" { "sent" } th scope="col" { "remained" } } }
                tbody {
                    @for (number, sent, remaining) in &rows {
                        tr {
                            th scope="row" { (number) }
                            td { span.bar.sent style=(width(*sent)) {} span.size { (kib(*sent)) } }
                            td { span.bar.remaining style=(width(*remaining)) {} span.size { (kib(*remaining)) } }
                        }
                    }
                }
            }
        }
    }
}

fn kib(bytes: u64) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}
