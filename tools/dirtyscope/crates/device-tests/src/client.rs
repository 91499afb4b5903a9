// SPDX-License-Identifier: GPL-2.0-only

//! Software that was written for other devices.

use anyhow::{Context as _, Result, anyhow, ensure};
use harness::{Context, Scenario, Skip, scenario};
use mdev_dma::{
    Opcode, PAGE, pattern,
    sysfs::{Mdev, MdevType},
    uapi::{self, RUST_MDEV_DMA_IRQ_COMMAND as COMMAND},
};
use mini_vmm::{Ram, Vmm};
use std::{fs, io, process::Command};
use testbed::fixture::succeeded;
use testbed::same;
use uuid::Uuid;
use vfio_client::{
    MigState,
    uapi::{VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/client/vfio-ioctls",
        "rust-vmm's vfio-ioctls opens the device, maps memory, and is interrupted",
        vfio_ioctls,
    ),
    scenario(
        "device/client/vfio-ioctls-migrates",
        "rust-vmm's vfio-ioctls brings the state of a device to another one",
        vfio_ioctls_migrates,
    ),
    scenario(
        "device/client/mdevctl",
        "mdevctl defines a device, starts, lists, stops and undefines it",
        mdevctl,
    ),
];

/// Memory in two pieces.
const LENGTH: u64 = 16 * PAGE;
const FIRST: u64 = 0x10_0000;
const SECOND: u64 = 0x1_0000_0000;

fn open(context: &Context<'_>, device: usize) -> Result<Vmm> {
    let path = context.device(device)?.path();
    let ram = [FIRST, SECOND].map(|address| Ram::anonymous(address, LENGTH as usize));
    Ok(Vmm::open(&[path], ram.into())?)
}

fn vfio_ioctls(context: &Context<'_>) -> Result<()> {
    let vmm = open(context, 0)?;
    let (vfio, device) = (&vmm.devices()[0], vmm.device(0));
    let mut found = [0; 4];
    vfio.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut found, 0);
    let ids = (uapi::RUST_MDEV_DMA_PCI_DEVICE_ID << 16) | uapi::RUST_MDEV_DMA_PCI_VENDOR_ID;
    ensure!(found == ids.to_le_bytes(), "its ids are {found:02x?}, not {ids:#x}");
    let size = vfio.get_region_size(VFIO_PCI_BAR0_REGION_INDEX);
    ensure!(size == u64::from(uapi::RUST_MDEV_DMA_BAR_SIZE), "BAR 0 has {size:#x} bytes");

    let eventfd = EventFd::new(EFD_NONBLOCK)?;
    vfio.enable_irq(VFIO_PCI_MSI_IRQ_INDEX, vec![&eventfd])?;
    device.enable_irqs(COMMAND)?;
    run(&vmm, Opcode::Pin, FIRST, LENGTH, 0)?;
    ensure!(eventfd.read().context("MSI")? == 1, "one command sent more than one message");
    vfio.disable_irq(VFIO_PCI_MSI_IRQ_INDEX)?;
    run(&vmm, Opcode::Write, FIRST, LENGTH, 1)?;
    run(&vmm, Opcode::DmaWrite, SECOND, LENGTH, 2)?;
    let silent = eventfd.read().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
    ensure!(silent, "MSI is disabled, and there was a message");
    contains(&vmm, FIRST, 1)?;
    contains(&vmm, SECOND, 2)?;

    same("PINS", LENGTH / PAGE, device.pins()?)?;
    vmm.unmap()?;
    same("PINS once memory is unmapped", 0, device.pins()?)?;
    vfio.reset();
    same("IRQ_ENABLE after a reset", 0, device.enabled_irqs()?.into())
}

fn vfio_ioctls_migrates(context: &Context<'_>) -> Result<()> {
    let source = open(context, 0)?;
    run(&source, Opcode::Pin, SECOND, LENGTH, 0)?;
    source.device(0).enable_irqs(COMMAND)?;
    let vfio = &source.devices()[0];
    vfio.set_migration_state(MigState::StopCopy as u32)?;
    let state = vfio.read_migration_data_to_end()?;
    vfio.set_migration_state(MigState::Stop as u32)?;
    context.note(format!("{} bytes of state", state.len()));

    let destination = open(context, 1)?;
    let (vfio, device) = (&destination.devices()[0], destination.device(0));
    let restore = |state: &[u8]| {
        vfio.set_migration_state(MigState::Resuming as u32)?;
        vfio.write_migration_data(state)?;
        vfio.set_migration_state(MigState::Stop as u32)?;
        vfio.set_migration_state(MigState::Running as u32)
    };
    ensure!(
        restore(&state[..state.len() - 1]).is_err(),
        "the device takes a state that is cut short"
    );
    vfio.reset();
    restore(&state)?;
    same("PINS", LENGTH / PAGE, device.pins()?)?;
    same("IRQ_ENABLE", COMMAND.into(), device.enabled_irqs()?.into())?;
    run(&destination, Opcode::Write, SECOND, LENGTH, 3)?;
    contains(&destination, SECOND, 3)?;
    source.devices()[0].reset();
    Ok(())
}

