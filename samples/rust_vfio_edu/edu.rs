// SPDX-License-Identifier: GPL-2.0

//! QEMU's `edu` device: its DMA engine.
//!
//! See `docs/specs/edu.rst` of QEMU. The engine copies between memory and a buffer of the device,
//! which nothing else reaches.

use crate::{
    abstractions::pci::{clear_master, set_master},
    bindings::{RUST_VFIO_EDU_PCI_DEVICE_ID, RUST_VFIO_EDU_PCI_VENDOR_ID},
};
use kernel::{
    device::Bound,
    io::{poll::read_poll_timeout, register, Io},
    pci,
    prelude::*,
    time::Delta,
};

pub(crate) const VENDOR_ID: u16 = RUST_VFIO_EDU_PCI_VENDOR_ID as u16;
pub(crate) const DEVICE_ID: u16 = RUST_VFIO_EDU_PCI_DEVICE_ID as u16;

register! {
    /// Identification.
    pub(crate) ID(u32) @ 0x0 {
        31:24 major;
        23:16 minor;
        15:0 magic;
    }

    /// Source of a transfer.
    pub(crate) DMA_SOURCE(u64) @ 0x80 {
        63:0 address;
    }

    /// Destination of a transfer.
    pub(crate) DMA_DESTINATION(u64) @ 0x88 {
        63:0 address;
    }

    /// Size of a transfer.
    pub(crate) DMA_COUNT(u32) @ 0x90 {
        31:0 bytes;
    }

    /// Starts a transfer.
    pub(crate) DMA_COMMAND(u32) @ 0x98 {
        1:1 to_memory => bool;
        0:0 run => bool;
    }
}

/// End of the registers that are used.
pub(crate) const BAR_END: usize = 0xa0;

/// The registers.
pub(crate) type Bar<'a> = pci::Bar<'a, BAR_END>;

/// Where the engine sees the device's buffer.
const BUFFER: u64 = 0x40000;

/// Size of the buffer.
pub(crate) const BUFFER_SIZE: usize = 4096;

/// A transfer takes 100 ms, of a guest that may get no CPU for a while.
const TIMEOUT: Delta = Delta::from_millis(10_000);
const POLL: Delta = Delta::from_millis(2);

/// The engine of a device. It has to be locked: it does one transfer at a time.
pub(crate) struct Engine<'a> {
    pub(crate) pdev: &'a pci::Device<Bound>,
    pub(crate) bar: &'a Bar<'a>,
}

impl Engine<'_> {
    /// Lets the engine access memory, once it is idle. If that never happens, it stays off.
    pub(crate) fn enable(&self) {
        if self.wait() {
            set_master(self.pdev);
        }
    }

    /// Stops the engine from accessing memory. When this returns, it is idle.
    pub(crate) fn disable(&self) {
        self.wait();
        clear_master(self.pdev);
    }

    /// Waits until the engine is idle. If that never happens, it can't access memory any more.
    fn wait(&self) -> bool {
        let idle = read_poll_timeout(
            || Ok(self.bar.read(DMA_COMMAND)),
            |command| !command.run(),
            POLL,
            TIMEOUT,
        )
        .is_ok();
        if !idle {
            dev_err!(
                self.pdev,
                "a transfer doesn't end, DMA is off until the next reset\n"
            );
            clear_master(self.pdev);
        }
        idle
    }

    /// Copies `len` bytes at `address` to the buffer. Fails with `EIO` if that doesn't end.
    pub(crate) fn load(&self, address: u64, len: usize) -> Result {
        self.transfer(address, BUFFER, len, false)
    }

    /// Copies `len` bytes of the buffer to `address`. Fails as [`Self::load`] does.
    pub(crate) fn store(&self, address: u64, len: usize) -> Result {
        self.transfer(BUFFER, address, len, true)
    }

    fn transfer(&self, source: u64, destination: u64, len: usize, to_memory: bool) -> Result {
        if len > BUFFER_SIZE {
            return Err(EINVAL);
        }
        if !self.wait() {
            return Err(EIO);
        }
        // A `Bar` takes accesses wider than 32 bits with a check of the alignment only.
        self.bar
            .try_write_reg(DMA_SOURCE::zeroed().with_address(source))?;
        self.bar
            .try_write_reg(DMA_DESTINATION::zeroed().with_address(destination))?;
        // CAST: At most `BUFFER_SIZE`.
        self.bar
            .write_reg(DMA_COUNT::zeroed().with_bytes(len as u32));
        self.bar.write_reg(
            DMA_COMMAND::zeroed()
                .with_to_memory(to_memory)
                .with_run(true),
        );
        self.wait().then_some(()).ok_or(EIO)
    }
}
