// SPDX-License-Identifier: GPL-2.0-only

use crate::new_uuid;
use anyhow::Result;
use std::time::Duration;

/// From where, and how far, a search by chance goes.
#[derive(clap::Args)]
pub struct Amount {
    /// Where to begin; the same seed gives the same operations. May be given again
    #[arg(long, value_name = "NUMBER")]
    seed: Vec<u64>,

    /// Operations to do for a seed [default: no limit]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    ops: Option<u64>,

    /// Seconds to go on for a seed [default: 60, no limit with --ops]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
}

impl Amount {
    /// The seeds, or a random one.
    pub fn seeds(&self) -> Result<Vec<u64>> {
        if self.seed.is_empty() { Ok(vec![new_seed()?]) } else { Ok(self.seed.clone()) }
    }

    /// How many operations to do for a seed.
    pub fn ops(&self) -> u64 {
        self.ops.unwrap_or(u64::MAX)
    }

    /// How long to go on for a seed, if there is a limit.
    pub fn limit(&self) -> Option<Duration> {
        let seconds = self.seconds.or(self.ops.is_none().then_some(60));
        seconds.map(Duration::from_secs)
    }
}

/// A random seed, small enough to be typed.
pub fn new_seed() -> Result<u64> {
    Ok((new_uuid()?.as_u128() as u32).into())
}
