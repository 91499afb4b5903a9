// SPDX-License-Identifier: GPL-2.0-only

//! Calls that are no operation of the model.

use crate::sweep::{injected, sweep};
use anyhow::{Context as _, Result, ensure};
use harness::{Context, Scenario, scenario};
use std::os::fd::AsFd;
use testbed::{fixture::Fixture, same};
use vfio_client::{
    Container, Device, EventFd, Group, IrqData,
    MigState::{self, Resuming, Running, Stop, StopCopy},
    SetIrqs,
    uapi::{
        VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_PCI_INTX_IRQ_INDEX,
        VFIO_PCI_MSI_IRQ_INDEX,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario("fail-nth/container/first-group", "a container with its first group", first_group),
    scenario("fail-nth/container/info", "VFIO_IOMMU_GET_INFO", info),
    scenario(
        "fail-nth/irq/msi",
        "other eventfds for vectors of MSI: they signal, or those that were set before do",
        msi,
    ),
    scenario("fail-nth/irq/unmask", "an eventfd that unmasks INTx", unmask),
    scenario(
        "fail-nth/migration/save",
        "the device's state is read: it can be once more, or the device is in ERROR",
        save,
    ),
    scenario(
        "fail-nth/migration/load",
        "a state is loaded: all of it is, or the device is in ERROR and has no pins",
        load,
    ),
];

fn first_group(context: &Context<'_>) -> Result<()> {
    let node = context.device(0)?.node()?;
    sweep(context, "a container with its first group", |n| {
        let (container, injected) = injected(n, || Ok(Container::new(Group::open(&node)?)?))?;
        if container.is_none() {
            // Nobody has the group.
            Container::new(Group::open(&node)?)?;
        }
        Ok(injected)
    })
}

fn info(context: &Context<'_>) -> Result<()> {
    sweep(context, "GET_INFO", |n| {
        let fixture = Fixture::new(context, 1)?;
        let expected = fixture.container.info()?.dma_avail;
        let (found, injected) = injected(n, || Ok(fixture.container.info()?))?;
        let found = found.map_or_else(|| fixture.container.info(), Ok)?.dma_avail;
        ensure!(found == expected, "dma_avail is {found:?}, not {expected:?}");
        Ok(injected)
    })
}

/// A call for interrupts from the first on.
fn set(index: u32, action: u32, count: u32, data: IrqData<'_>) -> SetIrqs<'_> {
    SetIrqs { index, action, start: 0, count, data, argsz: None }
}

fn msi(context: &Context<'_>) -> Result<()> {
    sweep(context, "SET_IRQS of two vectors of MSI", |n| {
        let fixture = Fixture::new(context, 1)?;
        let device = fixture.device().device();
        let (before, after) = (EventFd::new()?, EventFd::new()?);
        let give = |eventfd: &EventFd| {
            let fds = [Some(eventfd.as_fd()); 2];
            let data = IrqData::EventFd(&fds);
            device.set_irqs(&set(VFIO_PCI_MSI_IRQ_INDEX, VFIO_IRQ_SET_ACTION_TRIGGER, 2, data))
        };
        give(&before)?;
        let (set_up, injected) = injected(n, || Ok(give(&after)?))?;
        let signals = |signalled: &EventFd, other: &EventFd| {
            let (action, data) = (VFIO_IRQ_SET_ACTION_TRIGGER, IrqData::None);
            device.set_irqs(&set(VFIO_PCI_MSI_IRQ_INDEX, action, 2, data))?;
            same("signals of the eventfds that are set", 2, signalled.take()?)?;
            same("signals of the others", 0, other.take()?)
        };
        if set_up.is_none() {
            signals(&before, &after)?;
            give(&after)?;
        }
        signals(&after, &before)?;
        Ok(injected)
    })
}

fn unmask(context: &Context<'_>) -> Result<()> {
    sweep(context, "SET_IRQS of an eventfd that unmasks INTx", |n| {
        let fixture = Fixture::new(context, 1)?;
        let device = fixture.device().device();
        let (trigger, unmask) = (EventFd::new()?, EventFd::new()?);
        let give = |action, eventfd: &EventFd| {
            let fds = [Some(eventfd.as_fd())];
            device.set_irqs(&set(VFIO_PCI_INTX_IRQ_INDEX, action, 1, IrqData::EventFd(&fds)))
        };
        give(VFIO_IRQ_SET_ACTION_TRIGGER, &trigger)?;
        let (set_up, injected) = injected(n, || Ok(give(VFIO_IRQ_SET_ACTION_UNMASK, &unmask)?))?;
        if set_up.is_none() {
            give(VFIO_IRQ_SET_ACTION_UNMASK, &unmask)?;
        }
        Ok(injected)
    })
}

/// Pages that are mapped, and those that are pinned, when the device's state is read.
const PAGES: u64 = 8;
const PINNED: u64 = 3;

/// Reads the device's state.
fn read_state(device: &Device) -> vfio_client::Result<Vec<u8>> {
    let file = device.set_migration_state(StopCopy)?;
    file.map_or_else(|| Ok(Vec::new()), |file| file.read_to_end(4096))
}

fn save(context: &Context<'_>) -> Result<()> {
    sweep(context, "RUNNING to STOP_COPY, and a read of the state", |n| {
        let fixture = Fixture::new(context, PAGES)?;
        fixture.pin(1..1 + PINNED)?;
        let device = fixture.device().device();
        // The device saves its registers as they were read last.
        same("PINS", PINNED, fixture.device().pins()?)?;
        let (state, injected) = injected(n, || Ok(read_state(device)?))?;
        if state.is_none() && device.migration_state()? == MigState::Error {
            same("PINS in ERROR", PINNED, fixture.device().pins()?)?;
            device.reset()?;
            return Ok(injected);
        }
        device.set_migration_state(Running)?;
        same("PINS", PINNED, fixture.device().pins()?)?;
        let again = read_state(device)?;
        if let Some(state) = state {
            let different = state.iter().zip(&again).position(|(before, after)| before != after);
            ensure!(
                state.len() == again.len() && different.is_none(),
                "the state is not the same once more: {} bytes, and {}, other from {different:?}",
                state.len(),
                again.len(),
            );
        }
        Ok(injected)
    })
}

fn load(context: &Context<'_>) -> Result<()> {
    sweep(context, "RESUMING, a write of the state, and to STOP", |n| {
        let fixture = Fixture::new(context, PAGES)?;
        fixture.pin(1..1 + PINNED)?;
        let device = fixture.device().device();
        let state = read_state(device)?;
        device.reset()?;
        let load = || {
            let file = device.set_migration_state(Resuming)?;
            if let Some(file) = &file {
                file.write(&state)?;
            }
            device.set_migration_state(Stop)
        };
        let (loaded, injected) = injected(n, || Ok(load()?))?;
        if loaded.is_none() {
            same("PINS after a load that failed", 0, fixture.device().pins()?)?;
            device.reset()?;
            load().context("once more")?;
        }
        same("PINS after a load", PINNED, fixture.device().pins()?)?;
        device.set_migration_state(Running)?;
        Ok(injected)
    })
}
