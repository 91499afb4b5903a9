// SPDX-License-Identifier: GPL-2.0-only

//! Mediated devices in sysfs: made, counted, used at the same time, removed.

use anyhow::{Result, anyhow, ensure};
use dirty_model::Errno;
use harness::{Context, Scenario, Skip, scenario};
use mdev_dma::{
    Opcode,
    sysfs::{Mdev, MdevType},
};
use std::{fs, io, thread, time::Duration};
use testbed::{PAGE, Testbed, at, pages, same};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/mdev/type",
        "the driver offers a type rust_mdev_dma-* whose devices are vfio-pci",
        mdev_type,
    ),
    scenario(
        "device/mdev/available-instances",
        "available_instances goes down with each device made, and up with each removed",
        available_instances,
    ),
    scenario(
        "device/mdev/limit",
        "when available_instances is 0, making another fails with EUSERS",
        limit,
    ),
    scenario(
        "device/mdev/bad-create",
        "a UUID in use is EEXIST, what is no UUID EINVAL",
        bad_create,
    ),
    scenario(
        "device/mdev/parallel",
        "four devices in four containers, used by four threads",
        parallel,
    ),
    scenario(
        "device/mdev/remove-while-open",
        "removing an open device waits until it is closed; it works until then",
        remove_while_open,
    ),
];

/// Devices that a scenario makes for itself, removed when dropped.
#[derive(Default)]
struct Own(Vec<Mdev>);

impl Own {
    fn create(&mut self, context: &Context<'_>) -> mdev_dma::Result<Mdev> {
        let uuid = context.new_uuid().map_err(|e| mdev_dma::Error::Unknown(e.to_string()))?;
        let mdev = MdevType::find()?.create(uuid)?;
        self.0.push(mdev);
        Ok(mdev)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        for mdev in self.0.iter().filter(|mdev| mdev.exists()) {
            // If this fails, the next scenario that counts them says so.
            let _ = mdev.remove();
        }
    }
}

fn mdev_type(_context: &Context<'_>) -> Result<()> {
    let found = MdevType::find()?;
    let api = found.device_api()?;
    ensure!(api == "vfio-pci", "device_api is {api:?}");
    let name = found.path().file_name().unwrap_or_default();
    ensure!(name == "rust_mdev_dma-dma", "the type's directory is {name:?}");
    Ok(())
}

fn available_instances(context: &Context<'_>) -> Result<()> {
    let mdev_type = MdevType::find()?;
    let before = mdev_type.available_instances()?;
    if before < 3 {
        return Err(Skip(format!("only {before} more devices can be made")).into());
    }
    let mut own = Own::default();
    for made in 1..=3 {
        let mdev = own.create(context)?;
        ensure!(mdev.exists(), "{} isn't there", mdev.path().display());
        let available = mdev_type.available_instances()?;
        same("available_instances", u64::from(before) - made, available.into())?;
    }
    for (removed, mdev) in (1..).zip(&own.0) {
        mdev.remove()?;
        ensure!(!mdev.exists(), "{} is still there", mdev.path().display());
        let available = mdev_type.available_instances()?;
        same("available_instances", u64::from(before) - 3 + removed, available.into())?;
    }
    Ok(())
}

fn limit(context: &Context<'_>) -> Result<()> {
    let mdev_type = MdevType::find()?;
    let before = mdev_type.available_instances()?;
    let mut own = Own::default();
    for _ in 0..before {
        own.create(context)?;
    }
    same("available_instances", 0, mdev_type.available_instances()?.into())?;
    let one_more = own.create(context).map_err(|e| Errno(e.errno()));
    ensure!(one_more == Err(Errno::EUSERS), "one more: {one_more:?}");
    drop(own);
    same("available_instances", before.into(), mdev_type.available_instances()?.into())
}

fn bad_create(context: &Context<'_>) -> Result<()> {
    let mdev = context.device(0)?;
    let mdev_type = MdevType::find()?;
    let before = mdev_type.available_instances()?;
    let again = mdev_type.create(mdev.uuid).map_err(|e| Errno(e.errno()));
    ensure!(again == Err(Errno::EEXIST), "the same UUID again: {again:?}");

    let long = "0".repeat(100);
    for text in ["x", "not-a-uuid-but-of-the-same-length-36", &long] {
        let create = fs::write(mdev_type.path().join("create"), text);
        let errno = create.as_ref().map_err(io::Error::raw_os_error);
        ensure!(errno == Err(Some(Errno::EINVAL.0)), "{text:?}: {create:?}");
    }
    same("available_instances", before.into(), mdev_type.available_instances()?.into())
}

fn parallel(context: &Context<'_>) -> Result<()> {
    let work = |device: usize| -> Result<()> {
        let mut bed = Testbed::on(context, device)?;
        bed.map(0..200)?;
        bed.start()?;
        for round in 0..4 {
            bed.pin(round..round + 100)?;
            bed.transfer(Opcode::Write, at(round, 5)..at(round + 99, 9))?;
            bed.dma_write(at(150, 1)..at(151 + round, 2))?;
            bed.reports(&[round..round + 100, 150..152 + round])?;
            bed.unpin(round..round + 100)?;
            bed.check()?;
        }
        bed.pin(0..200)?;
        bed.unmap(0..200)?;
        bed.check()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|i| scope.spawn(move || work(i))).collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

fn remove_while_open(context: &Context<'_>) -> Result<()> {
    const A_WHILE: Duration = Duration::from_millis(100);
    let mdev = context.device(1)?;
    let mut bed = Testbed::on(context, 1)?;
    bed.map(0..64)?;
    bed.pin(0..64)?;

    let removal = thread::spawn(move || mdev.remove());
    thread::sleep(A_WHILE);
    ensure!(!removal.is_finished(), "it was removed while it was open");
    bed.transfer(Opcode::Write, pages(0..64))?;
    bed.unpin(0..10)?;
    bed.dma_write(at(3, 0)..at(3, PAGE))?;
    bed.check()?;

    drop(bed);
    removal.join().map_err(|_| anyhow!("the thread panicked"))??;
    ensure!(!mdev.exists(), "{} is still there", mdev.path().display());
    Ok(())
}