/// All memory from here on is what a write with this seed puts there.
fn contains(vmm: &Vmm, iova: u64, seed: u64) -> Result<()> {
    let mut found = vec![0; LENGTH as usize];
    vmm.read_memory(iova, &mut found)?;
    ensure!(
        pattern::matches(&found, seed, iova),
        "memory at {iova:#x} isn't what the device has written"
    );
    Ok(())
}

fn run(vmm: &Vmm, opcode: Opcode, iova: u64, length: u64, seed: u64) -> Result<()> {
    succeeded(&opcode.to_string(), vmm.device(0).run(opcode as u32, iova, length, seed)?)
}

/// A device that mdevctl knows. Forgotten, and removed if it exists, when dropped.
struct Defined<'a> {
    context: &'a Context<'a>,
    uuid: Uuid,
}

impl Drop for Defined<'_> {
    fn drop(&mut self) {
        let uuid = self.uuid.to_string();
        // Whatever isn't there any more is no loss.
        if (Mdev { uuid: self.uuid }).exists() {
            let _ = call(self.context, &["stop", "--uuid", &uuid]);
        }
        let _ = call(self.context, &["undefine", "--uuid", &uuid]);
    }
}

fn mdevctl(context: &Context<'_>) -> Result<()> {
    let mdev_type = MdevType::find()?;
    let (type_name, parent) = names(&mdev_type)?;
    let types = call(context, &["types"])?;
    ensure!(types.contains(&type_name), "mdevctl knows no type {type_name}:\n{types}");

    let defined = Defined { context, uuid: context.new_uuid()? };
    let (mdev, uuid) = (Mdev { uuid: defined.uuid }, defined.uuid.to_string());
    let uuid = uuid.as_str();
    let listed = |list: &[&str]| -> Result<bool> { Ok(call(context, list)?.contains(uuid)) };
    call(context, &["define", "--uuid", uuid, "--parent", &parent, "--type", &type_name])?;
    ensure!(listed(&["list", "--defined"])?, "mdevctl doesn't list what it has defined");
    ensure!(!mdev.exists(), "defining a device has made it");

    let available = mdev_type.available_instances()?;
    call(context, &["start", "--uuid", uuid])?;
    ensure!(mdev.exists(), "mdevctl has started it, and it isn't there");
    ensure!(listed(&["list"])?, "mdevctl doesn't list what it has started");
    ensure!(mdev_type.available_instances()? + 1 == available, "it isn't counted as an instance");
    let ram = vec![Ram::anonymous(0, PAGE as usize)];
    drop(Vmm::open(&[mdev.path()], ram).context("open what mdevctl made")?);

    call(context, &["stop", "--uuid", uuid])?;
    ensure!(!mdev.exists(), "mdevctl has stopped it, and it is still there");
    ensure!(!listed(&["list"])?, "mdevctl lists what it has stopped");
    call(context, &["undefine", "--uuid", uuid])?;
    ensure!(!listed(&["list", "--defined"])?, "mdevctl lists what it has undefined");
    Ok(())
}

/// How mdevctl calls the type and its parent.
fn names(mdev_type: &MdevType) -> Result<(String, String)> {
    let path = fs::canonicalize(mdev_type.path())?;
    let parent = path.parent().and_then(|types| types.parent());
    let name = |path: Option<&std::path::Path>| {
        path.and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned())
    };
    name(Some(&path)).zip(name(parent)).ok_or_else(|| anyhow!("{} is no type", path.display()))
}

/// What mdevctl says. It has to succeed.
fn call(context: &Context<'_>, arguments: &[&str]) -> Result<String> {
    context.note(format!("mdevctl {}", arguments.join(" ")));
    let output = Command::new("mdevctl").args(arguments).output().map_err(|error| {
        anyhow!(Skip(format!("mdevctl: {error}; install Debian's package of that name")))
    })?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "mdevctl {}: {errors}", arguments.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
