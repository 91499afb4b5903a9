// SPDX-License-Identifier: GPL-2.0-only

//! A device that keeps a log of what it writes.

use crate::{PAGE, at, fixture::Fixture, live::status, same};
use anyhow::{Result, ensure};
use dirty_model::{Bitmap, DeviceLog, Errno, Errnos};
use events::Difference;
use harness::{Context, Failure, Skip};
use mdev_dma::{
    Outcome,
    sysfs::{Mdev, MdevType},
};
use std::{fmt, ops::Range};
use vfio_client::Memory;

/// Bytes for what START and REPORT point to: the bitmap of 32 GiB in pages of 4 KiB.
const ROOM: usize = 1 << 20;

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

/// A device that logs, beside the model of its log.
pub struct LoggingPair {
    logging: Logging,
    model: DeviceLog,
    room: Memory,
}

impl LoggingPair {
    /// With so many pages, which are mapped; skips the scenario if there can't be one. It doesn't log yet.
    pub fn new(context: &Context<'_>, pages: u64) -> Result<Self> {
        let logging = Logging::new(context, pages)?;
        Ok(Self { logging, model: DeviceLog::new(PAGE), room: Memory::new(ROOM)? })
    }

    pub fn fixture(&self) -> &Fixture {
        self.logging.fixture()
    }

    /// Whether it logs.
    pub fn is_on(&self) -> bool {
        self.model.is_on()
    }

    /// START of ranges, first byte and length each, with a page size as a hint.
    pub fn start(&mut self, ranges: &[(u64, u64)], page_size: u64) -> Result<()> {
        let words = ranges.iter().flat_map(|&(iova, length)| [iova, length]);
        let bytes: Vec<_> = words.flat_map(u64::to_ne_bytes).collect();
        self.room.write(0, &bytes);
        let device = self.fixture().device().device();
        let count = ranges.len() as u32;
        let answer = status(device.start_logging_from(page_size, count, &self.room, 0))?;
        let what = format!("START of {ranges:x?} with pages of {page_size:#x}");
        agree(&what, self.model.start(ranges, page_size), &answer)?;
        answer.map_or(Ok(()), |page_size| same("the device's page size", PAGE, page_size))
    }

    /// STOP
    pub fn stop(&mut self) -> Result<()> {
        self.fixture().device().device().stop_logging()?;
        self.model.stop();
        Ok(())
    }

    /// What a command has written, of whose range all may be written if it fails.
    pub fn written(&mut self, iova: u64, length: u64, outcome: Outcome) {
        let (certain, end) = (iova + outcome.count, iova + length);
        self.model.written(iova..certain, true);
        self.model.written(certain..end, false);
    }

    /// REPORT: agrees with what the model says must be there, and may.
    pub fn report(&mut self, iova: u64, length: u64, page_size: u64) -> Result<()> {
        let what = format!("REPORT of {iova:#x}+{length:#x} in pages of {page_size:#x}");
        let model = self.model.report(iova, length, page_size);
        let pages = length.div_ceil(page_size.max(PAGE));
        let mut bytes = vec![0; pages.div_ceil(64) as usize * 8];
        self.room.write(0, &bytes);
        let device = self.fixture().device().device();
        let answer = status(device.logged_into(iova, length, page_size, &self.room, 0))?;
        let owed = agree(&what, model, &answer)?;
        let Some(owed) = owed else { return Ok(()) };
        self.room.read(0, &mut bytes);
        let words = bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_ne_bytes));
        let difference = owed.diff(&Bitmap::from_words(words.collect(), pages));
        if difference.is_empty() {
            return Ok(());
        }
        let runs = |runs: Vec<Range<u64>>| {
            let bytes =
                |run: Range<u64>| (iova + run.start * page_size, iova + run.end * page_size);
            runs.into_iter().map(bytes).collect()
        };
        let (lost, spurious) = (runs(difference.lost), runs(difference.spurious));
        Err(Failure(Difference { what, lost, spurious, at: None }).into())
    }

    /// REPORT of all pages.
    pub fn report_all(&mut self) -> Result<()> {
        self.report(at(0, 0), self.logging.pages * PAGE, PAGE)
    }
}

/// Fails unless a call answered as the model does. Returns what the model says if it succeeded.
fn agree<T, U>(
    what: &str,
    model: Result<T, Errnos>,
    answer: &Result<U, Errno>,
) -> Result<Option<T>> {
    match (model, answer) {
        (Ok(owed), Ok(_)) => Ok(Some(owed)),
        (Err(errnos), Err(errno)) if errnos.contains(*errno) => Ok(None),
        (model, answer) => {
            let show =
                |error: Option<&dyn fmt::Display>| error.map_or("ok".into(), |e| e.to_string());
            let model = show(model.as_ref().err().map(|e| e as &dyn fmt::Display));
            let answer = show(answer.as_ref().err().map(|e| e as &dyn fmt::Display));
            Err(Failure::new(format!("{what}: {answer}, but must be {model}")).into())
        }
    }
}

fn log_type() -> mdev_dma::Result<Option<MdevType>> {
    MdevType::named("dma-log")
}
