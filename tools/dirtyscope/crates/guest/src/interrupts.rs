// SPDX-License-Identifier: GPL-2.0-only

//! How one learns that the device is done.

use crate::function::{Bar, Function, UIO};
use anyhow::{Context as _, Result, ensure};
use mdev_dma::{MdevDma, Outcome, uapi::RUST_MDEV_DMA_IRQ_COMMAND};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{fs::File, io::Read, time::Duration};

/// A wait for an interrupt is so many of these: while a machine migrates its clock may jump, and with
/// it one of them ends, not all.
const WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
const WAITS: u32 = 300;

/// A command that is polled for ends within this time.
const LIMIT: Duration = Duration::from_secs(60);

/// How one learns that a command has ended.
pub enum Interrupts {
    /// Interrupts are counted.
    Uio {
        /// What tells of them.
        file: File,
        /// How many there were.
        count: u64,
    },
    /// There is nobody who would tell.
    Polled,
}

impl Interrupts {
    /// Uses interrupts, if there is a driver for that.
    pub fn set_up(function: &Function, device: &MdevDma<Bar>) -> Result<Self> {
        device.enable_irqs(0)?;
        if function.driver().is_none() {
            return Ok(Self::Polled);
        }
        let file = function.uio()?;
        function.unmask_interrupt()?;
        Ok(Self::Uio { file, count: 0 })
    }

    /// Has the device interrupt when the next command ends. Others do so as well, and nobody waits for
    /// those.
    pub fn arm(&self, device: &MdevDma<Bar>) -> Result<()> {
        if let Self::Uio { .. } = self {
            device.clear_irqs(device.irq_status()?)?;
            device.enable_irqs(RUST_MDEV_DMA_IRQ_COMMAND)?;
        }
        Ok(())
    }

    /// Waits for the end of the command that is in progress. Fails if it doesn't end, or without an
    /// interrupt although there should be one.
    pub fn wait(&mut self, function: &Function, device: &MdevDma<Bar>) -> Result<Outcome> {
        let Self::Uio { file, count } = self else {
            return Ok(device.wait(LIMIT)?);
        };
        for _ in 0..WAITS {
            let mut fds = [PollFd::new(file, PollFlags::IN)];
            if poll(&mut fds, Some(&WAIT)).context("wait for an interrupt")? == 0 {
                continue;
            }
            file.read_exact(&mut [0; 4]).with_context(|| format!("read from {UIO}"))?;
            *count += 1;
            let events = device.irq_status()?;
            device.clear_irqs(events)?;
            function.unmask_interrupt()?;
            if events & RUST_MDEV_DMA_IRQ_COMMAND != 0 {
                break;
            }
        }
        let outcome = device.outcome()?;
        let events = device.irq_status()?;
        device.enable_irqs(0)?;
        ensure!(
            events & RUST_MDEV_DMA_IRQ_COMMAND == 0,
            "a command has ended ({outcome:?}), and there was no interrupt; there were {count} before"
        );
        Ok(outcome)
    }
}
