// SPDX-License-Identifier: GPL-2.0-only

//! The driver, unloaded and loaded again.

use super::{Context, Scenario};
use crate::testbed::{Testbed, pages};
use anyhow::{Context as _, Result, ensure};
use mdev_dma::{Op as Device, sysfs::MdevType, uapi};
use rustix::{
    io::Errno,
    system::{delete_module, finit_module},
};
use std::{
    ffi::CStr,
    fs::File,
    path::{Path, PathBuf},
};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "module/unload-while-open",
        about: "the driver can't be unloaded while a device is open, which goes on working",
        run: unload_while_open,
    },
    Scenario {
        name: "module/unload",
        about: "unloading takes away devices that nobody has open; loading begins anew, thrice",
        run: unload,
    },
];

/// `O_NONBLOCK`: don't wait until nobody uses the module.
const NONBLOCK: i32 = 0o4000;

/// Unloads the driver.
fn unload_driver() -> Result<(), Errno> {
    // The header's name ends with a zero byte.
    let name = CStr::from_bytes_with_nul(uapi::RUST_MDEV_DMA_NAME).map_err(|_| Errno::INVAL)?;
    delete_module(name, NONBLOCK)
}

fn load_driver(file: &Path) -> Result<()> {
    let opened = File::open(file).with_context(|| format!("open {}", file.display()))?;
    finit_module(&opened, c"", 0).with_context(|| format!("load {}", file.display()))
}

/// Loads the driver when dropped, if it isn't there: other scenarios need it.
struct Reload(PathBuf);

impl Drop for Reload {
    fn drop(&mut self) {
        if MdevType::find().is_err() {
            if let Err(error) = load_driver(&self.0) {
                eprintln!("dirtyscope: {error:#}");
            }
        }
    }
}

fn unload_while_open(context: &Context<'_>) -> Result<()> {
    let _reload = Reload(context.module()?.to_owned());
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.pin(0..16)?;
    let unloaded = unload_driver();
    ensure!(unloaded == Err(Errno::AGAIN), "unloading while open: {unloaded:?}");
    bed.transfer(Device::Write, pages(0..16))?;
    bed.check()
}

fn unload(context: &Context<'_>) -> Result<()> {
    let file = context.module()?;
    let _reload = Reload(file.to_owned());
    for _ in 0..3 {
        let devices = [context.device(0)?, context.device(1)?];
        unload_driver().context("unloading the driver")?;
        ensure!(MdevType::find().is_err(), "the driver's type is still there");
        for mdev in devices {
            ensure!(!mdev.exists(), "{} is still there", mdev.path().display());
        }
        load_driver(file)?;
        let mut bed = Testbed::with_pages(context, 16)?;
        bed.pin(0..16)?;
        bed.check()?;
    }
    Ok(())
}
