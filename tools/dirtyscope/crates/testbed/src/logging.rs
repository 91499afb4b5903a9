// SPDX-License-Identifier: GPL-2.0-only

//! A device that keeps a log of what it writes.

use crate::{PAGE, at, fixture::Fixture, same};
use anyhow::{Result, ensure};
use dirty_model::Bitmap;
use harness::{Context, Skip};
use mdev_dma::sysfs::{Mdev, MdevType};
use std::ops::Range;

/// A device that logs, removed when dropped.
pub struct Logging {
    fixture: Option<Fixture>,
    mdev: Mdev,
    pages: u64,
}

impl Logging {
    /// Whether the driver has devices that log, which it has if the kernel can report a log.
    pub fn is_offered() -> Result<bool> {
        Ok(log_type()?.is_some())
    }

    /// With so many pages, which are mapped; skips the scenario if there can't be one.
    pub fn new(context: &Context<'_>, pages: u64) -> Result<Self> {
        let Some(log_type) = log_type()? else {
            return Err(Skip("this kernel can't serve DMA logging".into()).into());
        };
        let mdev = log_type.create(context.new_uuid()?)?;
        let mut this = Self { fixture: None, mdev, pages };
        let fixture = this.fixture.insert(Fixture::on(mdev, pages)?);
        fixture.map(0..pages)?;
        Ok(this)
    }

    pub fn fixture(&self) -> &Fixture {
        self.fixture.as_ref().expect("it is open")
    }

    /// Logs what is written to these ranges of IOVA from now on.
    pub fn start(&self, ranges: &[Range<u64>]) -> Result<()> {
        let page_size = self.fixture().device().device().start_logging(ranges, PAGE)?;
        same("page size", PAGE, page_size)
    }

    /// What was written since it was last asked for.
    pub fn report(&self) -> Result<Bitmap> {
        let words = self.fixture().device().device().logged(at(0, 0)..at(self.pages, 0), PAGE)?;
        Ok(Bitmap::from_words(words, self.pages))
    }

    /// Fails unless that is what was written: runs of pages.
    pub fn reports(&self, expected: &[Range<u64>]) -> Result<()> {
        let runs = self.report()?.runs();
        ensure!(runs == expected, "the log has {runs:?}, not {expected:?}");
        Ok(())
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        self.fixture = None;
        // If this fails, the next scenario that counts devices says so.
        let _ = self.mdev.remove();
    }
}

fn log_type() -> mdev_dma::Result<Option<MdevType>> {
    MdevType::named("dma-log")
}
