// SPDX-License-Identifier: GPL-2.0-only

use crate::ending::Ending;
use anyhow::{Context as _, Result};
use events::{Event, layout::Reader};
use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread::sleep,
    time::Duration,
};

/// How often a stream is looked at.
const PERIOD: Duration = Duration::from_millis(50);

/// What there is to say when a stream goes on no more.
pub struct Followed {
    pub ending: Ending,
    /// What the test in progress did.
    pub rest: Vec<Event>,
    /// What could not be read to its end, and why.
    pub damage: Option<String>,
}

/// Hands the events on that a VM writes to the memory of `log`, until `ended` is there, or `stop` is
/// set.
pub fn follow(
    log: &Path,
    ended: &Path,
    stop: &AtomicBool,
    mut each: impl FnMut(Event) -> Result<()>,
) -> Result<Followed> {
    let what = || format!("read events from {}", log.display());
    let mut reader = Reader::open(log).with_context(what)?;
    let mut damage = None;
    loop {
        // First this: what is read afterwards is all there is.
        let ending = match stop.load(Relaxed) {
            true => Some(Ending::Stopped),
            false => Ending::read(ended)?,
        };
        if damage.is_none() {
            match reader.read() {
                Ok(events) => events.into_iter().try_for_each(&mut each)?,
                Err(error) => damage = Some(format!("{}: {error}", what())),
            }
        }
        let Some(ending) = ending else {
            sleep(PERIOD);
            continue;
        };
        let rest = match reader.rest() {
            Ok(rest) if damage.is_none() => rest,
            Ok(_) => Vec::new(),
            Err(error) => {
                damage.get_or_insert(format!("{}: {error}", what()));
                Vec::new()
            }
        };
        return Ok(Followed { ending, rest, damage });
    }
}
