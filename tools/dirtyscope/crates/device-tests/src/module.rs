// SPDX-License-Identifier: GPL-2.0-only

//! The driver, unloaded and loaded again.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Scenario, scenario};
use mdev_dma::{Opcode, sysfs::MdevType, uapi};
use rustix::{
    io::Errno,
    system::{delete_module, finit_module},
};
use std::{ffi::CStr, fs::File};
use testbed::{Testbed, pages};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/module/unload-while-open",
        "the driver can't be unloaded while a device is open, which goes on working",
        unload_while_open,
    ),
    scenario(
        "device/module/unload",
        "unloading takes away devices that nobody has open; loading begins anew, thrice",
        unload_and_load,
    ),
];

/// `O_NONBLOCK`: don't wait until nobody uses the module.
const NONBLOCK: i32 = 0o4000;

/// Unloads the driver.
fn unload() -> Result<(), Errno> {
    // The header's name ends with a zero byte.
    let name = CStr::from_bytes_with_nul(uapi::RUST_MDEV_DMA_NAME).map_err(|_| Errno::INVAL)?;
    delete_module(name, NONBLOCK)
}

/// The driver's file, opened before the driver is unloaded. When this is dropped, the driver is
/// loaded if it isn't there: other scenarios need it.
struct Driver(File);

impl Driver {
    fn open(context: &Context<'_>) -> Result<Self> {
        let path = context.module()?;
        Ok(Self(File::open(path).with_context(|| format!("open {}", path.display()))?))
    }

    fn load(&self) -> Result<()> {
        finit_module(&self.0, c"", 0).context("load the driver")
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if MdevType::find().is_err() {
            if let Err(error) = self.load() {
                eprintln!("dirtyscope: {error:#}");
            }
        }
    }
}

fn unload_while_open(context: &Context<'_>) -> Result<()> {
    let _driver = Driver::open(context)?;
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.pin(0..16)?;
    let unloaded = unload();
    ensure!(unloaded == Err(Errno::AGAIN), "unloading while open: {unloaded:?}");
    bed.transfer(Opcode::Write, pages(0..16))?;
    bed.check()
}

fn unload_and_load(context: &Context<'_>) -> Result<()> {
    let driver = Driver::open(context)?;
    for _ in 0..3 {
        let devices = [context.device(0)?, context.device(1)?];
        unload().context("unload the driver")?;
        ensure!(MdevType::find().is_err(), "the driver's type is still there");
        for mdev in devices {
            ensure!(!mdev.exists(), "{} is still there", mdev.path().display());
        }
        driver.load()?;
        let mut bed = Testbed::with_pages(context, 16)?;
        bed.pin(0..16)?;
        bed.check()?;
    }
    Ok(())
}
