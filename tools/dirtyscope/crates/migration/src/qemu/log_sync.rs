// SPDX-License-Identifier: GPL-2.0-only

//! How often QEMU asks who wrote what, against how much is written. What is checked is the memory, as in any
//! other case; what is measured depends on the host, and is printed.

use super::QemuVmm;
use crate::{
    cases::{DMA_RW, MachineCase},
    pair::MachinePair,
    runner::case,
    vmm::Machine as _,
};
use anyhow::Result;
use mdev_dma::PAGE;
use std::{
    fmt::Write as _,
    ops::Range,
    thread,
    time::{Duration, Instant},
};

/// This case.
pub const CASES: &[MachineCase<QemuVmm>] =
    &[case("qemu/log-sync", "how often QEMU asks for dirty pages, against their rate", log_sync)];

/// What is written: 16 MiB.
const PAGES: Range<u64> = 0x80_0000 / PAGE..0x180_0000 / PAGE;

/// So many pages a second the generator is told to write: it doesn't run, or goes as fast as it can.
const RATES: [(Option<u32>, &str); 5] = [
    (None, "none"),
    (Some(1000), "1000"),
    (Some(4000), "4000"),
    (Some(16000), "16000"),
    (Some(0), "any"),
];

/// So many MiB a second QEMU may send: any number, and what is soon less than what is written.
const LIMITS: [(u64, &str); 2] = [(0, "any"), (16, "16")];

/// How long is measured, and then until QEMU asks again.
const MEASURED: Duration = Duration::from_secs(2);

fn log_sync(pair: &mut MachinePair<'_, QemuVmm>) -> Result<()> {
    pair.start(1)?;
    pair.begin()?;
    // All memory is sent.
    pair.passes(2)?;
    let mut table = String::from("MiB/s sent   pages/s written    syncs/s  pages sent\n");
    table += "most   seen    told      seen              a sync";
    for (limit, most) in LIMITS {
        pair.here().monitor().limit_bandwidth(limit << 20)?;
        for (rate, told) in RATES {
            pair.stop()?;
            if let Some(rate) = rate {
                pair.generate(0, PAGES, DMA_RW, rate)?;
            }
            let Measured { sent, written, syncs, pages } = measure(pair)?;
            write!(table, "\n{most:>4} {sent:>6.1} {told:>7} {written:>9.0}")?;
            write!(table, " {syncs:>10.1} {pages:>11.1}")?;
        }
    }
    pair.say(table)?;
    pair.complete().map(drop)
}

/// What goes on in a second.
struct Measured {
    /// MiB that QEMU has sent.
    sent: f64,
    /// Pages that were written.
    written: f64,
    /// How often QEMU has asked who wrote what.
    syncs: f64,
    /// Pages that it has sent each time.
    pages: f64,
}

/// Measures from one time at which QEMU asks until another.
fn measure(pair: &mut MachinePair<'_, QemuVmm>) -> Result<Measured> {
    let sample = |pair: &mut MachinePair<'_, QemuVmm>| -> Result<_> {
        pair.more_passes(1)?;
        let (at, migration) = (Instant::now(), pair.here().migration()?);
        let written = pair.here().device(0).generator()?.counter;
        Ok((at, written, migration.passes, migration.sent))
    };
    let (begin, written, passes, sent) = sample(pair)?;
    thread::sleep(MEASURED);
    let (end, more_written, more_passes, more_sent) = sample(pair)?;
    let (seconds, syncs) = ((end - begin).as_secs_f64(), (more_passes - passes) as f64);
    let sent = (more_sent - sent) as f64;
    Ok(Measured {
        sent: sent / seconds / f64::from(1 << 20),
        written: (more_written - written) as f64 / seconds,
        syncs: syncs / seconds,
        pages: sent / PAGE as f64 / syncs,
    })
}
